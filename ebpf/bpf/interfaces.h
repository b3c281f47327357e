/* By which interface a packet leaves: uplinks towards clients, links towards containers, bridges towards this
 * host. */
#ifndef INTERFACES_H
#define INTERFACES_H

#include "kernel.h"
#include "packet.h"
#include "records.h"

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

/* The bridges of containers' links, by the number of the host's end. */
struct {
	MAP_UINT(type, MAP_HASH);
	MAP_UINT(max_entries, 16384);
	MAP_UINT(map_flags, MAP_NO_PREALLOC);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, struct bridge);
} bridges SEC(".maps");

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

#endif
