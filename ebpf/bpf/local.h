/* Clients on this host: their sockets were led to the container, so that nothing is translated, only counted. */
#ifndef LOCAL_H
#define LOCAL_H

#include "flows.h"
#include "kernel.h"
#include "maps.h"
#include "packet.h"
#include "records.h"

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

#endif
