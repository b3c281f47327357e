/* What the cgroup walk tells the dataplane. `src/cgroup_records.rs` is the same in Rust; sizes and
 * offsets are asserted there. */
#ifndef CGROUP_RECORDS_H
#define CGROUP_RECORDS_H

#include "kernel.h"

/* Largest index into the kernel's array of memory statistics. */
#define MOST_STATS 64
#define STAT_ITEMS 6
/* Controllers, by the places of their serial numbers. */
#define OF_CPUACCT 0
#define OF_CPU 1
#define OF_MEMORY 2
#define OF_IO 3
#define OF_PIDS 4
#define CONTROLLERS 5
/* After so many passes counters of block devices are looked up whether or not something was done. */
#define LOOK_AGAIN 16

#define FILLED_CPUACCT 1
#define FILLED_CPU_BASE 2
#define FILLED_QUOTA 4
#define FILLED_MEMORY 8
#define FILLED_MEMORY_STAT 16
#define FILLED_PIDS 32
#define FILLED_PIDS_EVENTS 64
#define FILLED_IO 128
/* Loop devices are among those that the kernel has counted for. */
#define FILLED_LOOPS 256

struct block_counters {
	__u64 read_bytes;
	__u64 write_bytes;
	__u64 reads;
	__u64 writes;
};

/* What is read of a container: where the kernel keeps the state of each controller for it. Found once
 * (`find_cgroup`); no two states ever have the same serial number, so an address that is used again
 * is seen. */
struct cgroup_target {
	__u64 states[CONTROLLERS];
	__u64 serials[CONTROLLERS];
	/* 1 when CPU time is that of the unified tree; the state is the cgroup's own then. */
	__u64 unified;
	/* What the states lead to for as long as they live: CPU time per CPU, statistics of memory. */
	__u64 cpu_usages;
	__u64 cpu_times;
	__u64 memory_statistics;
	/* The reading program's own: how far block devices had come when their counters were looked up, plus 1. */
	__u64 io_mark;
	/* 1 when the kernel's own counters of block devices are read: those of the unified tree. */
	__u64 io_unified;
};

_Static_assert(sizeof(struct cgroup_target) == 16 * 8, "the Rust side has as many words");

struct cgroup_record {
	__u64 filled;
	/* Bit i: the state of controller i is there. */
	__u64 alive;
	__u64 cpu_usage_ns;
	__u64 cpu_user_ns;
	__u64 cpu_system_ns;
	__u64 periods;
	__u64 throttled_periods;
	__u64 throttled_ns;
	__u64 memory_pages;
	__u64 memory_limit_pages;
	__u64 memory_least_limit_pages;
	__u64 memory_peak_pages;
	__u64 memory_failures;
	__u64 swap_pages;
	__u64 swap_limit_pages;
	__u64 swap_failures;
	__u64 oom_events;
	__u64 oom_kill_events;
	__u64 memory_max_events;
	__u64 pids;
	__u64 pids_limit;
	__u64 pids_limit_events;
	struct block_counters io;
	/* In version 1 those of loop devices, which are not among the others then. */
	struct block_counters loops_io;
	__u64 stat_pages[STAT_ITEMS];
};

_Static_assert(sizeof(struct cgroup_record) == 36 * 8, "the Rust side has as many words");

/* Orders and answers: written by both sides, never at once. */
struct cgroup_walk {
	/* Targets to read. */
	__u64 count;
	/* 1 to find a cgroup of the unified tree. */
	__u64 unified;
	/* 1 once `find_cgroup` has found one. */
	__u64 has_found;
	struct cgroup_target found;
	/* Where the kernel's array of memory statistics has inactive file, anonymous, file, shared,
	 * swapped and kernel pages: as the dataplane found out. */
	__u64 stat_index[STAT_ITEMS];
	/* The same as the kernel's enumerations number them, and how long two arrays are. */
	__u64 enum_index[STAT_ITEMS];
	__u64 stat_length;
	__u64 node_stat_length;
	/* The program's own: whose limit it looked up last, that limit, and how often it ran. */
	__u64 counter_above;
	__u64 limit_above;
	__u64 passes;
	/* Links to read (`link_records.h`). */
	__u64 links;
	/* 1 when what is read of them is compared: all their queues are looked at. */
	__u64 links_compared;
};

#endif
