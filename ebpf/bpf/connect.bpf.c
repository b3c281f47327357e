/* The kernel path of service ports for clients on this host: their sockets are led to the container
 * when they connect or send, so that no packet is translated and no process touches a byte.
 *
 * connect4, connect6          the destination is a published port of TCP: the container's instead
 * sendmsg4, sendmsg6          the same for each datagram of a socket without a peer
 * recvmsg4, recvmsg6          whom the datagram is from: the published port again
 * getpeername4, getpeername6  the peer that the client asked for
 * released                    a socket is gone: it counts no longer
 *
 * Attached to the root of the control groups, which holds every process; only sockets of the host's
 * own network namespace are led, so containers, and whoever is elsewhere, reach the listener. The
 * rest is the listener's too: rows that name client networks, sockets of datagrams with a peer,
 * sockets bound to an interface or to a loopback address, ports at their limit, containers whose
 * link is gone (the kernel itself takes it out of `links`).
 */
#include "kernel.h"
#include "maps.h"
#include "packet.h"
#include "policy.h"
#include "records.h"

struct {
	MAP_UINT(type, MAP_ARRAY);
	MAP_UINT(max_entries, 1);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, struct node);
} nodes SEC(".maps");

/* The containers' links. An entry vanishes with its interface, whether or not a process looks. */
struct {
	MAP_UINT(type, MAP_DEVICE_HASH);
	MAP_UINT(max_entries, 16384);
	MAP_UINT(pinning, MAP_PIN_BY_NAME);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, __u32);
} links SEC(".maps");

static ALWAYS_INLINE int is_loopback(const struct address *address)
{
	if (is_ipv4(address))
		return (address->word[3] & TO_NET32(0xff000000)) == TO_NET32(0x7f000000);
	return !address->word[0] && !address->word[1] && !address->word[2] &&
	       address->word[3] == TO_NET32(1);
}

static ALWAYS_INLINE int is_local(const struct address *address)
{
	__u32 *what;

	if (is_loopback(address))
		return 1;
	what = bpf_map_lookup_elem(&addresses, address);
	return what && *what == ADDRESS_HOST;
}

static ALWAYS_INLINE int is_of_host(void *ctx)
{
	__u32 zero = 0;
	struct node *node = bpf_map_lookup_elem(&nodes, &zero);

	return node && node->namespace && bpf_get_netns_cookie(ctx) == node->namespace;
}

/* A socket that is tied to the loopback interface, or to any, can't reach a container. */
static ALWAYS_INLINE int is_tied(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct address own;

	if (!sk)
		return 1;
	if (sk->bound_dev_if)
		return 1;
	if (sk->family == FAMILY_IPV4) {
		map_ipv4(&own, sk->src_ip4);
	} else {
		own.word[0] = sk->src_ip6[0];
		own.word[1] = sk->src_ip6[1];
		own.word[2] = sk->src_ip6[2];
		own.word[3] = sk->src_ip6[3];
	}
	return is_loopback(&own);
}

/* Keeps in mind where a socket wanted; false where there is no place for it. */
static ALWAYS_INLINE int remember(__u64 cookie, const struct led_socket *led)
{
	struct led_set *set = led_set_of(cookie);
	__u32 way;

	if (!set)
		return 0;
#pragma unroll
	for (way = 0; way < LED_WAYS; way++) {
		if (!set->cookie[way] && !__sync_val_compare_and_swap(&set->cookie[way], 0, LED_FILLS))
			break;
	}
	if (way >= LED_WAYS)
		return 0;
	set->led[way] = *led;
	/* Not before the rest is there. */
	__sync_val_compare_and_swap(&set->cookie[way], LED_FILLS, cookie);
	return 1;
}

#define LEAVE 0
#define LEAD 1
#define REFUSE 2

/* Where a socket that wants `host`:`port` is to go: LEAD fills in `to` and `to_port`. */
static OWN_FRAME int lead(struct bpf_sock_addr *ctx, const struct address *host,
			  struct address *to, __u16 *to_port, int connects)
{
	struct service_key key = {};
	struct led_peer_key peer_key = {};
	struct led_peer peer = {};
	struct service *service;
	struct port_flows *count;
	struct port_counters *counter;
	int datagrams = ctx->type == SOCKET_DATAGRAM;
	int fresh = 1;

	if (!host || !to || !to_port)
		return LEAVE;
	peer_key.cookie = bpf_get_socket_cookie(ctx);
	if (connects)
		forget(peer_key.cookie);
	if (ctx->protocol != (datagrams ? PROTOCOL_UDP : PROTOCOL_TCP))
		return LEAVE;
	/* Its datagrams would go on to that address when the container is gone and another has it. */
	if (connects && datagrams)
		return LEAVE;
	key.port = ctx->user_port;
	key.protocol = datagrams ? PROTOCOL_UDP : PROTOCOL_TCP;
	service = bpf_map_lookup_elem(&services, &key);
	if (!service || !is_of_host(ctx))
		return LEAVE;
	if (!(service->flags & SERVICE_HOST) || (service->flags & SERVICE_DRAINING) ||
	    service->networks)
		return LEAVE;
	if (!(service->flags & SERVICE_ANY_ADDRESS) && !same(&service->bind, host))
		return LEAVE;
	if (!is_local(host) || is_ipv4(host) != is_ipv4(&service->target) || is_tied(ctx))
		return LEAVE;
	if (!bpf_map_lookup_elem(&links, &service->link_index))
		return LEAVE;
	count = bpf_map_lookup_elem(&active, &key);
	if (!count)
		return LEAVE;

	peer_key.container = service->target;
	peer_key.container_port = service->target_port;
	peer.host = *host;
	peer.host_port = key.port;
	if (!connects && bpf_map_lookup_elem(&led_peers, &peer_key))
		fresh = 0;
	if (fresh && !has_room(service, count))
		return LEAVE;
	if (fresh && !is_on_time(service, count)) {
		count_refused(&key);
		return REFUSE;
	}
	if (datagrams && bpf_map_update_elem(&led_peers, &peer_key, &peer, 0))
		return LEAVE;
	if (connects) {
		struct led_socket led = {};

		led.host = *host;
		led.host_port = key.port;
		led.life = service->life;
		if (!remember(peer_key.cookie, &led))
			return LEAVE;
		__sync_fetch_and_add(&count->local, 1);
	}
	counter = fresh ? bpf_map_lookup_elem(&counters, &key) : 0;
	if (counter)
		counter->flows++;
	*to = service->target;
	*to_port = service->target_port;
	return LEAD;
}

static ALWAYS_INLINE int lead4(struct bpf_sock_addr *ctx, int connects)
{
	struct address host, to = {};
	__u16 port = 0;

	map_ipv4(&host, ctx->user_ip4);
	switch (lead(ctx, &host, &to, &port, connects)) {
	case LEAD:
		ctx->user_ip4 = to.word[3];
		ctx->user_port = port;
		return ALLOW;
	case REFUSE:
		return FORBID;
	default:
		return ALLOW;
	}
}

static ALWAYS_INLINE int lead6(struct bpf_sock_addr *ctx, int connects)
{
	struct address host, to = {};
	__u16 port = 0;

	host.word[0] = ctx->user_ip6[0];
	host.word[1] = ctx->user_ip6[1];
	host.word[2] = ctx->user_ip6[2];
	host.word[3] = ctx->user_ip6[3];
	switch (lead(ctx, &host, &to, &port, connects)) {
	case LEAD:
		ctx->user_ip6[0] = to.word[0];
		ctx->user_ip6[1] = to.word[1];
		ctx->user_ip6[2] = to.word[2];
		ctx->user_ip6[3] = to.word[3];
		ctx->user_port = port;
		return ALLOW;
	case REFUSE:
		return FORBID;
	default:
		return ALLOW;
	}
}

SEC("cgroup/connect4")
int connect4(struct bpf_sock_addr *ctx)
{
	return lead4(ctx, 1);
}

SEC("cgroup/connect6")
int connect6(struct bpf_sock_addr *ctx)
{
	return lead6(ctx, 1);
}

SEC("cgroup/sendmsg4")
int sendmsg4(struct bpf_sock_addr *ctx)
{
	return lead4(ctx, 0);
}

SEC("cgroup/sendmsg6")
int sendmsg6(struct bpf_sock_addr *ctx)
{
	return lead6(ctx, 0);
}

/* What a datagram's sender, or a connection's peer, is called by the client. */
static ALWAYS_INLINE struct led_peer *peer_of(struct bpf_sock_addr *ctx,
					      const struct address *container)
{
	struct led_peer_key key = {};

	key.cookie = bpf_get_socket_cookie(ctx);
	key.container = *container;
	key.container_port = ctx->user_port;
	return bpf_map_lookup_elem(&led_peers, &key);
}

SEC("cgroup/recvmsg4")
int recvmsg4(struct bpf_sock_addr *ctx)
{
	struct address container;
	struct led_peer *peer;

	map_ipv4(&container, ctx->user_ip4);
	peer = peer_of(ctx, &container);
	if (peer) {
		ctx->user_ip4 = peer->host.word[3];
		ctx->user_port = peer->host_port;
	}
	return ALLOW;
}

SEC("cgroup/recvmsg6")
int recvmsg6(struct bpf_sock_addr *ctx)
{
	struct address container;
	struct led_peer *peer;

	container.word[0] = ctx->user_ip6[0];
	container.word[1] = ctx->user_ip6[1];
	container.word[2] = ctx->user_ip6[2];
	container.word[3] = ctx->user_ip6[3];
	peer = peer_of(ctx, &container);
	if (peer) {
		ctx->user_ip6[0] = peer->host.word[0];
		ctx->user_ip6[1] = peer->host.word[1];
		ctx->user_ip6[2] = peer->host.word[2];
		ctx->user_ip6[3] = peer->host.word[3];
		ctx->user_port = peer->host_port;
	}
	return ALLOW;
}

/* Where a connected socket wanted. This is asked of every socket that a container accepts, too. */
static ALWAYS_INLINE struct led_socket *host_of(struct bpf_sock_addr *ctx)
{
	return is_of_host(ctx) ? find_led(bpf_get_socket_cookie(ctx)) : 0;
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	struct led_socket *led = host_of(ctx);

	if (led) {
		ctx->user_ip4 = led->host.word[3];
		ctx->user_port = led->host_port;
	}
	return ALLOW;
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	struct led_socket *led = host_of(ctx);

	if (led) {
		ctx->user_ip6[0] = led->host.word[0];
		ctx->user_ip6[1] = led->host.word[1];
		ctx->user_ip6[2] = led->host.word[2];
		ctx->user_ip6[3] = led->host.word[3];
		ctx->user_port = led->host_port;
	}
	return ALLOW;
}

SEC("cgroup/sock_release")
int released(struct bpf_sock *ctx)
{
	/* Nobody elsewhere was led, and most sockets of a node are its containers'. */
	if (!is_of_host(ctx))
		return ALLOW;
	forget(bpf_get_socket_cookie(ctx));
	return ALLOW;
}

/* Nothing that the kernel lends to GPL programs only is used. */
char program_license[] SEC("license") = "LGPL-3.0-or-later";
