/* The kernel path of service ports: address translation between an uplink and a container's veth.
 *
 * from_uplink    ingress of an uplink: a client's segment for a published port goes straight into
 *                the container, with its destination rewritten and its source as it is.
 * from_container ingress of the host side of a container's veth: the replies of such a flow leave
 *                by the uplink the client came by, with their source rewritten.
 * sweep          run by the dataplane: removes flows that have ended, are silent or have lost
 *                their row, and counts those that live.
 *
 * Whatever is not clearly ours goes on to the next program and then the stack, where the listener
 * of the relay waits: fragments, IP options, VLAN tags, other protocols, other addresses, clients
 * outside the row's networks, ports at their limit. A flow starts with a SYN. A later segment
 * without an entry belongs to a socket of this host if there is one, else its entry was lost and is
 * made again from the row. A container whose veth is gone gets nothing: the redirect drops.
 */
#include "kernel.h"
#include "records.h"

struct {
	MAP_UINT(type, MAP_HASH);
	MAP_UINT(max_entries, 16384);
	MAP_UINT(map_flags, MAP_NO_PREALLOC);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, struct service_key);
	MAP_TYPE(value, struct service);
} services SEC(".maps");

struct {
	MAP_UINT(type, MAP_LRU_HASH);
	MAP_UINT(max_entries, 131072);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, struct flow_key);
	MAP_TYPE(value, struct flow);
} flows SEC(".maps");

/* Addresses of this host. */
struct {
	MAP_UINT(type, MAP_HASH);
	MAP_UINT(max_entries, 4096);
	MAP_UINT(map_flags, MAP_NO_PREALLOC);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, struct address);
	MAP_TYPE(value, __u32);
} addresses SEC(".maps");

struct {
	MAP_UINT(type, MAP_PERCPU_HASH);
	MAP_UINT(max_entries, 16384);
	MAP_UINT(map_flags, MAP_NO_PREALLOC);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, struct service_key);
	MAP_TYPE(value, struct port_counters);
} counters SEC(".maps");

struct {
	MAP_UINT(type, MAP_HASH);
	MAP_UINT(max_entries, 16384);
	MAP_UINT(map_flags, MAP_NO_PREALLOC);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, struct service_key);
	MAP_TYPE(value, struct port_flows);
} active SEC(".maps");

struct {
	MAP_UINT(type, MAP_ARRAY);
	MAP_UINT(max_entries, 1);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, struct sweep_order);
} orders SEC(".maps");

struct segment {
	struct address source;
	struct address destination;
	__u32 sequence;
	__u32 acknowledged;
	__u32 payload;
	__u32 transport;
	__u16 source_port;
	__u16 destination_port;
	__u8 flags;
	__u8 ipv4;
};

static ALWAYS_INLINE int same(const struct address *a, const struct address *b)
{
	return a->word[0] == b->word[0] && a->word[1] == b->word[1] && a->word[2] == b->word[2] &&
	       a->word[3] == b->word[3];
}

static ALWAYS_INLINE void map_ipv4(struct address *to, __u32 from)
{
	to->word[0] = 0;
	to->word[1] = 0;
	to->word[2] = TO_NET32(0xffff);
	to->word[3] = from;
}

/* Reads a whole TCP segment's headers; 0 when it is one that these programs handle. */
static ALWAYS_INLINE int read_segment(struct __sk_buff *skb, struct segment *it)
{
	int ipv4 = skb->protocol == TO_NET16(ETH_IPV4);
	__u32 network, need;

	if (!ipv4 && skb->protocol != TO_NET16(ETH_IPV6))
		return -1;
	/* With hardware or GRO stripping the tag is not in the bytes: another interface's packet. */
	if (skb->vlan_present)
		return -1;
	network = ipv4 ? sizeof(struct ipv4_header) : sizeof(struct ipv6_header);
	need = ETH_HEADER + network + sizeof(struct tcp_header);

	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	if (data + need > end) {
		if (bpf_skb_pull_data(skb, need))
			return -1;
		data = (void *)(long)skb->data;
		end = (void *)(long)skb->data_end;
	}

	__u32 total = skb->len - ETH_HEADER;
	struct tcp_header *tcp;
	if (ipv4) {
		struct ipv4_header *ip = data + ETH_HEADER;
		tcp = (void *)(ip + 1);
		if ((void *)(tcp + 1) > end)
			return -1;
		/* Options, or a fragment of something larger. */
		if (ip->version_length != 0x45 || ip->protocol != PROTOCOL_TCP ||
		    (ip->fragment & TO_NET16(0x3fff)))
			return -1;
		map_ipv4(&it->source, ip->source);
		map_ipv4(&it->destination, ip->destination);
		/* Short frames are padded; only very large ones say 0. */
		if (ip->total_length)
			total = TO_NET16(ip->total_length);
	} else {
		struct ipv6_header *ip = data + ETH_HEADER;
		tcp = (void *)(ip + 1);
		if ((void *)(tcp + 1) > end)
			return -1;
		if (ip->next != PROTOCOL_TCP)
			return -1;
		__builtin_memcpy(&it->source, ip->source, sizeof(it->source));
		__builtin_memcpy(&it->destination, ip->destination, sizeof(it->destination));
		if (ip->payload_length)
			total = TO_NET16(ip->payload_length) + sizeof(struct ipv6_header);
	}
	it->ipv4 = ipv4;
	it->transport = ETH_HEADER + network;
	it->source_port = tcp->source;
	it->destination_port = tcp->destination;
	it->sequence = tcp->sequence;
	it->acknowledged = tcp->acknowledged;
	it->flags = tcp->flags;
	__u32 headers = network + (tcp->offset >> 4) * 4;
	it->payload = total > headers ? total - headers : 0;
	return 0;
}

/* Replaces one address and one port of the segment and mends the sums. `source` tells which. */
static ALWAYS_INLINE int rewrite(struct __sk_buff *skb, const struct segment *it, int source,
				 struct address *address, __u16 port)
{
	const struct address *old = source ? &it->source : &it->destination;
	__u16 old_port = source ? it->source_port : it->destination_port;
	__u32 sum = it->transport + __builtin_offsetof(struct tcp_header, checksum);
	__u32 port_at = it->transport + (source ? __builtin_offsetof(struct tcp_header, source)
						: __builtin_offsetof(struct tcp_header, destination));

	if (it->ipv4) {
		__u32 at = ETH_HEADER + (source ? __builtin_offsetof(struct ipv4_header, source)
						: __builtin_offsetof(struct ipv4_header, destination));
		__u32 from = old->word[3], to = address->word[3];
		if (bpf_l4_csum_replace(skb, sum, from, to, SUM_PSEUDO_HEADER | 4))
			return -1;
		if (bpf_l3_csum_replace(skb, ETH_HEADER + __builtin_offsetof(struct ipv4_header, checksum),
					from, to, 4))
			return -1;
		if (bpf_skb_store_bytes(skb, at, &to, sizeof(to), 0))
			return -1;
	} else {
		__u32 at = ETH_HEADER + (source ? __builtin_offsetof(struct ipv6_header, source)
						: __builtin_offsetof(struct ipv6_header, destination));
		__s64 change = bpf_csum_diff((__u32 *)old->word, 16, address->word, 16, 0);
		if (change < 0)
			return -1;
		if (bpf_l4_csum_replace(skb, sum, 0, change, SUM_PSEUDO_HEADER | SUM_IPV6) &&
		    bpf_l4_csum_replace(skb, sum, 0, change, SUM_PSEUDO_HEADER))
			return -1;
		if (bpf_skb_store_bytes(skb, at, address, sizeof(*address), 0))
			return -1;
	}
	if (bpf_l4_csum_replace(skb, sum, old_port, port, 2))
		return -1;
	return bpf_skb_store_bytes(skb, port_at, &port, sizeof(port), 0) ? -1 : 0;
}

/* Whether a socket of this host takes the segment: a session of the relay, for one. */
static ALWAYS_INLINE int has_socket(struct __sk_buff *skb, const struct segment *it)
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

static ALWAYS_INLINE int is_allowed(const struct service *service, const struct address *client)
{
	__u32 i;

	if (!service->networks)
		return 1;
#pragma unroll
	for (i = 0; i < CLIENT_NETWORKS; i++) {
		const struct client_network *network = &service->network[i];
		if (i < service->networks &&
		    !((client->word[0] ^ network->address.word[0]) & network->mask.word[0]) &&
		    !((client->word[1] ^ network->address.word[1]) & network->mask.word[1]) &&
		    !((client->word[2] ^ network->address.word[2]) & network->mask.word[2]) &&
		    !((client->word[3] ^ network->address.word[3]) & network->mask.word[3]))
			return 1;
	}
	return 0;
}

static ALWAYS_INLINE void end_flow(struct flow *flow, const struct service_key *key)
{
	struct port_flows *count;

	if (flow->flags & FLOW_ENDED)
		return;
	flow->flags |= FLOW_ENDED;
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

SEC("classifier")
int from_uplink(struct __sk_buff *skb)
{
	struct segment it = {};
	struct service_key key = {};
	struct flow_key flow_key = {};
	struct service *service;
	struct flow *flow;
	int opening;

	/* Sent to another machine's hardware address, and seen here by chance. */
	if (skb->pkt_type != PACKET_HOST)
		return NEXT;
	if (read_segment(skb, &it))
		return NEXT;
	key.port = it.destination_port;
	key.protocol = PROTOCOL_TCP;
	service = bpf_map_lookup_elem(&services, &key);
	if (!service)
		return NEXT;
	if (service->flags & SERVICE_ANY_ADDRESS) {
		if (!bpf_map_lookup_elem(&addresses, &it.destination))
			return NEXT;
	} else if (!same(&service->bind, &it.destination) ||
		   !bpf_map_lookup_elem(&addresses, &it.destination)) {
		return NEXT;
	}
	/* An IPv6 client of an IPv4 container, or the reverse: the relay's. */
	if (it.ipv4 != (service->target.word[2] == TO_NET32(0xffff) && !service->target.word[0] &&
			!service->target.word[1]))
		return NEXT;

	flow_key.container = service->target;
	flow_key.client = it.source;
	flow_key.container_port = service->target_port;
	flow_key.client_port = it.source_port;
	flow_key.protocol = PROTOCOL_TCP;
	flow = bpf_map_lookup_elem(&flows, &flow_key);
	if (flow && (flow->life != service->life || flow->host_port != it.destination_port ||
		     !same(&flow->host, &it.destination))) {
		/* The same client port leads to this container by another of its ports or addresses. */
		if (!(flow->flags & FLOW_ENDED) && flow->host_port != key.port)
			return NEXT;
		if (!(flow->flags & FLOW_ENDED) && flow->life == service->life)
			return NEXT;
		flow = 0;
	}

	opening = (it.flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN;
	if (opening && flow && !(flow->flags & FLOW_ENDED) && flow->first_sequence == it.sequence) {
		/* The SYN once more. */
	} else if (opening || !flow) {
		struct port_flows *count;
		struct port_counters *counter;
		struct flow fresh = {};

		if (service->flags & SERVICE_DRAINING)
			return NEXT;
		if (!opening && (it.flags & (TCP_SYN | TCP_RST | TCP_ACK)) != TCP_ACK)
			return NEXT;
		if (!is_allowed(service, &it.source))
			return NEXT;
		/* Nobody outside has an address of ours. */
		if (bpf_map_lookup_elem(&addresses, &it.source))
			return NEXT;
		if (has_socket(skb, &it))
			return NEXT;
		count = bpf_map_lookup_elem(&active, &key);
		/* Every service is given its count before it is put up. */
		if (!count)
			return NEXT;
		if (opening && service->max_flows && count->active >= service->max_flows)
			return NEXT;
		if (flow)
			end_flow(flow, &key);
		fresh.host = it.destination;
		fresh.first_sequence = it.sequence;
		fresh.uplink = skb->ifindex;
		fresh.link_index = service->link_index;
		fresh.life = service->life;
		fresh.host_port = it.destination_port;
		fresh.flags = opening ? 0 : FLOW_REBUILT | FLOW_ANSWERED;
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

	flow->seen_ns = bpf_ktime_get_coarse_ns();
	if (flow->uplink != skb->ifindex)
		flow->uplink = skb->ifindex;
	follow(flow, &key, it.flags, FLOW_FIN_IN);
	struct port_counters *counter = bpf_map_lookup_elem(&counters, &key);
	if (counter) {
		counter->packets_in++;
		counter->bytes_in += it.payload;
	}
	__u32 link = service->link_index;
	struct address target = service->target;
	if (rewrite(skb, &it, 0, &target, flow_key.container_port))
		return NEXT;
	return bpf_redirect_peer(link, 0);
}

SEC("classifier")
int from_container(struct __sk_buff *skb)
{
	struct segment it = {};
	struct flow_key flow_key = {};
	struct service_key key = {};
	struct flow *flow;

	/* The frame is for the bridge's hardware address, which is another than this interface's. */
	if (read_segment(skb, &it))
		return NEXT;
	flow_key.container = it.source;
	flow_key.client = it.destination;
	flow_key.container_port = it.source_port;
	flow_key.client_port = it.destination_port;
	flow_key.protocol = PROTOCOL_TCP;
	flow = bpf_map_lookup_elem(&flows, &flow_key);
	if (!flow || flow->link_index != skb->ifindex)
		return NEXT;
	key.port = flow->host_port;
	key.protocol = PROTOCOL_TCP;
	/* The answer to another SYN than ours: the client's port was used again for a connection that
	 * goes to the container directly. */
	if ((it.flags & TCP_SYN) &&
	    ((flow->flags & FLOW_REBUILT) || !(it.flags & TCP_ACK) ||
	     TO_NET32(it.acknowledged) != TO_NET32(flow->first_sequence) + 1)) {
		end_flow(flow, &key);
		bpf_map_delete_elem(&flows, &flow_key);
		return NEXT;
	}

	flow->seen_ns = bpf_ktime_get_coarse_ns();
	if (!(flow->flags & FLOW_ANSWERED))
		flow->flags |= FLOW_ANSWERED;
	follow(flow, &key, it.flags, FLOW_FIN_OUT);
	struct port_counters *counter = bpf_map_lookup_elem(&counters, &key);
	if (counter) {
		counter->packets_out++;
		counter->bytes_out += it.payload;
	}
	__u32 uplink = flow->uplink;
	__u16 port = flow->host_port;
	struct address host = flow->host;
	if (rewrite(skb, &it, 1, &host, port))
		return NEXT;
	return bpf_redirect_neigh(uplink, 0, 0, 0);
}

struct sweep_context {
	__u64 now;
	struct sweep_order order;
};

static long sweep_flow(void *map, const struct flow_key *at, struct flow *flow,
		       struct sweep_context *context)
{
	struct flow_key flow_key = *at;
	struct service_key key = {};
	struct service *service;
	struct port_flows *count;
	__u64 limit, age;

	key.port = flow->host_port;
	key.protocol = flow_key.protocol;
	service = bpf_map_lookup_elem(&services, &key);
	age = context->now > flow->seen_ns ? context->now - flow->seen_ns : 0;
	limit = flow->flags & FLOW_ENDED      ? context->order.ended_ns
		: flow->flags & FLOW_ANSWERED ? context->order.idle_ns
					      : context->order.opening_ns;
	if (!service || service->life != flow->life || age > limit) {
		bpf_map_delete_elem(map, &flow_key);
		return 0;
	}
	if (flow->flags & FLOW_ENDED)
		return 0;
	count = bpf_map_lookup_elem(&active, &key);
	if (!count)
		return 0;
	if (count->pass != context->order.pass) {
		count->pass = context->order.pass;
		count->counted = 0;
	}
	count->counted++;
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
	return 0;
}

/* Nothing that the kernel lends to GPL programs only is used. */
char program_license[] SEC("license") = "LGPL-3.0-or-later";
