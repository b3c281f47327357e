/* What the programs use of the kernel's own interface, and nothing else: types, context, helpers.
 *
 * Kept by hand instead of taken from system headers, so that building needs clang alone. All of it
 * is the kernel's stable user interface (include/uapi/linux/bpf.h and the protocol headers); the
 * structures may not be reordered. Numbers of helpers are those of bpf-helpers(7).
 */
#ifndef KERNEL_H
#define KERNEL_H

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef int __s32;
typedef unsigned long long __u64;
typedef long long __s64;

#define SEC(name) __attribute__((section(name), used))
#define ALWAYS_INLINE inline __attribute__((always_inline))
#define OWN_FRAME __attribute__((noinline))
#define MAP_UINT(name, value) int (*name)[value]
#define MAP_TYPE(name, value) typeof(value) *name

#define MAP_HASH 1
#define MAP_ARRAY 2
#define MAP_PERCPU_HASH 5
#define MAP_LRU_HASH 9
#define MAP_PREFIXES 11
#define MAP_DEVICE_HASH 25
#define MAP_PIN_BY_NAME 1
#define MAP_NO_PREALLOC 1

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define TO_NET16(x) ((__u16)__builtin_bswap16(x))
#define TO_NET32(x) ((__u32)__builtin_bswap32(x))
#else
#define TO_NET16(x) ((__u16)(x))
#define TO_NET32(x) ((__u32)(x))
#endif

/* linux/if_packet.h, linux/if_ether.h, linux/in.h, net/tcp_states.h */
#define PACKET_HOST 0
#define ETH_HEADER 14
#define ETH_IPV4 0x0800
#define ETH_IPV6 0x86dd
#define ETH_TAG 0x8100
#define ETH_SERVICE_TAG 0x88a8
#define PROTOCOL_ICMP 1
#define PROTOCOL_TCP 6
#define PROTOCOL_UDP 17
#define PROTOCOL_FRAGMENT 44
#define PROTOCOL_ICMPV6 58
#define SOCKET_SYN_SENT 2
#define SOCKET_TIME_WAIT 6
#define SOCKET_LISTEN 10

/* Verdicts of a tcx program: go on with the next one, as if this were not here; drop. */
#define NEXT -1
#define DROP 2

/* Verdicts of a program at a system call. */
#define ALLOW 1
#define FORBID 0

/* Types of sockets. */
#define FAMILY_IPV4 2
#define SOCKET_STREAM 1
#define SOCKET_DATAGRAM 2

struct __sk_buff {
	__u32 len;
	__u32 pkt_type;
	__u32 mark;
	__u32 queue_mapping;
	__u32 protocol;
	__u32 vlan_present;
	__u32 vlan_tci;
	__u32 vlan_proto;
	__u32 priority;
	__u32 ingress_ifindex;
	__u32 ifindex;
	__u32 tc_index;
	__u32 cb[5];
	__u32 hash;
	__u32 tc_classid;
	__u32 data;
	__u32 data_end;
	__u32 napi_id;
	__u32 family;
	__u32 remote_ip4;
	__u32 local_ip4;
	__u32 remote_ip6[4];
	__u32 local_ip6[4];
	__u32 remote_port;
	__u32 local_port;
	__u32 data_meta;
	__u64 : 64;
	__u64 tstamp;
	__u32 wire_len;
	__u32 gso_segs;
	__u64 : 64;
	__u32 gso_size;
};

_Static_assert(__builtin_offsetof(struct __sk_buff, gso_size) == 176, "__sk_buff differs");

struct bpf_sock {
	__u32 bound_dev_if;
	__u32 family;
	__u32 type;
	__u32 protocol;
	__u32 mark;
	__u32 priority;
	__u32 src_ip4;
	__u32 src_ip6[4];
	__u32 src_port;
	__u16 dst_port;
	__u16 : 16;
	__u32 dst_ip4;
	__u32 dst_ip6[4];
	__u32 state;
	__s32 rx_queue_mapping;
};

struct bpf_sock_addr {
	__u32 user_family;
	__u32 user_ip4;
	__u32 user_ip6[4];
	__u32 user_port;
	__u32 family;
	__u32 type;
	__u32 protocol;
	__u32 msg_src_ip4;
	__u32 msg_src_ip6[4];
	/* A pointer, whatever the size of one where this is compiled. */
	union {
		struct bpf_sock *sk;
		__u64 : 64;
	} __attribute__((aligned(8)));
};

struct bpf_sock_tuple {
	union {
		struct {
			__u32 saddr;
			__u32 daddr;
			__u16 sport;
			__u16 dport;
		} ipv4;
		struct {
			__u32 saddr[4];
			__u32 daddr[4];
			__u16 sport;
			__u16 dport;
		} ipv6;
	};
};

struct ipv4_header {
	__u8 version_length;
	__u8 service;
	__u16 total_length;
	__u16 id;
	__u16 fragment;
	__u8 ttl;
	__u8 protocol;
	__u16 checksum;
	__u32 source;
	__u32 destination;
};

struct ipv6_header {
	__u32 version_flow;
	__u16 payload_length;
	__u8 next;
	__u8 hop_limit;
	__u32 source[4];
	__u32 destination[4];
};

struct ipv6_fragment_header {
	__u8 next;
	__u8 reserved;
	__u16 fragment;
	__u32 id;
};

struct udp_header {
	__u16 source;
	__u16 destination;
	__u16 length;
	__u16 checksum;
};

struct icmp_header {
	__u8 type;
	__u8 code;
	__u16 checksum;
	__u32 rest;
};

struct tcp_header {
	__u16 source;
	__u16 destination;
	__u32 sequence;
	__u32 acknowledged;
	__u8 offset;
	__u8 flags;
	__u16 window;
	__u16 checksum;
	__u16 urgent;
};

#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*bpf_map_update_elem)(void *map, const void *key, const void *value,
				   __u64 flags) = (void *)2;
static long (*bpf_map_delete_elem)(void *map, const void *key) = (void *)3;
static long (*bpf_skb_store_bytes)(struct __sk_buff *skb, __u32 offset, const void *from,
				   __u32 length, __u64 flags) = (void *)9;
static long (*bpf_l3_csum_replace)(struct __sk_buff *skb, __u32 offset, __u64 from, __u64 to,
				   __u64 size) = (void *)10;
static long (*bpf_l4_csum_replace)(struct __sk_buff *skb, __u32 offset, __u64 from, __u64 to,
				   __u64 flags) = (void *)11;
static __s64 (*bpf_csum_diff)(__u32 *from, __u32 from_size, __u32 *to, __u32 to_size,
			      __u32 seed) = (void *)28;
static long (*bpf_redirect)(__u32 ifindex, __u64 flags) = (void *)23;
static __u64 (*bpf_get_socket_cookie)(void *ctx) = (void *)46;
static long (*bpf_skb_load_bytes)(const void *skb, __u32 offset, void *to,
				  __u32 length) = (void *)26;
static long (*bpf_skb_pull_data)(struct __sk_buff *skb, __u32 length) = (void *)39;
static long (*bpf_sk_release)(void *sock) = (void *)86;
static struct bpf_sock *(*bpf_skc_lookup_tcp)(void *ctx, struct bpf_sock_tuple *tuple,
					      __u32 tuple_size, __u64 netns,
					      __u64 flags) = (void *)99;
static __u64 (*bpf_get_netns_cookie)(void *ctx) = (void *)122;
static long (*bpf_redirect_neigh)(__u32 ifindex, void *params, int params_size,
				  __u64 flags) = (void *)152;
static long (*bpf_redirect_peer)(__u32 ifindex, __u64 flags) = (void *)155;
static __u64 (*bpf_ktime_get_coarse_ns)(void) = (void *)160;
static long (*bpf_for_each_map_elem)(void *map, void *callback, void *context,
				     __u64 flags) = (void *)164;

/* bpf_redirect: as if the interface had received it. */
#define INTO_INTERFACE 1
/* bpf_l4_csum_replace: the sum covers the addresses too ... */
#define SUM_PSEUDO_HEADER (1 << 4)
/* ... and they are IPv6's (6.16 and later; older kernels refuse the flag). */
#define SUM_IPV6 (1 << 7)
/* bpf_l4_csum_replace: 0 means no sum, as UDP over IPv4 may have it. */
#define SUM_MAY_BE_ZERO (1 << 5)
/* bpf_skc_lookup_tcp: in the namespace of the interface. */
#define THIS_NAMESPACE ((__u64)(__s32)-1)

#endif
