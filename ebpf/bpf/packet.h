/* Reading packets: what the programs need of the headers, and whether the packet is one they handle.
 *
 * Not handled: VLAN tags, IP options, IPv6 extension headers other than the fragment header, other
 * protocols than TCP, UDP and errors of ICMP. */
#ifndef PACKET_H
#define PACKET_H

#include "kernel.h"
#include "records.h"

/* A TCP segment or UDP datagram, whole or its first fragment. */
#define PACKET_WHOLE 0
#define PACKET_FIRST 1
/* A fragment after the first. */
#define PACKET_LATER 2
/* An ICMP error. */
#define PACKET_ERROR 3

struct packet {
	struct address source;
	struct address destination;
	__u32 sequence;
	__u32 acknowledged;
	__u32 payload;
	/* Where the transport's header begins. */
	__u32 transport;
	/* All headers but Ethernet's. */
	__u32 headers;
	/* Of the datagram that this is a fragment of. */
	__u32 id;
	__u16 source_port;
	__u16 destination_port;
	__u8 protocol;
	__u8 flags;
	__u8 ipv4;
	__u8 kind;
};

/* The packet that an error is about. */
struct cause {
	struct address source;
	struct address destination;
	__u16 source_port;
	__u16 destination_port;
	__u8 protocol;
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

static ALWAYS_INLINE int is_ipv4(const struct address *address)
{
	return address->word[2] == TO_NET32(0xffff) && !address->word[0] && !address->word[1];
}

/* Read anew each time: a value that the compiler has kept is a number to the verifier, and no longer
 * a pointer. */
#define PACKET_START(skb) ((void *)(long)*(volatile __u32 *)&(skb)->data)
#define PACKET_END(skb) ((void *)(long)*(volatile __u32 *)&(skb)->data_end)

/* The header at `offset`, if the packet is that long. */
static ALWAYS_INLINE void *header(struct __sk_buff *skb, __u32 offset, __u32 length)
{
	void *data = PACKET_START(skb);

	if (data + offset + length <= PACKET_END(skb))
		return data + offset;
	if (offset + length > skb->len || bpf_skb_pull_data(skb, offset + length))
		return 0;
	data = PACKET_START(skb);
	if (data + offset + length <= PACKET_END(skb))
		return data + offset;
	return 0;
}

static ALWAYS_INLINE int read_ipv4(struct __sk_buff *skb, struct packet *it, __u32 *total)
{
	struct ipv4_header *ip = header(skb, ETH_HEADER, sizeof(*ip));

	if (!ip || ip->version_length != 0x45)
		return -1;
	map_ipv4(&it->source, ip->source);
	map_ipv4(&it->destination, ip->destination);
	it->ipv4 = 1;
	it->protocol = ip->protocol;
	it->id = ip->id;
	it->transport = ETH_HEADER + sizeof(*ip);
	if (ip->fragment & TO_NET16(0x1fff))
		it->kind = PACKET_LATER;
	else if (ip->fragment & TO_NET16(0x2000))
		it->kind = PACKET_FIRST;
	/* Short frames are padded; only very large ones say 0. */
	if (ip->total_length)
		*total = TO_NET16(ip->total_length);
	return 0;
}

static ALWAYS_INLINE int read_ipv6(struct __sk_buff *skb, struct packet *it, __u32 *total)
{
	struct ipv6_header *ip = header(skb, ETH_HEADER, sizeof(*ip));

	if (!ip)
		return -1;
	__builtin_memcpy(&it->source, ip->source, sizeof(it->source));
	__builtin_memcpy(&it->destination, ip->destination, sizeof(it->destination));
	it->protocol = ip->next;
	it->transport = ETH_HEADER + sizeof(*ip);
	if (ip->payload_length)
		*total = TO_NET16(ip->payload_length) + sizeof(*ip);
	if (it->protocol == PROTOCOL_FRAGMENT) {
		struct ipv6_fragment_header *part =
			header(skb, ETH_HEADER + sizeof(*ip), sizeof(*part));

		if (!part)
			return -1;
		it->protocol = part->next;
		it->id = part->id;
		it->kind = part->fragment & TO_NET16(0xfff8) ? PACKET_LATER : PACKET_FIRST;
		it->transport = ETH_HEADER + sizeof(*ip) + sizeof(*part);
	}
	return 0;
}

/* Reads the headers; 0 when it is a packet that these programs handle. */
static ALWAYS_INLINE int read_packet(struct __sk_buff *skb, struct packet *it)
{
	__u32 total = skb->len - ETH_HEADER;

	/* With hardware or GRO stripping the tag is not in the bytes: another interface's packet. */
	if (skb->vlan_present)
		return -1;
	if (skb->protocol == TO_NET16(ETH_IPV4)) {
		if (read_ipv4(skb, it, &total))
			return -1;
	} else if (skb->protocol == TO_NET16(ETH_IPV6)) {
		if (read_ipv6(skb, it, &total))
			return -1;
	} else {
		return -1;
	}

	if (it->protocol == PROTOCOL_TCP) {
		if (it->kind == PACKET_LATER)
			return 0;
		struct tcp_header *tcp = header(skb, it->transport, sizeof(*tcp));
		if (!tcp)
			return -1;
		it->source_port = tcp->source;
		it->destination_port = tcp->destination;
		it->sequence = tcp->sequence;
		it->acknowledged = tcp->acknowledged;
		it->flags = tcp->flags;
		it->headers = it->transport - ETH_HEADER + (tcp->offset >> 4) * 4;
		it->payload = total > it->headers ? total - it->headers : 0;
		return 0;
	}
	if (it->protocol == PROTOCOL_UDP) {
		if (it->kind == PACKET_LATER)
			return 0;
		struct udp_header *udp = header(skb, it->transport, sizeof(*udp));
		if (!udp)
			return -1;
		it->source_port = udp->source;
		it->destination_port = udp->destination;
		/* The whole datagram's, also in its first fragment. */
		__u32 length = TO_NET16(udp->length);
		it->payload = length > sizeof(*udp) ? length - sizeof(*udp) : 0;
		it->headers = it->transport - ETH_HEADER + sizeof(*udp);
		return 0;
	}
	if (it->protocol == (it->ipv4 ? PROTOCOL_ICMP : PROTOCOL_ICMPV6) && it->kind == PACKET_WHOLE) {
		struct icmp_header *icmp = header(skb, it->transport, sizeof(*icmp));
		if (!icmp)
			return -1;
		/* Unreachable and too big, time exceeded, a parameter's problem. */
		if (it->ipv4 ? icmp->type != 3 && icmp->type != 11 && icmp->type != 12
			     : icmp->type < 1 || icmp->type > 4)
			return -1;
		it->kind = PACKET_ERROR;
		return 0;
	}
	return -1;
}

/* Reads the packet that an error is about. Its addresses and ports are those of the one that sent
 * it, before anything was translated on its further way. */
static ALWAYS_INLINE int read_cause(struct __sk_buff *skb, const struct packet *error,
				    struct cause *cause)
{
	struct {
		__u16 source;
		__u16 destination;
	} ports;

	if (error->ipv4) {
		struct ipv4_header ip;

		if (bpf_skb_load_bytes(skb, ETH_HEADER + 28, &ip, sizeof(ip)) ||
		    bpf_skb_load_bytes(skb, ETH_HEADER + 48, &ports, sizeof(ports)))
			return -1;
		if (ip.version_length != 0x45 || (ip.fragment & TO_NET16(0x1fff)))
			return -1;
		map_ipv4(&cause->source, ip.source);
		map_ipv4(&cause->destination, ip.destination);
		cause->protocol = ip.protocol;
	} else {
		struct ipv6_header ip;

		if (bpf_skb_load_bytes(skb, ETH_HEADER + 48, &ip, sizeof(ip)) ||
		    bpf_skb_load_bytes(skb, ETH_HEADER + 88, &ports, sizeof(ports)))
			return -1;
		__builtin_memcpy(&cause->source, ip.source, sizeof(cause->source));
		__builtin_memcpy(&cause->destination, ip.destination, sizeof(cause->destination));
		cause->protocol = ip.next;
	}
	if (cause->protocol != PROTOCOL_TCP && cause->protocol != PROTOCOL_UDP)
		return -1;
	cause->source_port = ports.source;
	cause->destination_port = ports.destination;
	return 0;
}

#endif
