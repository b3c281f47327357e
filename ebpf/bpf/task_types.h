/* The few kernel-internal types of tasks that the walk over them reads. Only names matter: places are
 * looked up in the running kernel's BTF when the program is loaded. */
#ifndef TASK_TYPES_H
#define TASK_TYPES_H

#include "cgroup_types.h"

#define TYPE_SIZE 1

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct atomic32 {
	__s32 counter;
};

struct upid {
	__s32 nr;
	void *ns;
};

struct pid {
	__u32 level;
	struct upid numbers[1];
};

struct prev_cputime {
	__u64 utime;
	__u64 stime;
};

struct task_io_accounting {
	__u64 read_bytes;
	__u64 write_bytes;
};

/* Its count comes first. */
struct sequence_lock {
	char first;
};

struct signal_struct {
	struct atomic32 live;
	__s32 nr_threads;
	struct list_head thread_head;
	struct sequence_lock stats_lock;
	__u64 utime;
	__u64 stime;
	struct prev_cputime prev_cputime;
	struct task_io_accounting ioac;
	__u64 sum_sched_runtime;
};

/* Of all CPUs together, but for what each has counted apart since it last added its part. */
struct percpu_counter {
	__s64 count;
	__s32 *counters;
};

/* Before Linux 6.2. */
struct mm_rss_stat {
	struct atomic count[1];
};

struct mm_struct {
	struct percpu_counter rss_stat[1];
};

struct mm_struct___before {
	struct mm_rss_stat rss_stat;
};

struct sched_entity {
	__u64 sum_exec_runtime;
};

struct task_struct {
	__u32 __state;
	__s32 exit_state;
	__s32 pid;
	__s32 tgid;
	struct sched_entity se;
	struct mm_struct *mm;
	struct task_struct *real_parent;
	struct task_struct *group_leader;
	struct pid *thread_pid;
	struct list_head thread_node;
	__u64 utime;
	__u64 stime;
	__u64 start_boottime;
	char comm[16];
	struct signal_struct *signal;
	struct task_io_accounting ioac;
	struct css_set *cgroups;
};

struct bpf_iter__task {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
};

#pragma clang attribute pop

#endif
