/* The records shared by the kernel programs and the process that feeds them: keys and values of
 * the maps. `src/records.rs` mirrors them; both sides assert every size and offset, so they can't
 * drift apart unnoticed. A change of layout needs a new LAYOUT number there; a map more does not, if it is
 * filled before the programs that read it are attached.
 *
 * Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d. Ports are in network order.
 */
#ifndef RECORDS_H
#define RECORDS_H

struct address {
	__u32 word[4];
};

/* Which published port. */
struct service_key {
	__u16 port;
	__u8 protocol;
	__u8 zero;
};

struct client_network {
	struct address address;
	struct address mask;
};

#define CLIENT_NETWORKS 8

/* No new flows; those there are go on. */
#define SERVICE_DRAINING 1
/* Any local address of the target's family will do, else `bind` alone. */
#define SERVICE_ANY_ADDRESS 2
/* Clients of other hosts are let through. */
#define SERVICE_REMOTE 4
/* Clients on this host are let through. */
#define SERVICE_HOST 8
/* Clients of other hosts are let through no more; those there are go on. */
#define SERVICE_REMOTE_OLD 16

/* Where a published port leads. */
struct service {
	struct address bind;
	struct address target;
	/* Host side of the container's veth. */
	__u32 link_index;
	/* Differs for each route a port has had: flows of another life are dead. */
	__u32 life;
	/* Most flows at once; 0 means no limit. */
	__u32 max_flows;
	__u16 target_port;
	__u8 flags;
	/* Client networks in use; 0 lets everyone in. */
	__u8 networks;
	struct client_network network[CLIENT_NETWORKS];
	/* Distance of two new flows that may go on for ever; 0 means no limit. A second's worth may
	 * come at once. */
	__u64 spacing_ns;
};

/* What an address in `addresses` is. */
#define ADDRESS_HOST 1
#define ADDRESS_CONTAINER 2

/* A flow as its container sees it. One entry serves both directions. */
struct flow_key {
	struct address container;
	struct address client;
	__u16 container_port;
	__u16 client_port;
	__u8 protocol;
	__u8 zero[3];
};

#define FLOW_ANSWERED 1
#define FLOW_FIN_IN 2
#define FLOW_FIN_OUT 4
#define FLOW_RESET 8
/* Made from a segment in the middle of a flow: the first sequence number is not known. */
#define FLOW_REBUILT 16
#define FLOW_ENDED 32
/* Of a client on this host: it is counted, and nothing else happens to it. */
#define FLOW_LOCAL 64
/* Of TCP: the client has not said anything to the container's answer. */
#define FLOW_HALF_OPEN 128
/* Of TCP: begun by a SYN in place of a flow that was under way. */
#define FLOW_IN_PLACE 256

struct flow {
	/* When the last packet came; 0 for a client on this host's since the last sweep. */
	__u64 seen_ns;
	/* What the client connected to. */
	struct address host;
	/* Sequence number of the client's SYN, network order; of a client on this host the lower half
	 * of its socket's cookie. */
	__u32 first_sequence;
	/* Interface the client's packets come in by, and replies leave by. */
	__u32 uplink;
	__u32 link_index;
	__u32 life;
	__u16 host_port;
	__u16 flags;
	union {
		/* Largest packet that the uplink takes. */
		__u32 mtu;
		/* Of a client on this host the upper half of its socket's cookie. */
		__u32 cookie_above;
	};
};

#define LOCAL_FLOWS 16384
#define LOCAL_WAYS 2

/* A flow of a client on this host, in one of the few places where its ports and address lead. */
struct local_flow {
	struct flow_key key;
	struct flow flow;
	/* 0: free; LOCAL_FILLS; LOCAL_THERE. */
	__u32 taken;
	__u32 zero;
};

#define LOCAL_THERE 1
/* The rest is being written. */
#define LOCAL_FILLS 2

/* Per CPU and published port. */
struct port_counters {
	__u64 flows;
	__u64 packets_in;
	__u64 bytes_in;
	__u64 packets_out;
	__u64 bytes_out;
	/* Flows that were one too many. */
	__u64 refused;
};

/* Per CPU and container's link: what was put into the container past the host's end of the link, in
 * the kernel's terms of an interface. */
struct delivered {
	__u64 packets;
	__u64 bytes;
};

/* The bridge that a container's link belongs to. */
struct bridge {
	__u32 index;
	/* When it last saw a packet of the container's, in a unit of its own. */
	__u32 learnt;
	/* Its hardware address. */
	__u16 address[3];
	__u16 zero;
};

/* Flows of a published port: kept up to date by the programs, put right by each sweep. */
struct port_flows {
	__s64 active;
	/* Sockets of this host that lead to the container. */
	__s64 local;
	/* When the next new flow would be on time. */
	__u64 next_ns;
	/* The sweep that counted, and what it has counted so far. */
	__u32 pass;
	__u32 counted;
};

/* What a sweep is to do. */
struct sweep_order {
	__u64 opening_ns;
	__u64 idle_ns;
	__u64 ended_ns;
	/* For datagrams: silent, and never answered. */
	__u64 datagram_idle_ns;
	__u64 datagram_opening_ns;
	__u32 pass;
	/* Silent when one side has ended it and the other has not. */
	__u32 closing_s;
};

/* Fragments after the first have no ports: they follow it. */
struct fragment_key {
	struct address source;
	struct address destination;
	__u32 id;
	__u8 protocol;
	__u8 zero[3];
};

struct fragment {
	__u64 seen_ns;
	/* In place of the destination (into a container) or of the source (out of it). */
	struct address address;
	__u32 interface;
	__u32 outwards;
};

/* A network that routes of this host lead to by an uplink. The kernel compares as many bits of what
 * follows the first word as that says. */
struct way_back {
	__u32 bits;
	__u32 uplink;
	/* 4 or 6: a way to all of IPv6 is none to IPv4. */
	__u32 family;
	struct address address;
};

/* Bits of a whole one. */
#define WAY_BITS 192

/* A socket of TCP of this host that was led to a container instead of where it wanted. */
struct led_socket {
	struct address host;
	__u16 host_port;
	__u16 zero;
	__u32 life;
};

#define LED_SETS 8192
#define LED_WAYS 8

/* In place of a cookie while the rest is written: no socket has it. */
#define LED_FILLS (~0ULL)

/* Led sockets whose cookies are neighbours. Those of other times have the same places, and a socket
 * that finds none is not led. */
struct led_set {
	/* 0 where the place is free. */
	__u64 cookie[LED_WAYS];
	struct led_socket led[LED_WAYS];
};

/* A peer of a datagram socket that was led. */
struct led_peer_key {
	__u64 cookie;
	struct address container;
	__u16 container_port;
	__u8 zero[6];
};

struct led_peer {
	struct address host;
	__u16 host_port;
	__u8 zero[6];
};

/* What the programs know of the node. */
struct node {
	/* Cookie of the host's network namespace; 0 keeps the hooks from acting. */
	__u64 namespace;
};

#define ASSERT_SIZE(type, size) _Static_assert(sizeof(struct type) == size, #type " has grown")
#define ASSERT_AT(type, field, offset)                                                             \
	_Static_assert(__builtin_offsetof(struct type, field) == offset, #type "." #field " moved")

ASSERT_SIZE(address, 16);
ASSERT_SIZE(service_key, 4);
ASSERT_AT(service_key, protocol, 2);
ASSERT_SIZE(client_network, 32);
ASSERT_SIZE(service, 312);
ASSERT_AT(service, spacing_ns, 304);
ASSERT_AT(service, target, 16);
ASSERT_AT(service, link_index, 32);
ASSERT_AT(service, life, 36);
ASSERT_AT(service, max_flows, 40);
ASSERT_AT(service, target_port, 44);
ASSERT_AT(service, flags, 46);
ASSERT_AT(service, networks, 47);
ASSERT_AT(service, network, 48);
ASSERT_SIZE(flow_key, 40);
ASSERT_AT(flow_key, client, 16);
ASSERT_AT(flow_key, container_port, 32);
ASSERT_AT(flow_key, client_port, 34);
ASSERT_AT(flow_key, protocol, 36);
ASSERT_SIZE(flow, 48);
ASSERT_AT(flow, host, 8);
ASSERT_AT(flow, first_sequence, 24);
ASSERT_AT(flow, uplink, 28);
ASSERT_AT(flow, link_index, 32);
ASSERT_AT(flow, life, 36);
ASSERT_AT(flow, host_port, 40);
ASSERT_AT(flow, flags, 42);
ASSERT_AT(flow, mtu, 44);
ASSERT_SIZE(port_counters, 48);
ASSERT_AT(port_counters, refused, 40);
ASSERT_AT(port_counters, packets_in, 8);
ASSERT_AT(port_counters, bytes_in, 16);
ASSERT_AT(port_counters, packets_out, 24);
ASSERT_AT(port_counters, bytes_out, 32);
ASSERT_SIZE(delivered, 16);
ASSERT_AT(delivered, bytes, 8);
ASSERT_SIZE(bridge, 16);
ASSERT_AT(bridge, learnt, 4);
ASSERT_AT(bridge, address, 8);
ASSERT_SIZE(port_flows, 32);
ASSERT_AT(port_flows, local, 8);
ASSERT_AT(port_flows, next_ns, 16);
ASSERT_AT(port_flows, pass, 24);
ASSERT_AT(port_flows, counted, 28);
ASSERT_SIZE(sweep_order, 48);
ASSERT_AT(sweep_order, idle_ns, 8);
ASSERT_AT(sweep_order, ended_ns, 16);
ASSERT_AT(sweep_order, datagram_idle_ns, 24);
ASSERT_AT(sweep_order, datagram_opening_ns, 32);
ASSERT_AT(sweep_order, pass, 40);
ASSERT_AT(sweep_order, closing_s, 44);
ASSERT_SIZE(fragment_key, 40);
ASSERT_SIZE(fragment, 32);
ASSERT_SIZE(way_back, 28);
ASSERT_AT(way_back, uplink, 4);
ASSERT_AT(way_back, family, 8);
ASSERT_AT(way_back, address, 12);
ASSERT_SIZE(led_socket, 24);
ASSERT_SIZE(led_set, 256);
ASSERT_AT(led_set, led, 64);
ASSERT_SIZE(local_flow, 96);
ASSERT_AT(local_flow, flow, 40);
ASSERT_AT(local_flow, taken, 88);
ASSERT_SIZE(led_peer_key, 32);
ASSERT_SIZE(led_peer, 24);
ASSERT_SIZE(node, 8);

#endif
