/* Writing packets: one address and one port for others, and the sums mended. */
#ifndef TRANSLATE_H
#define TRANSLATE_H

#include "kernel.h"
#include "packet.h"
#include "records.h"

#define AT(type, field) __builtin_offsetof(struct type, field)

/* What an IPv6 sum says of other addresses. */
static ALWAYS_INLINE int mend_ipv6(struct __sk_buff *skb, __u32 sum, __s64 change, __u64 flags)
{
	/* Kernels before 6.16 do not know the flag, and count a received sum wrong without it. */
	return bpf_l4_csum_replace(skb, sum, 0, change, flags | SUM_PSEUDO_HEADER | SUM_IPV6) &&
	       bpf_l4_csum_replace(skb, sum, 0, change, flags | SUM_PSEUDO_HEADER);
}

/* Replaces the source (or destination) address in the IP header at `at`; not the transport's sum. */
static ALWAYS_INLINE int put_address(struct __sk_buff *skb, int ipv4, __u32 at, int source,
				     const struct address *old, const struct address *new)
{
	if (ipv4) {
		__u32 from = old->word[3], to = new->word[3];

		if (bpf_l3_csum_replace(skb, at + AT(ipv4_header, checksum), from, to, 4))
			return -1;
		at += source ? AT(ipv4_header, source) : AT(ipv4_header, destination);
		return bpf_skb_store_bytes(skb, at, &to, sizeof(to), 0) ? -1 : 0;
	}
	at += source ? AT(ipv6_header, source) : AT(ipv6_header, destination);
	return bpf_skb_store_bytes(skb, at, new, sizeof(*new), 0) ? -1 : 0;
}

/* Replaces one address and one port of the packet. `source` tells which. */
static ALWAYS_INLINE int translate(struct __sk_buff *skb, const struct packet *it, int source,
				   struct address *address, __u16 port)
{
	const struct address *old = source ? &it->source : &it->destination;
	__u16 old_port = source ? it->source_port : it->destination_port;
	int tcp = it->protocol == PROTOCOL_TCP;
	__u32 sum = it->transport + (tcp ? AT(tcp_header, checksum) : AT(udp_header, checksum));
	__u64 flags = tcp ? 0 : SUM_MAY_BE_ZERO;

	if (it->ipv4) {
		if (bpf_l4_csum_replace(skb, sum, old->word[3], address->word[3],
					flags | SUM_PSEUDO_HEADER | 4))
			return -1;
	} else {
		__s64 change = bpf_csum_diff((__u32 *)old->word, 16, address->word, 16, 0);

		if (change < 0 || mend_ipv6(skb, sum, change, flags))
			return -1;
	}
	if (put_address(skb, it->ipv4, ETH_HEADER, source, old, address))
		return -1;
	if (bpf_l4_csum_replace(skb, sum, old_port, port, flags | 2))
		return -1;
	/* Source and destination port come first in both protocols. */
	return bpf_skb_store_bytes(skb, it->transport + (source ? 0 : 2), &port, sizeof(port), 0) ? -1
												  : 0;
}

/* One address and port for others. */
struct exchange {
	struct address address;
	__u16 old_port;
	__u16 port;
};

/* Replaces an address in an ICMP error and, with a port, in the packet that it tells of: there it
 * is on the other side. The sum of that packet's own transport is left: nobody can check it, as
 * most of what it covers is missing. */
static ALWAYS_INLINE int translate_error(struct __sk_buff *skb, const struct packet *error, int source,
				     const struct exchange *exchange)
{
	struct address old = source ? error->source : error->destination;
	struct address new = exchange->address;
	__u16 port = exchange->port;
	__u32 inner = ETH_HEADER + (error->ipv4 ? 28 : 48);
	__u32 sum = ETH_HEADER + (error->ipv4 ? 22 : 42);
	__u32 port_at = inner + (error->ipv4 ? 20 : 40) + (source ? 2 : 0);
	int inner_source = !source;

	if (put_address(skb, error->ipv4, ETH_HEADER, source, &old, &new) ||
	    put_address(skb, error->ipv4, inner, inner_source, &old, &new))
		return -1;
	if (!error->ipv4) {
		__s64 change = bpf_csum_diff(old.word, 16, new.word, 16, 0);

		/* Once for the pseudo header, once for the packet inside. In IPv4 there is no pseudo
		 * header, and the header inside sums up to the same as before. */
		if (change < 0 || mend_ipv6(skb, sum, change, 0) ||
		    bpf_l4_csum_replace(skb, sum, 0, change, 0))
			return -1;
	}
	if (bpf_l4_csum_replace(skb, sum, exchange->old_port, port, 2))
		return -1;
	return bpf_skb_store_bytes(skb, port_at, &port, sizeof(port), 0) ? -1 : 0;
}

#endif
