/* What the cgroup walk tells the dataplane. `src/cgroup_records.rs` is the same in Rust; sizes and
 * offsets are asserted there. */
#ifndef CGROUP_RECORDS_H
#define CGROUP_RECORDS_H

#include "kernel.h"

/* Most CPUs whose parts are added up; beyond, CPU time is read from files. */
#define MOST_CPUS 1024
/* Deepest nesting of parents looked at for the limit in force. */
#define MOST_LEVELS 16
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

#define FILLED_CPUACCT 1
#define FILLED_CPU_BASE 2
#define FILLED_QUOTA 4
#define FILLED_MEMORY 8
#define FILLED_MEMORY_STAT 16
#define FILLED_PIDS 32
#define FILLED_PIDS_EVENTS 64
#define FILLED_IO 128

struct block_counters {
	__u64 read_bytes;
	__u64 write_bytes;
	__u64 reads;
	__u64 writes;
};

struct cgroup_record {
	__u64 id;
	__u64 filled;
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
	/* Of each controller's state that was read: no two ever have the same. */
	__u64 serials[CONTROLLERS];
	__u64 stat_pages[STAT_ITEMS];
};

_Static_assert(sizeof(struct cgroup_record) == 37 * 8, "the Rust side has as many words");

/* The order and the progress of a walk: written by both sides, never at once. */
struct cgroup_walk {
	__u64 begin;
	__u64 unified;
	__u64 level;
	__u64 count;
	__u64 left_out;
	__u64 finished;
	/* Where the kernel's array of memory statistics has inactive file, anonymous, file, shared,
	 * swapped and kernel pages: as the dataplane found out. */
	__u64 stat_index[STAT_ITEMS];
	/* The same as the kernel's enumerations number them, and how long two arrays are. */
	__u64 enum_index[STAT_ITEMS];
	__u64 stat_length;
	__u64 node_stat_length;
	/* 1 to read what other hierarchies have of the same processes too. */
	__u64 join;
	/* The program's own: whose limit it looked up last, and that limit. */
	__u64 counter_above;
	__u64 limit_above;
};

#endif
