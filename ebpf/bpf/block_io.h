/* Counts what block devices do for each cgroup of version 1, whose own files miss it: some kernels count
 * nothing there unless a limit is set.
 *
 * A bio that reaches the queue of a device is made a request, which is an operation, or joins one; then its bytes go
 * to the cgroup it was made for and to those above it. Not when the request completes: that comes in an
 * interrupt of whatever runs, there are kernels that run no programs while certain tasks do (up to 9 % of
 * the bytes were missed), and a request may have been made for several cgroups. Devices made of others (device mapper, md,
 * paths of NVMe) have no such queue, but loop devices have, which are counted apart. Only a write counts as one: discards and
 * flushes have bits of the operation in common with it.
 *
 * What is written through the cache counts for whom writes it back: threads of the root, or the task itself by fsync(2).
 */
#ifndef BLOCK_IO_H
#define BLOCK_IO_H

#include "cgroup_types.h"
#include "cgroup_records.h"

struct block_use {
	struct block_counters loops;
	struct block_counters others;
};

/* By the serial number of the cgroup's state. Those that are gone are pushed out by others; there is room for four times the
 * containers there may be. */
struct {
	MAP_UINT(type, MAP_LRU_HASH);
	MAP_UINT(max_entries, 1);
	MAP_TYPE(key, __u64);
	MAP_TYPE(value, struct block_use);
} block_io SEC(".maps");

/* Go on whenever a cgroup whose serial number falls there has done something: whoever finds one as it was
 * need not look its counters up. */
#define BLOCK_MARKS 1024
static __u64 block_marks[BLOCK_MARKS];

#define ALL_BITS_OF_OPERATION 0xff

static ALWAYS_INLINE void count_block(__u64 serial, __u32 loop, __u32 write, __u64 bytes, __u64 operations)
{
	struct block_use *use = bpf_map_lookup_elem(&block_io, &serial);
	struct block_counters *counters;

	if (!use) {
		struct block_use none = {};

		/* Refused when another CPU was faster: then its entry is there. */
		bpf_map_update_elem(&block_io, &serial, &none, MAP_NEW_ONLY);
		use = bpf_map_lookup_elem(&block_io, &serial);
		if (!use)
			return;
	}
	counters = loop ? &use->loops : &use->others;
	__sync_fetch_and_add(write ? &counters->write_bytes : &counters->read_bytes, bytes);
	if (operations)
		__sync_fetch_and_add(write ? &counters->writes : &counters->reads, operations);
	/* Not before the counters: the kernel keeps the order of what fetches, for which the answer must seem used. */
	__u64 before = __sync_fetch_and_add(&block_marks[serial % BLOCK_MARKS], 1);

	asm volatile("" : : "r"(before));
}

static ALWAYS_INLINE __u32 is_of_loop(struct bio *bio)
{
	if (__builtin_preserve_field_info(bio->bi_bdev, FIELD_EXISTS))
		return bio->bi_bdev->bd_disk->major == LOOP_MAJOR;
	return ((struct bio___before *)bio)->bi_disk->major == LOOP_MAJOR;
}

static ALWAYS_INLINE int count_bio(struct bio *bio, __u64 operations)
{
	__u32 bytes = bio->bi_iter.bi_size;
	__u32 operation = bio->bi_opf & ALL_BITS_OF_OPERATION;
	__u32 write = operation == __builtin_preserve_enum_value(*(enum req_op *)REQ_OP_WRITE, ENUM_VALUE);
	struct cgroup_subsys_state *css;
	__u32 loop;

	if (!bytes || !bio->bi_blkg ||
	    (!write && operation != __builtin_preserve_enum_value(*(enum req_op *)REQ_OP_READ, ENUM_VALUE)))
		return 0;
	loop = is_of_loop(bio);
	css = &bio->bi_blkg->blkcg->css;
	/* The root has no parent, and nobody asks for it. */
	for (int level = 0; level < MOST_LEVELS && css->parent; level++) {
		count_block(css->serial_nr, loop, write, bytes, operations);
		css = css->parent;
	}
	return 0;
}

SEC("tp_btf/block_getrq")
int count_request(__u64 *context)
{
	return count_bio((void *)context[0], 1);
}

SEC("tp_btf/block_bio_backmerge")
int count_joined_behind(__u64 *context)
{
	return count_bio((void *)context[0], 0);
}

SEC("tp_btf/block_bio_frontmerge")
int count_joined_before(__u64 *context)
{
	return count_bio((void *)context[0], 0);
}

#endif
