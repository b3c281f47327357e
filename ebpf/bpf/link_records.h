/* What the reading of links tells the dataplane. `src/link_records.rs` is the same in Rust; sizes are
 * asserted there. */
#ifndef LINK_RECORDS_H
#define LINK_RECORDS_H

#include "kernel.h"

/* A link to read. The dataplane writes its index over zeros; the rest is the program's own. What every pass
 * needs comes first, in one line of the cache. */
struct link_target {
	/* 0: none. */
	__u64 index;
	/* How often it was found anew, and flags. */
	__u64 finds;
	__u64 device;
	__u64 peer;
	/* What the two count on each CPU. */
	__u64 counts;
	__u64 peer_counts;
	/* Their receive queues. */
	__u64 queues;
	__u64 peer_queues;
	__u64 queues_number;
	__u64 peer_queues_number;
	/* What those queues add to the sums of a record. */
	__u64 queue_sums[6];
};

/* In `finds`: it counts sent packets only; its queues may have counted since; they have counted. */
#define SENT_ONLY (1ULL << 63)
#define QUEUES_MOVE (1ULL << 62)
#define QUEUES_COUNT (1ULL << 61)
#define FLAGS (SENT_ONLY | QUEUES_MOVE | QUEUES_COUNT)

_Static_assert(sizeof(struct link_target) == 16 * 8, "the Rust side has as many words");

struct link_record {
	/* `finds` of the target when this was read; 0 when it was not. */
	__u64 filled;
	__u64 rx_packets;
	__u64 tx_packets;
	__u64 rx_bytes;
	__u64 tx_bytes;
	__u64 rx_dropped;
	__u64 tx_dropped;
	/* 1 when there is no such device. */
	__u64 absent;
};

_Static_assert(sizeof(struct link_record) == 8 * 8, "the Rust side has as many words");

/* Where a veth has what. The driver may be a module with types of its own, so that the dataplane looks
 * this up and not the loader. */
struct link_layout {
	/* 0: nothing is read. */
	__u64 known;
	/* In struct net_device: the kind of its counters; 0 when the kernel does not say it. */
	__u64 kind;
	/* 1: where the kernel does not say it, only sent packets are counted. */
	__u64 sent_only;
	/* In struct veth_priv, from the start of its device. */
	__u64 peer;
	__u64 dropped;
	__u64 queues;
	/* struct veth_rq: its size, and what is in it. */
	__u64 queue_size;
	__u64 queue_napi;
	__u64 queue_packets;
	__u64 queue_bytes;
	__u64 queue_drops;
	__u64 queue_send_errors;
	__u64 queue_peer_errors;
	/* The program's own: the network namespace of who runs it. */
	__u64 namespace;
};

_Static_assert(sizeof(struct link_layout) == 14 * 8, "the Rust side has as many words");

#endif
