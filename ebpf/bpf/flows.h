/* The table of flows: where each is, when it ends, and what it counts.
 *
 * Those of clients on this host have places of their own in an array and overflow into the table of the others. */
#ifndef FLOWS_H
#define FLOWS_H

#include "kernel.h"
#include "maps.h"
#include "packet.h"
#include "records.h"

struct {
	MAP_UINT(type, MAP_LRU_HASH);
	MAP_UINT(max_entries, 131072);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, struct flow_key);
	MAP_TYPE(value, struct flow);
} flows SEC(".maps");

/* Connections to the outside that somebody behind this host has under the number of a published port:
 * the host masquerades containers and virtual machines, and no socket of its own has them. By the
 * host's address and port in the places of the container's. */
struct {
	MAP_UINT(type, MAP_LRU_HASH);
	MAP_UINT(max_entries, 8192);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, struct flow_key);
	MAP_TYPE(value, __u32);
} outgoing SEC(".maps");

/* Flows of clients on this host that have found a place here; the others are in `flows`. */
struct {
	MAP_UINT(type, MAP_ARRAY);
	MAP_UINT(max_entries, LOCAL_FLOWS);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, struct local_flow);
} local_flows SEC(".maps");

static ALWAYS_INLINE void name_flow(struct flow_key *key, __u8 protocol,
				    const struct address *container, __u16 container_port,
				    const struct address *client, __u16 client_port)
{
	key->container = *container;
	key->client = *client;
	key->container_port = container_port;
	key->client_port = client_port;
	key->protocol = protocol;
}

/* The place for a flow of a client on this host. Its port is given out upwards by twos. */
static ALWAYS_INLINE struct local_flow *local_place(const struct flow_key *key, __u32 way)
{
	__u32 at = (TO_NET16(key->client_port) >> 1) ^ key->container_port ^
		   (key->container.word[3] * 0x9e3779b1U >> 16);

	at = (at ^ way) % LOCAL_FLOWS;
	return bpf_map_lookup_elem(&local_flows, &at);
}

static ALWAYS_INLINE struct local_flow *find_local(const struct flow_key *key)
{
	__u32 way;

#pragma unroll
	for (way = 0; way < LOCAL_WAYS; way++) {
		struct local_flow *local = local_place(key, way);

		if (local && local->taken == LOCAL_THERE && local->key.client_port == key->client_port &&
		    local->key.container_port == key->container_port &&
		    local->key.protocol == key->protocol &&
		    same(&local->key.container, &key->container) &&
		    same(&local->key.client, &key->client))
			return local;
	}
	return 0;
}

static ALWAYS_INLINE struct flow *find_flow(const struct flow_key *key)
{
	struct local_flow *local = find_local(key);

	return local ? &local->flow : bpf_map_lookup_elem(&flows, key);
}

static ALWAYS_INLINE struct flow *put_local(const struct flow_key *key, const struct flow *fresh)
{
	__u32 way;

#pragma unroll
	for (way = 0; way < LOCAL_WAYS; way++) {
		struct local_flow *local = local_place(key, way);

		if (local && !local->taken &&
		    !__sync_val_compare_and_swap(&local->taken, 0, LOCAL_FILLS)) {
			local->key = *key;
			local->flow = *fresh;
			/* Not before the rest is there. */
			__sync_val_compare_and_swap(&local->taken, LOCAL_FILLS, LOCAL_THERE);
			return &local->flow;
		}
	}
	if (bpf_map_update_elem(&flows, key, fresh, 0))
		return 0;
	return bpf_map_lookup_elem(&flows, key);
}

static ALWAYS_INLINE void forget_local(const struct flow_key *key)
{
	struct local_flow *local = find_local(key);

	if (local)
		local->taken = 0;
	else
		bpf_map_delete_elem(&flows, key);
}

static ALWAYS_INLINE void end_flow(struct flow *flow, const struct service_key *key)
{
	struct port_flows *count;

	if (flow->flags & FLOW_ENDED)
		return;
	flow->flags |= FLOW_ENDED;
	if (flow->flags & FLOW_LOCAL) {
		/* No hook sees sockets of the kernel itself go: MPTCP's, for one. */
		if (key->protocol == PROTOCOL_TCP)
			forget((__u64)flow->cookie_above << 32 | flow->first_sequence);
		return;
	}
	count = bpf_map_lookup_elem(&active, key);
	if (count)
		__sync_fetch_and_add(&count->active, -1);
}

/* Notes what a segment says about the flow's end. */
static ALWAYS_INLINE void follow(struct flow *flow, const struct service_key *key, __u8 flags,
				 __u16 own_fin)
{
	if (flags & TCP_FIN)
		flow->flags |= own_fin;
	if (flags & TCP_RST)
		flow->flags |= FLOW_RESET;
	if ((flow->flags & FLOW_RESET) ||
	    (flow->flags & (FLOW_FIN_IN | FLOW_FIN_OUT)) == (FLOW_FIN_IN | FLOW_FIN_OUT))
		end_flow(flow, key);
}

/* So long after a client's reset the container may still send what it has sent before. */
#define RESET_TAKES_NS 1000000000ULL

/* The container goes on with a connection: what was said to it in the client's name, a SYN or a reset,
 * was nothing to it. */
static ALWAYS_INLINE void believe_container(struct flow *flow, const struct service_key *key)
{
	struct port_flows *count;

	if (flow->flags & FLOW_IN_PLACE)
		flow->flags &= ~(FLOW_HALF_OPEN | FLOW_IN_PLACE);
	if (!(flow->flags & FLOW_RESET) ||
	    bpf_ktime_get_coarse_ns() - flow->seen_ns < RESET_TAKES_NS)
		return;
	flow->flags &= ~(FLOW_RESET | FLOW_ENDED);
	count = bpf_map_lookup_elem(&active, key);
	if (count)
		__sync_fetch_and_add(&count->active, 1);
}

/* Whether a packet is the last of a flow of a client on this host: a reset, or the answer to the
 * second FIN. */
static ALWAYS_INLINE int is_last(const struct packet *it, __u16 before)
{
	if (it->protocol != PROTOCOL_TCP)
		return 0;
	if (it->flags & TCP_RST)
		return 1;
	return (before & FLOW_ENDED) && !it->payload &&
	       (it->flags & (TCP_FIN | TCP_SYN | TCP_ACK)) == TCP_ACK;
}

static ALWAYS_INLINE void count_in(const struct service_key *key, const struct packet *it)
{
	struct port_counters *counter = bpf_map_lookup_elem(&counters, key);

	if (counter) {
		counter->packets_in++;
		counter->bytes_in += it->payload;
	}
}

static ALWAYS_INLINE void count_out(const struct service_key *key, const struct packet *it)
{
	struct port_counters *counter = bpf_map_lookup_elem(&counters, key);

	if (counter) {
		counter->packets_out++;
		counter->bytes_out += it->payload;
	}
}

/* A datagram that goes to a container directly: a flow of the same client's port to the same
 * container's is of the past, or its translation would meet the answer. (A TCP flow learns that
 * from the answer to the SYN.) */
static OWN_FRAME int forget_datagrams(const struct packet *it)
{
	struct flow_key flow_key = {};

	name_flow(&flow_key, it->protocol, &it->destination, it->destination_port,
		  &it->source, it->source_port);
	if (bpf_map_lookup_elem(&flows, &flow_key))
		bpf_map_delete_elem(&flows, &flow_key);
	return NEXT;
}

/* Whether a segment without a flow belongs to a connection that was made from here. The answer to its
 * SYN tells; another SYN to here, that there is no such connection any more. */
static OWN_FRAME int was_made_here(const struct packet *it)
{
	struct flow_key key = {};
	__u32 known = 1;

	name_flow(&key, it->protocol, &it->destination, it->destination_port, &it->source,
		  it->source_port);
	if ((it->flags & (TCP_SYN | TCP_ACK)) == (TCP_SYN | TCP_ACK)) {
		bpf_map_update_elem(&outgoing, &key, &known, 0);
		return 1;
	}
	if (!bpf_map_lookup_elem(&outgoing, &key))
		return 0;
	if (!(it->flags & TCP_SYN))
		return 1;
	bpf_map_delete_elem(&outgoing, &key);
	return 0;
}

#endif
