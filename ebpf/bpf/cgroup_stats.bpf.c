/* Reads the kernel's own counters of every cgroup below a parent in one walk.
 *
 * An iterator program: the dataplane attaches it to a parent directory of one hierarchy and reads
 * the iterator; each cgroup of the next level fills one record. In version 1 a cgroup has the one
 * controller of its hierarchy, in version 2 all that are enabled: `filled` says which. The counters
 * of the kernel cover what is below a cgroup, so deeper levels need no record.
 *
 * What a kernel does not have is left out by BTF, field by field; nothing here compares versions.
 */
#include "cgroup_types.h"
#include "cgroup_records.h"
#include "block_io.h"

char LICENSE[] SEC("license") = "GPL";

/* Set by the loader. */
const volatile __u32 cpus = 1;
const volatile __u32 capacity = 1;

struct {
	MAP_UINT(type, MAP_ARRAY);
	MAP_UINT(map_flags, MAP_MMAPABLE);
	MAP_UINT(max_entries, 1);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, struct cgroup_record);
} records SEC(".maps");

struct {
	MAP_UINT(type, MAP_ARRAY);
	MAP_UINT(map_flags, MAP_MMAPABLE);
	MAP_UINT(max_entries, 1);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, struct cgroup_walk);
} walk SEC(".maps");

/* Its only use is its address on each CPU. */
struct {
	MAP_UINT(type, MAP_PERCPU_ARRAY);
	MAP_UINT(max_entries, 1);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, __u64);
} landmark SEC(".maps");

static __u64 cpu_offset[MOST_CPUS];
static volatile __u32 offsets_known;
/* The verifier forbids reckoning with the address of a map, but not with a number. */
static volatile __u64 landmark_address;
static volatile __u64 landmark_here;

static void *(*const map_lookup)(void *, const void *) = (void *)1;
static void *(*const map_lookup_percpu)(void *, const void *, __u32) = (void *)195;
static long (*const read_kernel)(void *, __u32, const void *) = (void *)113;

#define READ(into, from) read_kernel(&(into), sizeof(into), __builtin_preserve_access_index(&(from)))

static ALWAYS_INLINE __u64 read_u64(const void *from)
{
	__u64 value = 0;

	read_kernel(&value, sizeof(value), from);
	return value;
}

/* Where each CPU keeps its part of a per-CPU variable, relative to the variable's address. */
static ALWAYS_INLINE int learn_offsets(void)
{
	struct bpf_array *array;
	__u64 base = 0;
	__u32 zero = 0;

	landmark_address = (__u64)&landmark;
	array = (void *)landmark_address;
	if (!__builtin_preserve_field_info(array->pptrs, FIELD_EXISTS))
		return -1;
	/* The field and not its first element, which kernels that declare none refuse to relocate. */
	base = read_u64(__builtin_preserve_access_index(&array->pptrs));
	for (__u32 cpu = 0; cpu < cpus && cpu < MOST_CPUS; cpu++) {
		void *here = map_lookup_percpu(&landmark, &zero, cpu);

		if (!here || !base)
			return -1;
		landmark_here = (__u64)here;
		cpu_offset[cpu] = landmark_here - base;
	}
	offsets_known = 1;
	return 0;
}

/* A plain load: the verifier knows the type of the cgroup, and asking a helper costs ten times more. */
static ALWAYS_INLINE void *controller(struct cgroup *group, __u64 index)
{
	return *(void **)((char *)__builtin_preserve_access_index(&group->subsys) + 8 * index);
}

/* The controllers of all hierarchies that the processes of a cgroup have in common, where there are
 * any: so one walk tells what is in several hierarchies. A process may be elsewhere in another, which
 * is for the dataplane to find out by the serial numbers. */
#define MOST_CONTROLLERS 16
static void *joined[MOST_CONTROLLERS];

static ALWAYS_INLINE int join(struct cgroup *group)
{
	struct list_head *first = group->cset_links.next;
	struct css_set *set = 0;

	if (!__builtin_preserve_field_info(((struct css_set *)0)->subsys, FIELD_EXISTS) ||
	    !__builtin_preserve_field_info(((struct cgrp_cset_link *)0)->cset, FIELD_EXISTS) ||
	    (void *)first == (void *)__builtin_preserve_access_index(&group->cset_links))
		return 0;
	__u64 link = (__u64)first - __builtin_preserve_field_info(
		((struct cgrp_cset_link *)0)->cset_link, FIELD_BYTE_OFFSET);

	read_kernel(&set, sizeof(set), (void *)(link + __builtin_preserve_field_info(
		((struct cgrp_cset_link *)0)->cset, FIELD_BYTE_OFFSET)));
	return set && !read_kernel(joined, sizeof(joined),
				   __builtin_preserve_access_index(&set->subsys));
}

static ALWAYS_INLINE void *of(struct cgroup *group, int is_joined, __u64 index,
			      struct cgroup_record *record, int place)
{
	void *css = controller(group, index);

	if (!css && is_joined && index < MOST_CONTROLLERS)
		css = joined[index];
	if (css)
		READ(record->serials[place], ((struct cgroup_subsys_state *)css)->serial_nr);
	return css;
}

static ALWAYS_INLINE void read_cpuacct(struct cpuacct *account, struct cgroup_record *record)
{
	__u64 usage = 0, user = 0, system = 0;
	char *usages = 0, *stats = 0;

	if (!__builtin_preserve_field_info(account->cpuusage, FIELD_EXISTS) ||
	    !__builtin_preserve_field_info(account->cpustat, FIELD_EXISTS))
		return;
	READ(usages, account->cpuusage);
	READ(stats, account->cpustat);
	/* The root's are static variables and counted elsewhere. */
	if (!usages || !stats || !offsets_known)
		return;
	for (__u32 cpu = 0; cpu < cpus && cpu < MOST_CPUS; cpu++) {
		struct cpu_times times = {};

		usage += read_u64(usages + cpu_offset[cpu]);
		read_kernel(&times, sizeof(times), stats + cpu_offset[cpu]);
		user += times.user + times.nice;
		system += times.system + times.softirq + times.irq;
	}
	record->cpu_usage_ns = usage;
	record->cpu_user_ns = user;
	record->cpu_system_ns = system;
	record->filled |= FILLED_CPUACCT;
}

static ALWAYS_INLINE void read_base(struct cgroup *group, struct cgroup_record *record)
{
	if (!__builtin_preserve_field_info(group->bstat.cputime.sum_exec_runtime, FIELD_EXISTS))
		return;
	record->cpu_usage_ns = group->bstat.cputime.sum_exec_runtime;
	record->cpu_user_ns = group->bstat.cputime.utime;
	record->cpu_system_ns = group->bstat.cputime.stime;
	record->filled |= FILLED_CPU_BASE;
}

static ALWAYS_INLINE void read_quota(struct task_group *tasks, struct cgroup_record *record)
{
	__s32 periods = 0, throttled = 0;

	if (!__builtin_preserve_field_info(tasks->cfs_bandwidth.nr_throttled, FIELD_EXISTS))
		return;
	READ(periods, tasks->cfs_bandwidth.nr_periods);
	READ(throttled, tasks->cfs_bandwidth.nr_throttled);
	READ(record->throttled_ns, tasks->cfs_bandwidth.throttled_time);
	record->periods = (__u32)periods;
	record->throttled_periods = (__u32)throttled;
	record->filled |= FILLED_QUOTA;
}

/* Structures are read whole, for each reading costs about the same. One walk runs at a time, so
 * what is read last may lie here. */
static __u64 scratch[MOST_STATS];

#define PLACE(type, field) \
	__builtin_preserve_field_info(((struct type *)0)->field, FIELD_BYTE_OFFSET)
#define TAKE(type, field) (*(__u64 *)((char *)scratch + PLACE(type, field)))

#define COUNTER_SIZE 256
#define MOST_EVENTS 16
#define EVENT_NUMBER(name) \
	__builtin_preserve_enum_value(*(enum memcg_memory_event *)name, ENUM_VALUE)
#define EVENT(name) (EVENT_NUMBER(name) < MOST_EVENTS ? scratch[EVENT_NUMBER(name)] : 0)

/* The least limit of the cgroups above: the same for all siblings. */
static ALWAYS_INLINE __u64 limit_above(struct page_counter *counter, struct cgroup_walk *order)
{
	__u64 least = ~0ULL, own = 0;

	if ((__u64)counter == order->counter_above)
		return order->limit_above;
	order->counter_above = (__u64)counter;
	for (int level = 0; level < MOST_LEVELS && counter; level++) {
		READ(own, counter->max);
		if (own < least)
			least = own;
		READ(counter, counter->parent);
	}
	order->limit_above = least;
	return least;
}

static ALWAYS_INLINE void read_memory(struct mem_cgroup *memory, struct cgroup_record *record,
				      struct cgroup_walk *order)
{
	__u64 own, above;
	char *state = 0;

	if (!__builtin_preserve_field_info(memory->memory.watermark, FIELD_EXISTS) ||
	    !__builtin_preserve_field_info(memory->memory_events, FIELD_EXISTS) ||
	    !__builtin_preserve_field_info(memory->vmstats, FIELD_EXISTS) ||
	    PLACE(page_counter, watermark) > COUNTER_SIZE - 8 ||
	    PLACE(page_counter, failcnt) > COUNTER_SIZE - 8 ||
	    PLACE(page_counter, max) > COUNTER_SIZE - 8 ||
	    PLACE(page_counter, parent) > COUNTER_SIZE - 8)
		return;
	read_kernel(scratch, COUNTER_SIZE, __builtin_preserve_access_index(&memory->memory));
	record->memory_pages = TAKE(page_counter, usage.counter);
	record->memory_peak_pages = TAKE(page_counter, watermark);
	record->memory_failures = TAKE(page_counter, failcnt);
	own = TAKE(page_counter, max);
	record->memory_limit_pages = own;
	above = limit_above((void *)TAKE(page_counter, parent), order);
	record->memory_least_limit_pages = own < above ? own : above;
	read_kernel(scratch, COUNTER_SIZE, __builtin_preserve_access_index(&memory->swap));
	record->swap_pages = TAKE(page_counter, usage.counter);
	record->swap_limit_pages = TAKE(page_counter, max);
	record->swap_failures = TAKE(page_counter, failcnt);
	read_kernel(scratch, 8 * MOST_EVENTS, __builtin_preserve_access_index(&memory->memory_events));
	record->oom_events = EVENT(MEMCG_OOM);
	record->oom_kill_events = EVENT(MEMCG_OOM_KILL);
	record->memory_max_events = EVENT(MEMCG_MAX);
	READ(state, memory->vmstats);
	if (state) {
		/* No further than needed: each line of memory is a miss of the cache. */
		__u32 length = __builtin_preserve_field_info(
			((struct memcg_vmstats *)0)->state, FIELD_BYTE_SIZE);

		read_kernel(scratch, length < sizeof(scratch) ? length : sizeof(scratch),
			    state + PLACE(memcg_vmstats, state));
		for (int item = 0; item < STAT_ITEMS; item++) {
			__u64 index = order->stat_index[item];

			/* Small negative sums are a kernel's unfinished business: nothing is there. */
			__s64 pages = index < MOST_STATS ? (__s64)scratch[index] : 0;
			record->stat_pages[item] = pages < 0 ? 0 : pages;
		}
		record->filled |= FILLED_MEMORY_STAT;
	}
	record->filled |= FILLED_MEMORY;
}

static ALWAYS_INLINE void read_pids(struct pids_cgroup *pids, struct cgroup_record *record)
{
	struct pids_cgroup___before *before = (void *)pids;

	if (!__builtin_preserve_field_info(pids->counter, FIELD_EXISTS))
		return;
	READ(record->pids, pids->counter.counter);
	READ(record->pids_limit, pids->limit.counter);
	if (__builtin_preserve_field_info(pids->events, FIELD_EXISTS)) {
		READ(record->pids_limit_events, pids->events[0].counter);
		record->filled |= FILLED_PIDS_EVENTS;
	} else if (__builtin_preserve_field_info(before->events_limit, FIELD_EXISTS)) {
		READ(record->pids_limit_events, before->events_limit.counter);
		record->filled |= FILLED_PIDS_EVENTS;
	}
	record->filled |= FILLED_PIDS;
}

/* A cgroup without an entry has done nothing since this was loaded. */
static ALWAYS_INLINE void read_io(struct cgroup_record *record)
{
	struct block_counters *counters = map_lookup(&block_io, &record->serials[OF_IO]);
	struct block_counters none = {};

	record->io = counters ? *counters : none;
	record->filled |= FILLED_IO;
}

#define NUMBER(type, name)                                                              \
	(__builtin_preserve_enum_value(*(enum type *)name, ENUM_EXISTS) ?                \
		 __builtin_preserve_enum_value(*(enum type *)name, ENUM_VALUE) :         \
		 ~0ULL)

static ALWAYS_INLINE void tell_layout(struct cgroup_walk *order)
{
	order->enum_index[0] = NUMBER(node_stat_item, NR_INACTIVE_FILE);
	order->enum_index[1] = NUMBER(node_stat_item, NR_ANON_MAPPED);
	order->enum_index[2] = NUMBER(node_stat_item, NR_FILE_PAGES);
	order->enum_index[3] = NUMBER(node_stat_item, NR_SHMEM);
	order->enum_index[4] = NUMBER(memcg_stat_item, MEMCG_SWAP);
	order->enum_index[5] = NUMBER(memcg_stat_item, MEMCG_KMEM);
	if (__builtin_preserve_field_info(((struct memcg_vmstats *)0)->state, FIELD_EXISTS))
		order->stat_length = __builtin_preserve_field_info(
			((struct memcg_vmstats *)0)->state, FIELD_BYTE_SIZE) / 8;
	if (__builtin_preserve_field_info(((struct lruvec_stats *)0)->state, FIELD_EXISTS))
		order->node_stat_length = __builtin_preserve_field_info(
			((struct lruvec_stats *)0)->state, FIELD_BYTE_SIZE) / 8;
}

SEC("iter/cgroup")
int read_cgroups(struct bpf_iter__cgroup *context)
{
	struct cgroup *group = context->cgroup;
	struct cgroup_walk *order;
	struct cgroup_record *record;
	__u32 zero = 0, place;
	__s32 level = 0;
	void *css;

	order = map_lookup(&walk, &zero);
	if (!order)
		return 0;
	if (!group) {
		order->finished++;
		return 0;
	}
	if (!offsets_known)
		learn_offsets();
	level = group->level;
	if (order->begin) {
		order->begin = 0;
		order->counter_above = 0;
		order->level = (__u32)level;
		tell_layout(order);
	}
	if ((__u32)level > (__u32)order->level + 1)
		return 0;
	place = (__u32)order->count;
	if (place >= capacity) {
		order->left_out++;
		return 0;
	}
	record = map_lookup(&records, &place);
	if (!record)
		return 0;
	order->count = (__u64)place + 1;
	record->filled = 0;
	record->id = group->kn->id;
	for (int place = 0; place < CONTROLLERS; place++)
		record->serials[place] = 0;
	int is_joined = order->join ? join(group) : 0;

#define CONTROLLER(name, place) \
	(__builtin_preserve_enum_value(*(enum cgroup_subsys_id *)name, ENUM_EXISTS) ? \
		 of(group, is_joined, \
		    __builtin_preserve_enum_value(*(enum cgroup_subsys_id *)name, ENUM_VALUE), \
		    record, place) : 0)

	css = CONTROLLER(cpuacct_cgrp_id, OF_CPUACCT);
	if (css)
		read_cpuacct(css, record);
	if (order->unified)
		read_base(group, record);
	css = CONTROLLER(cpu_cgrp_id, OF_CPU);
	if (css)
		read_quota(css, record);
	css = CONTROLLER(memory_cgrp_id, OF_MEMORY);
	if (css)
		read_memory(css, record, order);
	css = CONTROLLER(io_cgrp_id, OF_IO);
	if (css && !order->unified)
		read_io(record);
	css = CONTROLLER(pids_cgrp_id, OF_PIDS);
	if (css)
		read_pids(css, record);
	return 0;
}
