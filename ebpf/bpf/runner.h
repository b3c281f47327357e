/* The ports of a kernel's runner, and where a segment's own are. */
#ifndef RUNNER_H
#define RUNNER_H

#include "kernel.h"
#include "packet.h"

/* Nobody but this host: the agent speaks to the runner here. */
#define RUNNER_FIRST_PORT 2000
#define RUNNER_LAST_PORT 2001

/* Headers of IPv6 that may stand before the transport's. */
#define MOST_HEADERS 4

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

#endif
