/* What the walk over tasks tells the dataplane. `src/task_records.rs` is the same in Rust. */
#ifndef TASK_RECORDS_H
#define TASK_RECORDS_H

#include "kernel.h"

#define FILLED_TIMES 1
#define FILLED_RESIDENT 2
#define FILLED_IO 4

#define NAME_LENGTH 16

/* One process. */
struct task_record {
	/* Number of its container. */
	__u64 container;
	__u64 filled;
	__u32 pid;
	__u32 container_pid;
	__u32 parent_pid;
	__u32 threads;
	__u32 state;
	__u32 exit_state;
	/* Since boot, ns. */
	__u64 start_ns;
	/* By ticks, of all threads, those that have ended included, ns. */
	__u64 user_ns;
	__u64 system_ns;
	/* As the scheduler has it, ns. */
	__u64 runtime_ns;
	/* What the kernel has told last of its two parts, ns. */
	__u64 told_user_ns;
	__u64 told_system_ns;
	__u64 resident_pages;
	__u64 read_bytes;
	__u64 write_bytes;
	char name[NAME_LENGTH];
};

_Static_assert(sizeof(struct task_record) == 16 * 8, "the Rust side has as many words");

/* The order and the progress of a walk: written by both sides, never at once. */
struct task_walk {
	/* Not 0: this process alone, wherever it is. */
	__u64 only;
	/* Records filled. */
	__u64 count;
	__u64 finished;
	/* The program's own: how deep the pid namespace of the reader is, plus 1. */
	__u64 depth;
};

/* Processes of a container in this walk. */
struct task_tally {
	__u64 seen;
	__u64 listed;
};

#endif
