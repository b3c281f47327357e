/* The few kernel-internal types the cgroup walk reads. Only names matter: places are looked up in
 * the running kernel's BTF when the program is loaded. */
#ifndef CGROUP_TYPES_H
#define CGROUP_TYPES_H

#include "kernel.h"

#define FIELD_BYTE_OFFSET 0
#define FIELD_BYTE_SIZE 1
#define FIELD_EXISTS 2
#define ENUM_EXISTS 0
#define ENUM_VALUE 1
#define MAP_PERCPU_ARRAY 6
#define MAP_MMAPABLE 1024
#define MAP_NEW_ONLY 1

/* include/uapi/linux/major.h: loop devices. */
#define LOOP_MAJOR 7

/* Deepest nesting of cgroups looked at. */
#define MOST_LEVELS 16

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct seq_file;

struct atomic {
	__s64 counter;
};

struct bpf_iter_meta {
	struct seq_file *seq;
	__u64 session_id;
	__u64 seq_num;
};

struct task_cputime {
	__u64 stime;
	__u64 utime;
	__u64 sum_exec_runtime;
};

struct cgroup_base_stat {
	struct task_cputime cputime;
};

struct list_head {
	struct list_head *next;
};

struct count {
	__s32 counter;
};

struct refcount_struct {
	struct count refs;
};

struct kernfs_node {
	__u64 id;
};

struct cgroup;

struct cgroup_subsys_state {
	struct cgroup *cgroup;
	__u32 flags;
	__u64 serial_nr;
	struct cgroup_subsys_state *parent;
};

struct css_set {
	void *subsys[1];
	struct cgroup *dfl_cgrp;
};

struct cgroup {
	struct cgroup_subsys_state self;
	struct kernfs_node *kn;
	void *subsys[1];
	struct cgroup_base_stat bstat;
};

struct bpf_iter__cgroup {
	struct bpf_iter_meta *meta;
	struct cgroup *cgroup;
};

struct cpuacct {
	__u64 *cpuusage;
	void *cpustat;
};

struct cfs_bandwidth {
	__s32 nr_periods;
	__s32 nr_throttled;
	__u64 throttled_time;
};

struct task_group {
	struct cfs_bandwidth cfs_bandwidth;
};

struct page_counter {
	struct atomic usage;
	__u64 failcnt;
	__u64 watermark;
	__u64 max;
	struct page_counter *parent;
};

struct memcg_vmstats {
	__u64 state[1];
};

struct lruvec_stats {
	__u64 state[1];
};

struct mem_cgroup {
	struct page_counter memory;
	struct page_counter swap;
	struct memcg_vmstats *vmstats;
	struct atomic memory_events[1];
};

struct pids_cgroup {
	struct atomic counter;
	struct atomic limit;
	struct atomic events[1];
};

/* The same, as kernels before 6.11 have it. */
struct pids_cgroup___before {
	struct atomic events_limit;
};

struct bpf_array {
	void *pptrs[1];
};

struct hlist_node {
	struct hlist_node *next;
};

struct hlist_head {
	struct hlist_node *first;
};

struct blkcg {
	struct cgroup_subsys_state css;
	struct hlist_head blkg_list;
};

struct backing_dev_info {
	void *dev;
};

struct gendisk {
	__s32 major;
	struct backing_dev_info *bdi;
};

struct block_device {
	struct gendisk *bd_disk;
};

struct request_queue {
	struct gendisk *disk;
};

struct blkg_iostat {
	__u64 bytes[3];
	__u64 ios[3];
};

struct blkg_iostat_set {
	struct blkg_iostat cur;
};

struct blkcg_gq {
	struct request_queue *q;
	struct hlist_node blkcg_node;
	struct blkcg *blkcg;
	struct blkg_iostat_set iostat;
};

struct bvec_iter {
	__u32 bi_size;
};

struct bio {
	struct block_device *bi_bdev;
	__u32 bi_opf;
	struct bvec_iter bi_iter;
	struct blkcg_gq *bi_blkg;
};

/* The same, as kernels before 5.12 have it. */
struct bio___before {
	struct gendisk *bi_disk;
};

#pragma clang attribute pop

/* Numbers differ between kernels; these are placeholders that loading replaces. */
enum cgroup_subsys_id {
	cpu_cgrp_id = 1,
	cpuacct_cgrp_id = 2,
	io_cgrp_id = 3,
	memory_cgrp_id = 4,
	pids_cgrp_id = 11,
};

enum memcg_memory_event {
	MEMCG_MAX = 2,
	MEMCG_OOM = 3,
	MEMCG_OOM_KILL = 4,
};

enum req_op {
	REQ_OP_READ = 0,
	REQ_OP_WRITE = 1,
};

enum blkg_iostat_type {
	BLKG_IOSTAT_READ = 0,
	BLKG_IOSTAT_WRITE = 1,
};

enum node_stat_item {
	NR_INACTIVE_FILE = 2,
	NR_ANON_MAPPED = 17,
	NR_FILE_PAGES = 19,
	NR_SHMEM = 22,
};

enum memcg_stat_item {
	MEMCG_SWAP = 51,
	MEMCG_KMEM = 55,
};

/* The start of struct kernel_cpustat, in the order of enum cpu_usage_stat. */
struct cpu_times {
	__u64 user;
	__u64 nice;
	__u64 system;
	__u64 softirq;
	__u64 irq;
};

#endif
