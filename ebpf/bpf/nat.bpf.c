/* The kernel path of service ports: address translation between an uplink and a container's veth.
 *
 * from_uplink    ingress of an uplink: a client's packet for a published port goes straight into
 *                the container, with its destination rewritten and its source as it is.
 * from_container ingress of the host side of a container's veth: the replies of such a flow leave
 *                by the uplink the client came by, with their source rewritten.
 * to_container   egress of the host side of a container's veth: nobody but this host talks to the
 *                ports of the kernel's runner, and the bytes of its clients are counted.
 * sweep          run by the dataplane: removes flows that have ended, are silent or have lost
 *                their row, and counts those that live.
 *
 * Whatever is not clearly ours goes on to the next program and then the stack, where the listener
 * of the relay waits: IP options, VLAN tags, other protocols, other addresses, clients outside the
 * row's networks or without a route back, ports at their limit. A TCP flow starts with a SYN. A later
 * segment without an entry belongs to a socket of this host if there is one, or to a connection that was
 * made from here by somebody whom the host masquerades, else its entry was lost and is made again from
 * the row. Fragments follow the first of their datagram, ICMP errors the flow that they tell of. A
 * container whose veth is gone gets nothing: the redirect drops. Answers to this host's own clients
 * bypass the bridge's code.
 */
#include "kernel.h"
#include "maps.h"
#include "packet.h"
#include "policy.h"
#include "records.h"
#include "translate.h"

struct {
	MAP_UINT(type, MAP_LRU_HASH);
	MAP_UINT(max_entries, 131072);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, struct flow_key);
	MAP_TYPE(value, struct flow);
} flows SEC(".maps");

struct {
	MAP_UINT(type, MAP_LRU_HASH);
	MAP_UINT(max_entries, 16384);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, struct fragment_key);
	MAP_TYPE(value, struct fragment);
} fragments SEC(".maps");

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

/* Uplinks and the largest packets they take. */
struct {
	MAP_UINT(type, MAP_HASH);
	MAP_UINT(max_entries, 1024);
	MAP_UINT(map_flags, MAP_NO_PREALLOC);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, __u32);
} uplinks SEC(".maps");

/* Networks that routes lead to, by uplink. Answers leave by the uplink that the client came in by:
 * where no route leads back by it, they would be lost. */
struct {
	MAP_UINT(type, MAP_PREFIXES);
	MAP_UINT(max_entries, 65536);
	MAP_UINT(map_flags, MAP_NO_PREALLOC);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, struct way_back);
	MAP_TYPE(value, __u32);
} ways_back SEC(".maps");

struct {
	MAP_UINT(type, MAP_ARRAY);
	MAP_UINT(max_entries, 1);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, struct sweep_order);
} orders SEC(".maps");

/* By the number of the host's end, which does not count what is put into the other one. The
 * dataplane makes the entries and takes those of links that are gone away. */
struct {
	MAP_UINT(type, MAP_PERCPU_HASH);
	MAP_UINT(max_entries, 16384);
	MAP_UINT(map_flags, MAP_NO_PREALLOC);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, struct delivered);
} delivered SEC(".maps");

/* Flows of clients on this host that have found a place here; the others are in `flows`. */
struct {
	MAP_UINT(type, MAP_ARRAY);
	MAP_UINT(max_entries, LOCAL_FLOWS);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, struct local_flow);
} local_flows SEC(".maps");

/* The bridges of containers' links, by the number of the host's end. */
struct {
	MAP_UINT(type, MAP_HASH);
	MAP_UINT(max_entries, 16384);
	MAP_UINT(map_flags, MAP_NO_PREALLOC);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, struct bridge);
} bridges SEC(".maps");

/* So long receivers wait for the rest of a datagram. */
#define FRAGMENT_LIFE_NS 30000000000ULL

/* Nobody but this host: the agent speaks to the runner here. */
#define RUNNER_FIRST_PORT 2000
#define RUNNER_LAST_PORT 2001

/* Headers of IPv6 that may stand before the transport's. */
#define MOST_HEADERS 4

/* Whether a socket of this host takes the segment: a session of the relay, for one. */
static ALWAYS_INLINE int has_socket(struct __sk_buff *skb, const struct packet *it)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sock;
	__u32 state;

	if (it->ipv4) {
		tuple.ipv4.saddr = it->source.word[3];
		tuple.ipv4.daddr = it->destination.word[3];
		tuple.ipv4.sport = it->source_port;
		tuple.ipv4.dport = it->destination_port;
		sock = bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), THIS_NAMESPACE, 0);
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, &it->source, 16);
		__builtin_memcpy(tuple.ipv6.daddr, &it->destination, 16);
		tuple.ipv6.sport = it->source_port;
		tuple.ipv6.dport = it->destination_port;
		sock = bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), THIS_NAMESPACE, 0);
	}
	if (!sock)
		return 0;
	state = sock->state;
	bpf_sk_release(sock);
	if (state == SOCKET_LISTEN)
		return 0;
	/* A new connection may take the place of one that waits for its last segments to die out. */
	return !(state == SOCKET_TIME_WAIT && (it->flags & TCP_SYN));
}

/* What comes from there gets no answer: an address of a link is nobody's on the container's, those of
 * the loopback and of groups are no sender's. 127/8, 224/4; ::1, fe80::/10, ff00::/8. */
static ALWAYS_INLINE int is_unanswerable(const struct address *it)
{
	const __u8 *byte = (const __u8 *)it;

	if (is_ipv4(it))
		return byte[12] == 127 || (byte[12] & 0xf0) == 0xe0;
	if (!it->word[0] && !it->word[1] && !it->word[2] && it->word[3] == TO_NET32(1))
		return 1;
	return byte[0] == 0xff || (byte[0] == 0xfe && (byte[1] & 0xc0) == 0x80);
}

static ALWAYS_INLINE __u32 mtu_of(__u32 uplink)
{
	__u32 *mtu = bpf_map_lookup_elem(&uplinks, &uplink);

	return mtu ? *mtu : 1280;
}

/* Whether the client's packets may be answered by the interface that they come in by. */
static ALWAYS_INLINE int leads_back(const struct __sk_buff *skb, const struct packet *it)
{
	struct way_back way = {};

	way.bits = WAY_BITS;
	way.uplink = skb->ifindex;
	way.family = it->ipv4 ? 4 : 6;
	way.address = it->source;
	return bpf_map_lookup_elem(&ways_back, &way) != 0;
}

static ALWAYS_INLINE int is_hosts(const struct address *address)
{
	__u32 *what = bpf_map_lookup_elem(&addresses, address);

	return what && *what == ADDRESS_HOST;
}

/* The service that `key` and an address of this host lead to. */
static ALWAYS_INLINE struct service *published(const struct service_key *key,
					       const struct address *host)
{
	struct service *service = bpf_map_lookup_elem(&services, key);

	if (!service || !(service->flags & (SERVICE_REMOTE | SERVICE_REMOTE_OLD)))
		return 0;
	if (!(service->flags & SERVICE_ANY_ADDRESS) && !same(&service->bind, host))
		return 0;
	if (!is_hosts(host))
		return 0;
	/* An IPv6 client of an IPv4 container, or the reverse: the relay's. */
	return is_ipv4(host) == is_ipv4(&service->target) ? service : 0;
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

/* Puts a packet into the container at the other end of a link. */
static ALWAYS_INLINE int deliver(struct __sk_buff *skb, __u32 link)
{
	struct delivered *count = bpf_map_lookup_elem(&delivered, &link);

	if (count) {
		count->packets++;
		count->bytes += skb->len;
	}
	return bpf_redirect_peer(link, 0);
}

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

static ALWAYS_INLINE void name_fragment(const struct packet *it, struct fragment_key *key)
{
	key->source = it->source;
	key->destination = it->destination;
	key->id = it->id;
	key->protocol = it->protocol;
}

/* Lets the other fragments of this datagram follow its first. */
static OWN_FRAME int lead_fragments(const struct packet *it, const struct address *address,
				    __u32 interface, __u32 outwards)
{
	struct fragment_key key = {};
	struct fragment lead = {};

	name_fragment(it, &key);
	lead.seen_ns = bpf_ktime_get_coarse_ns();
	lead.address = *address;
	lead.interface = interface;
	lead.outwards = outwards;
	return bpf_map_update_elem(&fragments, &key, &lead, 0);
}

static OWN_FRAME int follow_fragments(struct __sk_buff *skb, const struct packet *it,
				      __u32 outwards)
{
	struct fragment_key key = {};
	struct fragment *lead;
	struct address address, old;
	__u32 interface;
	int ipv4 = it->ipv4;

	name_fragment(it, &key);
	lead = bpf_map_lookup_elem(&fragments, &key);
	if (!lead || lead->outwards != outwards ||
	    bpf_ktime_get_coarse_ns() - lead->seen_ns > FRAGMENT_LIFE_NS)
		return NEXT;
	address = lead->address;
	interface = lead->interface;
	old = outwards ? it->source : it->destination;
	if (put_address(skb, ipv4, ETH_HEADER, outwards, &old, &address))
		return DROP;
	return outwards ? bpf_redirect_neigh(interface, 0, 0, 0) : deliver(skb, interface);
}

/* A router, or the client, on what a container has sent. */
static OWN_FRAME int error_to_container(struct __sk_buff *skb, const struct packet *error)
{
	struct cause cause = {};
	struct service_key key = {};
	struct flow_key flow_key = {};
	struct service *service;
	struct flow *flow;
	struct exchange exchange = {};
	__u32 link;

	if (read_cause(skb, error, &cause) || !same(&cause.source, &error->destination))
		return NEXT;
	key.port = cause.source_port;
	key.protocol = cause.protocol;
	service = published(&key, &cause.source);
	if (!service)
		return NEXT;
	name_flow(&flow_key, cause.protocol, &service->target, service->target_port,
		  &cause.destination, cause.destination_port);
	flow = bpf_map_lookup_elem(&flows, &flow_key);
	if (!flow || (flow->flags & FLOW_LOCAL) || flow->life != service->life ||
	    flow->host_port != key.port || !same(&flow->host, &cause.source))
		return NEXT;
	exchange.address = service->target;
	exchange.old_port = cause.source_port;
	exchange.port = service->target_port;
	link = service->link_index;
	if (translate_error(skb, error, 0, &exchange))
		return DROP;
	return deliver(skb, link);
}

/* A container on what a client has sent. */
static OWN_FRAME int error_to_client(struct __sk_buff *skb, const struct packet *error)
{
	struct cause cause = {};
	struct flow_key flow_key = {};
	struct flow *flow;
	struct exchange exchange = {};
	__u32 uplink;

	if (read_cause(skb, error, &cause) || !same(&cause.destination, &error->source))
		return NEXT;
	name_flow(&flow_key, cause.protocol, &cause.destination, cause.destination_port,
		  &cause.source, cause.source_port);
	flow = bpf_map_lookup_elem(&flows, &flow_key);
	if (!flow || (flow->flags & FLOW_LOCAL) || flow->link_index != skb->ifindex)
		return NEXT;
	exchange.address = flow->host;
	exchange.old_port = cause.destination_port;
	exchange.port = flow->host_port;
	uplink = flow->uplink;
	if (translate_error(skb, error, 1, &exchange))
		return DROP;
	return bpf_redirect_neigh(uplink, 0, 0, 0);
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

SEC("classifier")
int from_uplink(struct __sk_buff *skb)
{
	struct packet it = {};
	struct service_key key = {};
	struct flow_key flow_key = {};
	struct service *service;
	struct flow *flow;
	int tcp, opening, takes_new;

	/* Sent to another machine's hardware address, and seen here by chance. */
	if (skb->pkt_type != PACKET_HOST)
		return NEXT;
	if (read_packet(skb, &it))
		return NEXT;
	if (it.kind == PACKET_LATER)
		return follow_fragments(skb, &it, 0);
	if (it.kind == PACKET_ERROR)
		return error_to_container(skb, &it);
	tcp = it.protocol == PROTOCOL_TCP;
	key.port = it.destination_port;
	key.protocol = it.protocol;
	service = published(&key, &it.destination);
	if (!service)
		return tcp ? NEXT : forget_datagrams(&it);

	name_flow(&flow_key, it.protocol, &service->target, service->target_port,
		  &it.source, it.source_port);
	flow = bpf_map_lookup_elem(&flows, &flow_key);
	/* Nobody outside has an address of ours. */
	if (flow && (flow->flags & FLOW_LOCAL))
		return NEXT;
	if (flow && (flow->life != service->life || flow->host_port != it.destination_port ||
		     !same(&flow->host, &it.destination))) {
		/* The same client port leads to this container by another of its ports or addresses. */
		if (!(flow->flags & FLOW_ENDED) && flow->host_port != key.port)
			return NEXT;
		if (!(flow->flags & FLOW_ENDED) && flow->life == service->life)
			return NEXT;
		flow = 0;
	}

	opening = tcp ? (it.flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN : !flow;
	if (opening && flow && (flow->flags & FLOW_ENDED)) {
		/* Whoever takes the new one: nothing of it may meet this entry. */
		bpf_map_delete_elem(&flows, &flow_key);
		flow = 0;
	}
	takes_new = (service->flags & (SERVICE_DRAINING | SERVICE_REMOTE)) == SERVICE_REMOTE;
	if (opening && flow && (flow->first_sequence == it.sequence || !takes_new ||
				(flow->uplink != skb->ifindex && !leads_back(skb, &it)))) {
		/* The SYN once more. Or the client has forgotten a flow that could not be begun now, or a
		 * stranger says so, perhaps from where the client can't be. The container knows: if it has
		 * the connection, its answer has the client end that; if it has not, its answer to another
		 * SYN than the flow's ends the flow and leads nowhere. The client's next SYN is the
		 * listener's. */
	} else if (opening || !flow) {
		struct port_flows *count;
		struct port_counters *counter;
		struct flow fresh = {};
		__u16 in_place = 0;

		if (!opening && (it.flags & TCP_SYN) && was_made_here(&it))
			return NEXT;
		if (!takes_new)
			return NEXT;
		if (!opening && (it.flags & (TCP_SYN | TCP_RST | TCP_ACK)) != TCP_ACK)
			return NEXT;
		if (!is_allowed(service, &it.source))
			return NEXT;
		if (is_unanswerable(&it.source))
			return NEXT;
		/* Nobody outside has an address of ours, and containers belong to the listener. */
		if (bpf_map_lookup_elem(&addresses, &it.source))
			return NEXT;
		/* The stack knows by where an answer goes, and the listener's goes there. Nothing of the new
		 * connection may meet what is left of an old one. */
		if (!leads_back(skb, &it)) {
			if (flow) {
				end_flow(flow, &key);
				bpf_map_delete_elem(&flows, &flow_key);
			}
			return NEXT;
		}
		if (tcp && (was_made_here(&it) || has_socket(skb, &it)))
			return NEXT;
		count = bpf_map_lookup_elem(&active, &key);
		/* Every service is given its count before it is put up. */
		if (!count)
			return NEXT;
		if (opening && !has_room(service, count))
			return NEXT;
		if (opening && !is_on_time(service, count)) {
			count_refused(&key);
			return DROP;
		}
		if (flow) {
			if ((flow->flags & (FLOW_ANSWERED | FLOW_HALF_OPEN)) == FLOW_ANSWERED ||
			    (flow->flags & FLOW_IN_PLACE))
				in_place = FLOW_IN_PLACE;
			end_flow(flow, &key);
		}
		fresh.host = it.destination;
		fresh.first_sequence = it.sequence;
		fresh.uplink = skb->ifindex;
		fresh.mtu = mtu_of(skb->ifindex);
		fresh.link_index = service->link_index;
		fresh.life = service->life;
		fresh.host_port = it.destination_port;
		if (!opening)
			fresh.flags = FLOW_REBUILT;
		else if (tcp)
			fresh.flags = FLOW_HALF_OPEN | in_place;
		fresh.seen_ns = bpf_ktime_get_coarse_ns();
		if (bpf_map_update_elem(&flows, &flow_key, &fresh, 0))
			return NEXT;
		__sync_fetch_and_add(&count->active, 1);
		flow = bpf_map_lookup_elem(&flows, &flow_key);
		if (!flow)
			return NEXT;
		counter = opening ? bpf_map_lookup_elem(&counters, &key) : 0;
		if (counter)
			counter->flows++;
	}

	/* Of a flow that the client has reset: when that was. */
	if (!(flow->flags & FLOW_RESET))
		flow->seen_ns = bpf_ktime_get_coarse_ns();
	if (flow->uplink != skb->ifindex && leads_back(skb, &it)) {
		flow->uplink = skb->ifindex;
		flow->mtu = mtu_of(skb->ifindex);
	}
	if (tcp) {
		if ((flow->flags & (FLOW_HALF_OPEN | FLOW_ANSWERED)) ==
			    (FLOW_HALF_OPEN | FLOW_ANSWERED) &&
		    (it.flags & (TCP_SYN | TCP_ACK)) == TCP_ACK)
			flow->flags &= ~FLOW_HALF_OPEN;
		follow(flow, &key, it.flags, FLOW_FIN_IN);
	}
	count_in(&key, &it);
	__u32 link = service->link_index;
	struct address target = service->target;
	if (it.kind == PACKET_FIRST && lead_fragments(&it, &target, link, 0))
		return NEXT;
	if (translate(skb, &it, 0, &target, flow_key.container_port))
		return NEXT;
	return deliver(skb, link);
}

/* In units of 17 s: well before a bridge forgets (300 s by default). */
#define LEARNS_AFTER 7

/* Puts what a container sends to this host into the bridge's interface, past the code that looks for the
 * member to pass it on to. Now and then a packet goes the long way: the bridge would forget where the
 * container is and pass what is for it to all members. That packet overtakes those before it, so it is
 * the first of a connection where one begins in time. */
static ALWAYS_INLINE int hand_to_host(struct __sk_buff *skb, const struct packet *it)
{
	__u32 link = skb->ifindex;
	struct bridge *bridge = bpf_map_lookup_elem(&bridges, &link);
	__u32 now = bpf_ktime_get_coarse_ns() >> 34;
	__u16 *to;

	if (!bridge)
		return NEXT;
	if (it->flags & TCP_SYN ? bridge->learnt != now : now - bridge->learnt > LEARNS_AFTER) {
		bridge->learnt = now;
		return NEXT;
	}
	/* To another one's hardware address: a router's, maybe. */
	to = header(skb, 0, ETH_HEADER);
	if (!to || to[0] != bridge->address[0] || to[1] != bridge->address[1] ||
	    to[2] != bridge->address[2])
		return NEXT;
	return bpf_redirect(bridge->index, INTO_INTERFACE);
}

SEC("classifier")
int from_container(struct __sk_buff *skb)
{
	struct packet it = {};
	struct flow_key flow_key = {};
	struct service_key key = {};
	struct flow *flow;

	/* The frame is for the bridge's hardware address, which is another than this interface's. */
	if (read_packet(skb, &it))
		return NEXT;
	if (it.kind == PACKET_LATER)
		return follow_fragments(skb, &it, 1);
	if (it.kind == PACKET_ERROR)
		return error_to_client(skb, &it);
	name_flow(&flow_key, it.protocol, &it.source, it.source_port,
		  &it.destination, it.destination_port);
	flow = find_flow(&flow_key);
	if (!flow || flow->link_index != skb->ifindex)
		return NEXT;
	key.port = flow->host_port;
	key.protocol = it.protocol;
	if (flow->flags & FLOW_LOCAL) {
		__u16 before = flow->flags;

		flow->seen_ns = 0;
		if (!(before & FLOW_ANSWERED))
			flow->flags |= FLOW_ANSWERED;
		if (it.protocol == PROTOCOL_TCP)
			follow(flow, &key, it.flags, FLOW_FIN_OUT);
		count_out(&key, &it);
		/* Nothing is to be translated any more: its place is soon another's, and still warm. */
		if (is_last(&it, before))
			forget_local(&flow_key);
		/* Fragments stay together. */
		return it.kind == PACKET_WHOLE ? hand_to_host(skb, &it) : NEXT;
	}
	/* The answer to another SYN than ours: the client's port was used again for a connection that
	 * goes to the container directly. */
	if (it.protocol == PROTOCOL_TCP && (it.flags & TCP_SYN) &&
	    ((flow->flags & FLOW_REBUILT) || !(it.flags & TCP_ACK) ||
	     TO_NET32(it.acknowledged) != TO_NET32(flow->first_sequence) + 1)) {
		end_flow(flow, &key);
		bpf_map_delete_elem(&flows, &flow_key);
		return NEXT;
	}
	/* Too large for the way out: the stack, which forwards it no more than we can, tells the
	 * container how much would do. */
	__u32 length = skb->gso_size ? skb->gso_size + it.headers : skb->len - ETH_HEADER;
	if (length > flow->mtu)
		return NEXT;

	if (it.protocol != PROTOCOL_TCP || !(it.flags & (TCP_SYN | TCP_RST)))
		believe_container(flow, &key);
	if (!(flow->flags & FLOW_RESET))
		flow->seen_ns = bpf_ktime_get_coarse_ns();
	if (!(flow->flags & FLOW_ANSWERED))
		flow->flags |= FLOW_ANSWERED;
	if (it.protocol == PROTOCOL_TCP)
		follow(flow, &key, it.flags, FLOW_FIN_OUT);
	count_out(&key, &it);
	__u32 uplink = flow->uplink;
	__u16 port = flow->host_port;
	struct address host = flow->host;
	if (it.kind == PACKET_FIRST && lead_fragments(&it, &host, uplink, 1))
		return DROP;
	if (translate(skb, &it, 1, &host, port))
		return DROP;
	return bpf_redirect_neigh(uplink, 0, 0, 0);
}

/* Where the TCP header begins; 0 when there is none, -1 when it can't be told. */
static ALWAYS_INLINE int find_tcp(struct __sk_buff *skb)
{
	__u32 at, i;
	__u8 next;

	if (skb->protocol == TO_NET16(ETH_IPV4)) {
		struct ipv4_header *ip = header(skb, ETH_HEADER, sizeof(*ip));

		if (!ip)
			return -1;
		if (ip->protocol != PROTOCOL_TCP || (ip->fragment & TO_NET16(0x1fff)))
			return 0;
		return ETH_HEADER + (ip->version_length & 15) * 4;
	}
	/* A frame's first tag was taken out of its bytes when it came in: this is a second one. The
	 * container's kernel takes those without a VLAN's number out too, and reads what is behind them. */
	if (skb->protocol == TO_NET16(ETH_TAG) || skb->protocol == TO_NET16(ETH_SERVICE_TAG))
		return -1;
	if (skb->protocol != TO_NET16(ETH_IPV6))
		return 0;
	struct ipv6_header *ip = header(skb, ETH_HEADER, sizeof(*ip));
	if (!ip)
		return -1;
	next = ip->next;
	at = ETH_HEADER + sizeof(*ip);
#pragma unroll
	for (i = 0; i < MOST_HEADERS; i++) {
		__u8 head[4];

		if (next == PROTOCOL_TCP)
			return at;
		/* Hop-by-hop, routing, destination options; fragment. */
		if (next != 0 && next != 43 && next != 60 && next != PROTOCOL_FRAGMENT)
			return 0;
		if (bpf_skb_load_bytes(skb, at, head, sizeof(head)))
			return -1;
		if (next == PROTOCOL_FRAGMENT && (head[2] || (head[3] & 0xf8)))
			return 0;
		at += next == PROTOCOL_FRAGMENT ? 8 : (head[1] + 1) * 8;
		next = head[0];
	}
	return -1;
}

/* The flow of a socket of this host that was led to a container; none for any other. */
static OWN_FRAME struct flow *note_local(struct __sk_buff *skb, const struct flow_key *flow_key,
					 __u64 cookie)
{
	struct service_key key = {};
	struct service *service;
	struct flow fresh = {};

	key.protocol = flow_key->protocol;
	if (key.protocol == PROTOCOL_TCP) {
		struct led_socket *led = find_led(cookie);

		if (!led)
			return 0;
		key.port = led->host_port;
		fresh.host = led->host;
		fresh.life = led->life;
	} else {
		struct led_peer_key peer_key = {};
		struct led_peer *peer;

		peer_key.cookie = cookie;
		peer_key.container = flow_key->container;
		peer_key.container_port = flow_key->container_port;
		peer = bpf_map_lookup_elem(&led_peers, &peer_key);
		if (!peer)
			return 0;
		key.port = peer->host_port;
		fresh.host = peer->host;
	}
	service = bpf_map_lookup_elem(&services, &key);
	if (!service || service->link_index != skb->ifindex ||
	    service->target_port != flow_key->container_port ||
	    !same(&service->target, &flow_key->container))
		return 0;
	if (key.protocol != PROTOCOL_TCP)
		fresh.life = service->life;
	else if (fresh.life != service->life)
		return 0;
	fresh.first_sequence = cookie;
	fresh.cookie_above = cookie >> 32;
	fresh.link_index = skb->ifindex;
	fresh.host_port = key.port;
	fresh.flags = FLOW_LOCAL;
	return put_local(flow_key, &fresh);
}

/* What a socket of this host sends to a container that it was led to. */
static ALWAYS_INLINE int count_local(struct __sk_buff *skb)
{
	struct packet it = {};
	struct flow_key flow_key = {};
	struct service_key key = {};
	struct flow *flow;
	__u64 cookie;

	if (read_packet(skb, &it) || it.kind > PACKET_FIRST)
		return NEXT;
	name_flow(&flow_key, it.protocol, &it.destination, it.destination_port,
		  &it.source, it.source_port);
	flow = find_flow(&flow_key);
	if (flow && !(flow->flags & FLOW_LOCAL))
		return NEXT;
	/* A connection begins with a SYN, and its last segments are sent by no socket. */
	cookie = flow && it.protocol == PROTOCOL_TCP && !(it.flags & TCP_SYN) ?
			 0 : bpf_get_socket_cookie(skb);
	if (cookie && (!flow || flow->first_sequence != (__u32)cookie)) {
		/* The port was used again, maybe for a connection that goes to the container directly. */
		if (flow)
			forget_local(&flow_key);
		flow = note_local(skb, &flow_key, cookie);
	}
	if (!flow)
		return NEXT;
	__u16 before = flow->flags;

	key.port = flow->host_port;
	key.protocol = it.protocol;
	flow->seen_ns = 0;
	if (it.protocol == PROTOCOL_TCP)
		follow(flow, &key, it.flags, FLOW_FIN_IN);
	count_in(&key, &it);
	if (is_last(&it, before))
		forget_local(&flow_key);
	return NEXT;
}

SEC("classifier")
int to_container(struct __sk_buff *skb)
{
	__u16 ports[2];
	int at;

	/* What this host sends has come in by no interface. */
	if (!skb->ingress_ifindex)
		return count_local(skb);
	at = find_tcp(skb);
	if (!at)
		return NEXT;
	if (at < 0 || bpf_skb_load_bytes(skb, at, ports, sizeof(ports)))
		return DROP;
	__u16 port = TO_NET16(ports[1]);
	return port >= RUNNER_FIRST_PORT && port <= RUNNER_LAST_PORT ? DROP : NEXT;
}

struct sweep_context {
	__u64 now;
	struct sweep_order order;
};

static ALWAYS_INLINE struct port_flows *counted(const struct service_key *key, __u32 pass)
{
	struct port_flows *count = bpf_map_lookup_elem(&active, key);

	if (count && count->pass != pass) {
		count->pass = pass;
		count->counted = 0;
	}
	return count;
}

/* Whether a flow has ended, is silent or has lost its row. */
static ALWAYS_INLINE int is_over(const struct service_key *key, const struct address *client,
				 struct flow *flow, const struct sweep_context *context)
{
	struct service *service = bpf_map_lookup_elem(&services, key);
	__u64 limit, age;
	int tcp = key->protocol == PROTOCOL_TCP;

	/* Clients of other hosts have lost it altogether, or this one has. */
	if (service && !(flow->flags & FLOW_LOCAL) &&
	    (!(service->flags & (SERVICE_REMOTE | SERVICE_REMOTE_OLD)) ||
	     !is_allowed(service, client)))
		return 1;
	if (!flow->seen_ns)
		flow->seen_ns = context->now;
	age = context->now > flow->seen_ns ? context->now - flow->seen_ns : 0;
	if (flow->flags & FLOW_ENDED)
		limit = context->order.ended_ns;
	else if (!tcp)
		limit = flow->flags & FLOW_ANSWERED ? context->order.datagram_idle_ns :
						      context->order.datagram_opening_ns;
	else if (!(flow->flags & (FLOW_ANSWERED | FLOW_REBUILT)) || (flow->flags & FLOW_HALF_OPEN))
		limit = context->order.opening_ns;
	/* The client may only listen, or be nobody. */
	else if (!(flow->flags & FLOW_ANSWERED) || (flow->flags & (FLOW_FIN_IN | FLOW_FIN_OUT)))
		limit = (__u64)context->order.closing_s * 1000000000ULL;
	else
		limit = context->order.idle_ns;
	return !service || service->life != flow->life || age > limit;
}

static long sweep_flow(void *map, const struct flow_key *at, struct flow *flow,
		       struct sweep_context *context)
{
	struct flow_key flow_key = *at;
	struct service_key key = {};
	struct port_flows *count;

	key.port = flow->host_port;
	key.protocol = flow_key.protocol;
	if (is_over(&key, &flow_key.client, flow, context)) {
		bpf_map_delete_elem(map, &flow_key);
		return 0;
	}
	if (flow->flags & (FLOW_ENDED | FLOW_LOCAL))
		return 0;
	/* Somebody may have changed it. */
	flow->mtu = mtu_of(flow->uplink);
	count = counted(&key, context->order.pass);
	if (count)
		count->counted++;
	return 0;
}

static long sweep_local(void *map, const __u32 *at, struct local_flow *local,
			struct sweep_context *context)
{
	struct service_key key = {};

	(void)map;
	(void)at;
	if (local->taken != LOCAL_THERE)
		return 0;
	key.port = local->flow.host_port;
	key.protocol = local->key.protocol;
	if (is_over(&key, &local->key.client, &local->flow, context))
		local->taken = 0;
	return 0;
}

static long sweep_port(void *map, const struct service_key *at, struct port_flows *count,
		       struct sweep_context *context)
{
	__s64 flows = count->pass == context->order.pass ? count->counted : 0;
	__s64 wrong = count->active - flows;

	(void)map;
	(void)at;
	/* Flows pushed out by newer ones, or by a race of two processors. */
	if (wrong)
		__sync_fetch_and_add(&count->active, -wrong);
	return 0;
}

SEC("classifier")
int sweep(struct __sk_buff *skb)
{
	struct sweep_context context = {};
	__u32 zero = 0;
	struct sweep_order *order = bpf_map_lookup_elem(&orders, &zero);

	(void)skb;
	if (!order)
		return 1;
	context.order = *order;
	context.now = bpf_ktime_get_coarse_ns();
	bpf_for_each_map_elem(&flows, sweep_flow, &context, 0);
	bpf_for_each_map_elem(&local_flows, sweep_local, &context, 0);
	bpf_for_each_map_elem(&active, sweep_port, &context, 0);
	return 0;
}

/* Nothing that the kernel lends to GPL programs only is used. */
char program_license[] SEC("license") = "LGPL-3.0-or-later";
