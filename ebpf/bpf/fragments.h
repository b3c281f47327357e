/* Fragments, which carry no ports: those after the first follow it. */
#ifndef FRAGMENTS_H
#define FRAGMENTS_H

#include "interfaces.h"
#include "kernel.h"
#include "packet.h"
#include "records.h"
#include "translate.h"

struct {
	MAP_UINT(type, MAP_LRU_HASH);
	MAP_UINT(max_entries, 16384);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, struct fragment_key);
	MAP_TYPE(value, struct fragment);
} fragments SEC(".maps");

/* So long receivers wait for the rest of a datagram. */
#define FRAGMENT_LIFE_NS 30000000000ULL

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

#endif
