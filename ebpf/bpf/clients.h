/* Whose a client's packet is: a service's, or the stack's. */
#ifndef CLIENTS_H
#define CLIENTS_H

#include "kernel.h"
#include "maps.h"
#include "packet.h"
#include "records.h"

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

#endif
