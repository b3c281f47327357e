/* Counts what block devices have done for each cgroup of version 1, whose own files miss it: some
 * kernels count nothing there unless a limit is set.
 *
 * At each completed part of a request the bytes go to the cgroup it was made for and to those above
 * it. Only a write counts as one: discards and flushes have bits of the operation in common with it.
 * Buffered writes are the root's in version 1, by design.
 */
#ifndef BLOCK_IO_H
#define BLOCK_IO_H

#include "cgroup_types.h"
#include "cgroup_records.h"

/* By the serial number of the cgroup's state. Those that are gone are pushed out by others; there is room for four times the
 * containers there may be. */
struct {
	MAP_UINT(type, MAP_LRU_HASH);
	MAP_UINT(max_entries, 1);
	MAP_TYPE(key, __u64);
	MAP_TYPE(value, struct block_counters);
} block_io SEC(".maps");

#define ALL_BITS_OF_OPERATION 0xff

static ALWAYS_INLINE void count_block(__u64 serial, __u32 write, __u64 bytes, __u64 operations)
{
	struct block_counters *counters = bpf_map_lookup_elem(&block_io, &serial);

	if (!counters) {
		struct block_counters none = {};

		/* Refused when another CPU was faster: then its entry is there. */
		bpf_map_update_elem(&block_io, &serial, &none, MAP_NEW_ONLY);
		counters = bpf_map_lookup_elem(&block_io, &serial);
		if (!counters)
			return;
	}
	__sync_fetch_and_add(write ? &counters->write_bytes : &counters->read_bytes, bytes);
	if (operations)
		__sync_fetch_and_add(write ? &counters->writes : &counters->reads, operations);
}

SEC("tp_btf/block_rq_complete")
int count_block_io(__u64 *context)
{
	struct request *request = (void *)context[0];
	__u8 failed = context[1];
	__u32 bytes = context[2];
	__u32 operation = request->cmd_flags & ALL_BITS_OF_OPERATION;
	__u32 write = operation == __builtin_preserve_enum_value(*(enum req_op *)REQ_OP_WRITE, ENUM_VALUE);
	struct cgroup_subsys_state *css;

	if (failed || !bytes ||
	    (!write && operation != __builtin_preserve_enum_value(*(enum req_op *)REQ_OP_READ, ENUM_VALUE)))
		return 0;
	/* A request may complete in parts; it is one operation, done with the last of them. */
	__u64 operations = bytes >= request->__data_len;

	if (!request->bio || !request->bio->bi_blkg)
		return 0;
	css = &request->bio->bi_blkg->blkcg->css;
	/* The root has no parent, and nobody asks for it. */
	for (int level = 0; level < MOST_LEVELS && css->parent; level++) {
		count_block(css->serial_nr, write, bytes, operations);
		css = css->parent;
	}
	return 0;
}

#endif
