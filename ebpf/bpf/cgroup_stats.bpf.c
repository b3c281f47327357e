/* Reads the kernel's own counters of all containers in one run.
 *
 * Two iterator programs. The dataplane attaches `find_cgroup` to a container's directory in a hierarchy
 * once, which tells where the kernel keeps the states of its controllers; the addresses go to `targets`.
 * `read_targets` is attached to a root and run once per pass: it reads by these addresses, one record
 * per container, so nothing is walked and no lock is held. A state is believed while it has the
 * serial number it was found with and is not marked as going away; it can't be freed meanwhile, for the
 * program runs as a reader of RCU. In version 1 a container has a cgroup in each hierarchy, in version
 * 2 one: `filled` says what could be read. The counters of the kernel cover what is below a cgroup.
 *
 * Block devices of version 2 are counted by the kernel (`read_devices`), those of version 1 here
 * (`block_io.h`).
 *
 * What a kernel does not have is left out by BTF, field by field; nothing here compares versions.
 */
#include "cgroup_types.h"
#include "cgroup_records.h"
#include "percpu.h"
#include "reading.h"
#include "block_io.h"

char LICENSE[] SEC("license") = "GPL";

struct {
	MAP_UINT(type, MAP_ARRAY);
	MAP_UINT(map_flags, MAP_MMAPABLE);
	MAP_UINT(max_entries, 1);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, struct cgroup_target);
} targets SEC(".maps");

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

/* Needs the maps. */
#include "link_stats.h"

/* A plain load: the verifier knows the type of the cgroup, and asking a helper costs ten times more. */
static ALWAYS_INLINE void *controller(struct cgroup *group, __u64 index)
{
	return *(void **)((char *)__builtin_preserve_access_index(&group->subsys) + 8 * index);
}

/* include/linux/cgroup-defs.h: CSS_ONLINE and CSS_DYING, which have no names in BTF. The dataplane tries
 * them on a root. */
#define ONLINE 2
#define DYING 16

/* A state that is still the one it was, else nothing. */
static ALWAYS_INLINE void *alive(struct cgroup_target *target, struct cgroup_record *record, int place,
				 const int plain)
{
	struct cgroup_subsys_state *state = (void *)target->states[place];
	__u64 serial = 0;
	__u32 flags = 0;

	if (!state)
		return 0;
	READ(serial, state->serial_nr);
	READ(flags, state->flags);
	if (serial != target->serials[place] || (flags & (ONLINE | DYING)) != ONLINE)
		return 0;
	record->alive |= 1 << place;
	return state;
}

static ALWAYS_INLINE void read_cpuacct(struct cgroup_target *target, struct cgroup_record *record,
				       const int plain)
{
	__u64 usage = 0, user = 0, system = 0;
	char *usages = (void *)target->cpu_usages, *stats = (void *)target->cpu_times;

	/* The root's are static variables and counted elsewhere. */
	if (!usages || !stats || !offsets_known)
		return;
	for (__u32 cpu = 0; cpu < cpus && cpu < MOST_CPUS; cpu++) {
		struct cpu_times *times = (void *)(stats + cpu_offset[cpu]);

		usage += read_u64(usages + cpu_offset[cpu], plain);
		user += read_u64(&times->user, plain) + read_u64(&times->nice, plain);
		system += read_u64(&times->system, plain) + read_u64(&times->softirq, plain) +
			  read_u64(&times->irq, plain);
	}
	record->cpu_usage_ns = usage;
	record->cpu_user_ns = user;
	record->cpu_system_ns = system;
	record->filled |= FILLED_CPUACCT;
}

/* The state is the first the kernel knows of a cgroup: its own. */
static ALWAYS_INLINE void read_base(char *state, struct cgroup_record *record, const int plain)
{
	struct cgroup *group = (void *)(state - __builtin_preserve_field_info(
		((struct cgroup *)0)->self, FIELD_BYTE_OFFSET));
	struct task_cputime time = {};

	if (!__builtin_preserve_field_info(group->bstat.cputime.sum_exec_runtime, FIELD_EXISTS))
		return;
	READ(time.sum_exec_runtime, group->bstat.cputime.sum_exec_runtime);
	READ(time.utime, group->bstat.cputime.utime);
	READ(time.stime, group->bstat.cputime.stime);
	record->cpu_usage_ns = time.sum_exec_runtime;
	record->cpu_user_ns = time.utime;
	record->cpu_system_ns = time.stime;
	record->filled |= FILLED_CPU_BASE;
}

static ALWAYS_INLINE void read_quota(struct task_group *tasks, struct cgroup_record *record,
				     const int plain)
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

#define EVENT(name)                                                                            \
	read_u64((char *)__builtin_preserve_access_index(&memory->memory_events) +              \
		 8 * __builtin_preserve_enum_value(*(enum memcg_memory_event *)name, ENUM_VALUE), plain)

/* The least limit of the cgroups above: the same for all siblings. */
static ALWAYS_INLINE __u64 limit_above(struct page_counter *counter, struct cgroup_walk *order,
				      const int plain)
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

/* Field by field, and no further than needed: each line of memory is a miss of the cache. */
static ALWAYS_INLINE void read_memory(struct mem_cgroup *memory, struct cgroup_target *target,
				      struct cgroup_record *record, struct cgroup_walk *order,
				      const int plain)
{
	__u64 above = 0;
	struct page_counter *parent = 0;
	char *state = (void *)target->memory_statistics;

	if (!__builtin_preserve_field_info(memory->memory.watermark, FIELD_EXISTS) ||
	    !__builtin_preserve_field_info(memory->memory_events, FIELD_EXISTS))
		return;
	READ(record->memory_pages, memory->memory.usage.counter);
	READ(record->memory_peak_pages, memory->memory.watermark);
	READ(record->memory_failures, memory->memory.failcnt);
	READ(record->memory_limit_pages, memory->memory.max);
	READ(parent, memory->memory.parent);
	above = limit_above(parent, order, plain);
	record->memory_least_limit_pages =
		record->memory_limit_pages < above ? record->memory_limit_pages : above;
	READ(record->swap_pages, memory->swap.usage.counter);
	READ(record->swap_limit_pages, memory->swap.max);
	READ(record->swap_failures, memory->swap.failcnt);
	record->oom_events = EVENT(MEMCG_OOM);
	record->oom_kill_events = EVENT(MEMCG_OOM_KILL);
	record->memory_max_events = EVENT(MEMCG_MAX);
	if (state) {
		for (int item = 0; item < STAT_ITEMS; item++) {
			__u64 index = order->stat_index[item];
			__s64 pages = index < MOST_STATS ? (__s64)read_u64(state + 8 * index, plain) : 0;

			/* Small negative sums are a kernel's unfinished business: nothing is there. */
			record->stat_pages[item] = pages < 0 ? 0 : pages;
		}
		record->filled |= FILLED_MEMORY_STAT;
	}
	record->filled |= FILLED_MEMORY;
}

static ALWAYS_INLINE void read_pids(struct pids_cgroup *pids, struct cgroup_record *record,
				    const int plain)
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

/* A cgroup without an entry has done nothing since this was loaded. Entries are looked up when something was
 * done, and now and then, which tells the map that they are needed. */
static ALWAYS_INLINE void read_io(struct cgroup_target *target, struct cgroup_record *record,
				  __u64 needed)
{
	__u64 *mark = &block_marks[target->serials[OF_IO] % BLOCK_MARKS];
	struct block_use *use;
	struct block_use none = {};

	record->filled |= FILLED_IO;
	if (*(volatile __u64 *)mark + 1 == target->io_mark && !needed)
		return;
	/* Before the counters. */
	target->io_mark = __sync_fetch_and_add(mark, 0) + 1;
	use = map_lookup(&block_io, &target->serials[OF_IO]);
	if (!use)
		use = &none;
	record->io = use->others;
	record->loops_io = use->loops;
}

/* One device after the other of those a cgroup has used. */
struct devices {
	__u64 next;
	/* A loop device is among them. */
	__u64 loops;
	struct block_counters sums;
};

/* Devices of one cgroup; who has more is read by files. */
#define MOST_DEVICES 4096

#define DEVICE_COUNTER(array, name)                                                             \
	read_u64((char *)__builtin_preserve_access_index(&device->iostat.cur.array) +           \
		 8 * __builtin_preserve_enum_value(*(enum blkg_iostat_type *)name, ENUM_VALUE), plain)

#define KNOWS_NAMES                                                                 \
	(__builtin_preserve_field_info(((struct gendisk *)0)->bdi, FIELD_EXISTS) && \
	 __builtin_preserve_field_info(((struct backing_dev_info *)0)->dev, FIELD_EXISTS))

static ALWAYS_INLINE long add_device(struct devices *devices, const int plain)
{
	struct hlist_node *node = (void *)devices->next;
	struct blkcg_gq *device;
	struct request_queue *queue = 0;
	struct gendisk *disk = 0;
	__s32 major = 0;

	if (!node)
		return 1;
	device = (void *)((char *)node - PLACE(blkcg_gq, blkcg_node));
	READ(node, node->next);
	devices->next = (__u64)node;
	/* The kernel's file leaves out a queue that has lost its disk. */
	READ(queue, device->q);
	READ(disk, queue->disk);
	if (!disk)
		return 0;
	/* It has no name for a path of NVMe, whose operations the disk has that is reached by it. */
	if (KNOWS_NAMES) {
		struct backing_dev_info *info = 0;
		void *named = 0;

		READ(info, disk->bdi);
		if (info)
			READ(named, info->dev);
		if (!named)
			return 0;
	}
	READ(major, disk->major);
	if (major == LOOP_MAJOR)
		devices->loops = 1;
	devices->sums.read_bytes += DEVICE_COUNTER(bytes, BLKG_IOSTAT_READ);
	devices->sums.write_bytes += DEVICE_COUNTER(bytes, BLKG_IOSTAT_WRITE);
	devices->sums.reads += DEVICE_COUNTER(ios, BLKG_IOSTAT_READ);
	devices->sums.writes += DEVICE_COUNTER(ios, BLKG_IOSTAT_WRITE);
	return 0;
}

static long add_device_by_helper(__u32 number, void *devices)
{
	(void)number;
	return add_device(devices, 0);
}

static long add_device_plainly(__u32 number, void *devices)
{
	(void)number;
	return add_device(devices, 1);
}

/* What the kernel itself has counted for a cgroup and those below it, device by device, as of the last
 * flush: block/blk-cgroup.c, blkcg_print_stat. Devices that go leave the list, and are freed when no reader of
 * RCU can be on them. */
static ALWAYS_INLINE void read_devices(struct blkcg *group, struct cgroup_record *record, const int plain)
{
	struct devices devices = {};
	struct hlist_node *first = 0;

	READ(first, group->blkg_list.first);
	devices.next = (__u64)first;
	if (first)
		loop(MOST_DEVICES, plain ? (void *)add_device_plainly : (void *)add_device_by_helper, &devices, 0);
	if (devices.next)
		return;
	record->io = devices.sums;
	record->filled |= devices.loops ? FILLED_IO | FILLED_LOOPS : FILLED_IO;
}

#define KNOWS_DEVICES                                                                            \
	(__builtin_preserve_field_info(((struct blkcg *)0)->blkg_list.first, FIELD_EXISTS) &&    \
	 __builtin_preserve_field_info(((struct hlist_node *)0)->next, FIELD_EXISTS) &&          \
	 __builtin_preserve_field_info(((struct blkcg_gq *)0)->blkcg_node, FIELD_EXISTS) &&      \
	 __builtin_preserve_field_info(((struct blkcg_gq *)0)->q, FIELD_EXISTS) &&               \
	 __builtin_preserve_field_info(((struct request_queue *)0)->disk, FIELD_EXISTS) &&       \
	 __builtin_preserve_field_info(((struct gendisk *)0)->major, FIELD_EXISTS) &&            \
	 __builtin_preserve_field_info(((struct blkcg_gq *)0)->iostat.cur.bytes, FIELD_EXISTS) && \
	 __builtin_preserve_field_info(((struct blkcg_gq *)0)->iostat.cur.ios, FIELD_EXISTS) &&  \
	 __builtin_preserve_enum_value(*(enum blkg_iostat_type *)BLKG_IOSTAT_READ, ENUM_EXISTS) && \
	 __builtin_preserve_enum_value(*(enum blkg_iostat_type *)BLKG_IOSTAT_WRITE, ENUM_EXISTS))

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

static ALWAYS_INLINE void find(struct cgroup *group, struct cgroup_target *found, int place, __u64 index)
{
	struct cgroup_subsys_state *state = controller(group, index);
	const int plain = 0;

	found->states[place] = (__u64)state;
	if (state)
		READ(found->serials[place], state->serial_nr);
}

/* Tells where a cgroup's controllers have their states. */
SEC("iter/cgroup")
int find_cgroup(struct bpf_iter__cgroup *context)
{
	struct cgroup *group = context->cgroup;
	struct cgroup_walk *order;
	struct cgroup_target *found;
	struct cpuacct *account;
	struct mem_cgroup *memory;
	char *statistics = 0;
	__u32 zero = 0;
	const int plain = 0;

	order = map_lookup(&walk, &zero);
	if (!order || !group)
		return 0;
	tell_layout(order);
	found = &order->found;

#define FIND(name, place)                                                               \
	if (__builtin_preserve_enum_value(*(enum cgroup_subsys_id *)name, ENUM_EXISTS)) \
		find(group, found, place,                                               \
		     __builtin_preserve_enum_value(*(enum cgroup_subsys_id *)name, ENUM_VALUE))

	FIND(cpuacct_cgrp_id, OF_CPUACCT);
	FIND(cpu_cgrp_id, OF_CPU);
	FIND(memory_cgrp_id, OF_MEMORY);
	FIND(io_cgrp_id, OF_IO);
	FIND(pids_cgrp_id, OF_PIDS);
	account = (void *)found->states[OF_CPUACCT];
	if (account && __builtin_preserve_field_info(account->cpuusage, FIELD_EXISTS) &&
	    __builtin_preserve_field_info(account->cpustat, FIELD_EXISTS)) {
		READ(found->cpu_usages, account->cpuusage);
		READ(found->cpu_times, account->cpustat);
	}
	memory = (void *)found->states[OF_MEMORY];
	if (memory && __builtin_preserve_field_info(memory->vmstats, FIELD_EXISTS)) {
		READ(statistics, memory->vmstats);
		if (statistics)
			found->memory_statistics = (__u64)statistics + PLACE(memcg_vmstats, state);
	}
	found->unified = order->unified;
	if (order->unified) {
		found->states[OF_CPUACCT] = (__u64)&group->self;
		found->serials[OF_CPUACCT] = group->self.serial_nr;
		found->io_unified = 1;
		/* Files tell. */
		if (!KNOWS_DEVICES)
			found->states[OF_IO] = 0;
	}
	order->has_found = 1;
	return 0;
}

static ALWAYS_INLINE int read_target(__u32 place, const int plain)
{
	struct cgroup_target *target = map_lookup(&targets, &place);
	struct cgroup_record *record = map_lookup(&records, &place);
	__u32 zero = 0;
	struct cgroup_walk *order = map_lookup(&walk, &zero);
	void *state;

	if (!target || !record || !order)
		return 1;
	record->filled = 0;
	record->alive = 0;
	state = alive(target, record, OF_CPUACCT, plain);
	if (state && target->unified)
		read_base(state, record, plain);
	else if (state)
		read_cpuacct(target, record, plain);
	state = alive(target, record, OF_CPU, plain);
	if (state)
		read_quota(state, record, plain);
	state = alive(target, record, OF_MEMORY, plain);
	if (state)
		read_memory(state, target, record, order, plain);
	state = alive(target, record, OF_IO, plain);
	if (state && !target->io_unified)
		read_io(target, record, (order->passes + place) % LOOK_AGAIN == 0);
	else if (state && KNOWS_DEVICES)
		read_devices(state, record, plain);
	state = alive(target, record, OF_PIDS, plain);
	if (state)
		read_pids(state, record, plain);
	return 0;
}

static int read_by_helper(__u32 place, void *unused)
{
	(void)unused;
	return read_target(place, 0);
}

static int read_plainly(__u32 place, void *unused)
{
	(void)unused;
	return read_target(place, 1);
}

static ALWAYS_INLINE struct cgroup_walk *begin(struct bpf_iter__cgroup *context)
{
	struct cgroup_walk *order;
	__u32 zero = 0;

	order = map_lookup(&walk, &zero);
	if (!order || !context->cgroup)
		return 0;
	if (!offsets_known)
		learn_offsets();
	order->counter_above = 0;
	order->limit_above = ~0ULL;
	order->passes++;
	if (reads_links)
		begin_links();
	return order;
}

/* Fills the record of each target. */
SEC("iter/cgroup")
int read_targets(struct bpf_iter__cgroup *context)
{
	struct cgroup_walk *order = begin(context);

	if (order) {
		loop(order->count, read_by_helper, 0, 0);
		if (reads_links)
			loop(order->links, read_link_by_helper, 0, 0);
	}
	return 0;
}

/* The same by plain loads. */
SEC("iter/cgroup")
int read_targets_plainly(struct bpf_iter__cgroup *context)
{
	struct cgroup_walk *order = begin(context);

	if (order && WIDE_TYPES_BEGIN_SO) {
		loop(order->count, read_plainly, 0, 0);
		if (reads_links)
			loop(order->links, read_link_plainly, 0, 0);
	}
	return 0;
}
