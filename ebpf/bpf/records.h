/* The records shared by the kernel programs and the process that feeds them: keys and values of
 * the maps. `src/records.rs` mirrors them; both sides assert every size and offset, so they can't
 * drift apart unnoticed. A change of layout needs a new LAYOUT number there.
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
};

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

struct flow {
	__u64 seen_ns;
	/* What the client connected to. */
	struct address host;
	/* Sequence number of the client's SYN, network order. */
	__u32 first_sequence;
	/* Interface the client's packets come in by, and replies leave by. */
	__u32 uplink;
	__u32 link_index;
	__u32 life;
	__u16 host_port;
	__u16 flags;
	__u32 zero;
};

/* Per CPU and published port. */
struct port_counters {
	__u64 flows;
	__u64 packets_in;
	__u64 bytes_in;
	__u64 packets_out;
	__u64 bytes_out;
};

/* Flows of a published port: kept up to date by the programs, put right by each sweep. */
struct port_flows {
	__s64 active;
	/* The sweep that counted, and what it has counted so far. */
	__u32 pass;
	__u32 counted;
};

/* What a sweep is to do. */
struct sweep_order {
	__u64 opening_ns;
	__u64 idle_ns;
	__u64 ended_ns;
	__u32 pass;
	__u32 zero;
};

#define ASSERT_SIZE(type, size) _Static_assert(sizeof(struct type) == size, #type " has grown")
#define ASSERT_AT(type, field, offset)                                                             \
	_Static_assert(__builtin_offsetof(struct type, field) == offset, #type "." #field " moved")

ASSERT_SIZE(address, 16);
ASSERT_SIZE(service_key, 4);
ASSERT_AT(service_key, protocol, 2);
ASSERT_SIZE(client_network, 32);
ASSERT_SIZE(service, 304);
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
ASSERT_SIZE(port_counters, 40);
ASSERT_AT(port_counters, packets_in, 8);
ASSERT_AT(port_counters, bytes_in, 16);
ASSERT_AT(port_counters, packets_out, 24);
ASSERT_AT(port_counters, bytes_out, 32);
ASSERT_SIZE(port_flows, 16);
ASSERT_AT(port_flows, pass, 8);
ASSERT_AT(port_flows, counted, 12);
ASSERT_SIZE(sweep_order, 32);
ASSERT_AT(sweep_order, idle_ns, 8);
ASSERT_AT(sweep_order, ended_ns, 16);
ASSERT_AT(sweep_order, pass, 24);

#endif
