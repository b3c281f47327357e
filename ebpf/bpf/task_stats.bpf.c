/* Lists the processes of containers with what they use, in one walk over all tasks.
 *
 * An iterator program: the dataplane says which cgroups are containers and reads the iterator; each
 * process in or below one of them fills a record, until its container has as many as it may. What is
 * read is what /proc/<pid>/stat, status and io would tell, from the same fields, without taking any
 * lock: a task that hangs, or a memory map that is locked, delays nothing here.
 *
 * What a kernel does not have is left out by BTF, field by field; nothing here compares versions.
 */
#include "task_types.h"
#include "task_records.h"
#include "percpu.h"

char LICENSE[] SEC("license") = "GPL";

#define HIERARCHY_UNIFIED 0
#define HIERARCHY_PIDS 1
#define HIERARCHY_CPUACCT 2
#define HIERARCHY_MEMORY 3

/* Set by the loader. */
const volatile __u32 hierarchy = HIERARCHY_UNIFIED;
const volatile __u32 capacity = 1;
const volatile __u32 per_container = 1;

/* Numbers of containers, by the id of their cgroup. */
struct {
	MAP_UINT(type, MAP_HASH);
	MAP_UINT(max_entries, 1);
	MAP_TYPE(key, __u64);
	MAP_TYPE(value, __u32);
} containers SEC(".maps");

struct {
	MAP_UINT(type, MAP_ARRAY);
	MAP_UINT(map_flags, MAP_MMAPABLE);
	MAP_UINT(max_entries, 1);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, struct task_tally);
} tallies SEC(".maps");

struct {
	MAP_UINT(type, MAP_ARRAY);
	MAP_UINT(map_flags, MAP_MMAPABLE);
	MAP_UINT(max_entries, 1);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, struct task_record);
} tasks SEC(".maps");

struct {
	MAP_UINT(type, MAP_ARRAY);
	MAP_UINT(map_flags, MAP_MMAPABLE);
	MAP_UINT(max_entries, 1);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, struct task_walk);
} walk SEC(".maps");

static __u64 (*const current_task)(void) = (void *)35;
static long (*const loop)(__u32, void *, void *, __u64) = (void *)181;

#define READ(into, from) read_kernel(&(into), sizeof(into), __builtin_preserve_access_index(&(from)))

/* In linux/mm_types_task.h, without a name to look up. */
#define FILE_PAGES 0
#define ANONYMOUS_PAGES 1
#define SHARED_PAGES 3

/* More threads than this in one process are not added up: its times stay unknown. */
#define MOST_THREADS 16384

#define PLACE(type, field) \
	__builtin_preserve_field_info(((struct type *)0)->field, FIELD_BYTE_OFFSET)
#define HAS(type, field) \
	__builtin_preserve_field_info(((struct type *)0)->field, FIELD_EXISTS)

/* The number of the container that a task is in, by the nearest cgroup above it that is one. */
static ALWAYS_INLINE __u32 *container_of_task(struct task_struct *task)
{
	struct cgroup *group;

#define OF_CONTROLLER(name)                                                                      \
	((struct cgroup_subsys_state *)*(void **)((char *)__builtin_preserve_access_index(       \
		 &task->cgroups->subsys) +                                                       \
		 8 * __builtin_preserve_enum_value(*(enum cgroup_subsys_id *)name, ENUM_VALUE))) \
		->cgroup

	if (hierarchy == HIERARCHY_PIDS)
		group = OF_CONTROLLER(pids_cgrp_id);
	else if (hierarchy == HIERARCHY_CPUACCT)
		group = OF_CONTROLLER(cpuacct_cgrp_id);
	else if (hierarchy == HIERARCHY_MEMORY)
		group = OF_CONTROLLER(memory_cgrp_id);
	else
		group = task->cgroups->dfl_cgrp;
	for (int level = 0; level < MOST_LEVELS; level++) {
		struct cgroup_subsys_state *above;
		__u64 id = group->kn->id;
		__u32 *found = map_lookup(&containers, &id);

		if (found)
			return found;
		above = group->self.parent;
		if (!above)
			return 0;
		group = above->cgroup;
	}
	return 0;
}

/* The number that a pid namespace so deep has for the first thread of a process; 0 none. Its pid is a
 * plain number here: older verifiers add no variable to a pointer whose type they know. */
static ALWAYS_INLINE __u32 number(__u64 pid, __u32 level)
{
	__u32 number = 0;
	__u32 size = __builtin_preserve_type_info(*(struct upid *)0, TYPE_SIZE);

	read_kernel(&number, sizeof(number),
		    (char *)pid + PLACE(pid, numbers) + PLACE(upid, nr) + (__u64)size * level);
	return number;
}

static ALWAYS_INLINE __u64 pid_of(struct task_struct *task)
{
	__u64 pid = 0;

	READ(pid, task->thread_pid);
	return pid;
}

static ALWAYS_INLINE __u32 depth_of(__u64 pid)
{
	__u32 level = 0;

	READ(level, ((struct pid *)pid)->level);
	return level;
}

struct sum {
	__u64 next;
	__u64 user;
	__u64 system;
	__u64 runtime;
	__u64 read;
	__u64 written;
	__u64 end;
};

static long add_thread(__u32 index __attribute__((unused)), struct sum *sum)
{
	struct task_struct *task;
	__u64 value = 0;

	if (sum->next == sum->end)
		return 1;
	task = (void *)(sum->next - PLACE(task_struct, thread_node));
	READ(value, task->utime);
	sum->user += value;
	READ(value, task->stime);
	sum->system += value;
	READ(value, task->se.sum_exec_runtime);
	sum->runtime += value;
	if (HAS(task_struct, ioac)) {
		READ(value, task->ioac.read_bytes);
		sum->read += value;
		READ(value, task->ioac.write_bytes);
		sum->written += value;
	}
	if (READ(value, task->thread_node.next))
		return 1;
	sum->next = value;
	return 0;
}

static ALWAYS_INLINE __u32 sequence(struct signal_struct *signal)
{
	__u32 count = 1;

	read_kernel(&count, sizeof(count), __builtin_preserve_access_index(&signal->stats_lock));
	return count;
}

/* The times and the traffic of all threads. A thread that ends hands over to the process what it has
 * used, behind a sequence lock that is taken for nothing else: when that has not moved, nothing was
 * counted twice or not at all. */
static ALWAYS_INLINE int add_up(struct signal_struct *signal, struct sum *sum)
{
	__u32 before = sequence(signal);

	sum->user = signal->utime;
	sum->system = signal->stime;
	sum->runtime = signal->sum_sched_runtime;
	sum->read = 0;
	sum->written = 0;
	if (HAS(signal_struct, ioac)) {
		sum->read = signal->ioac.read_bytes;
		sum->written = signal->ioac.write_bytes;
	}
	sum->end = (__u64)__builtin_preserve_access_index(&signal->thread_head);
	READ(sum->next, signal->thread_head.next);
	loop(MOST_THREADS, add_thread, sum, 0);
	return sum->next == sum->end && !(before & 1) && sequence(signal) == before;
}

static ALWAYS_INLINE void read_times(struct signal_struct *signal, struct task_record *record)
{
	struct sum sum = {};

	for (int attempt = 0; attempt < 3; attempt++) {
		if (!add_up(signal, &sum))
			continue;
		record->user_ns = sum.user;
		record->system_ns = sum.system;
		record->runtime_ns = sum.runtime;
		record->told_user_ns = signal->prev_cputime.utime;
		record->told_system_ns = signal->prev_cputime.stime;
		record->filled |= FILLED_TIMES;
		if (HAS(task_struct, ioac) && HAS(signal_struct, ioac)) {
			record->read_bytes = sum.read;
			record->write_bytes = sum.written;
			record->filled |= FILLED_IO;
		}
		return;
	}
}

/* Pages of a kind, with what each CPU has counted apart, which may be many. */
static ALWAYS_INLINE __s64 pages(struct mm_struct *mm, int kind)
{
	__s64 sum = 0;

	/* What an older kernel has is one plain array. */
	if (HAS(mm_rss_stat, count)) {
		read_kernel(&sum, sizeof(sum), (char *)mm + PLACE(mm_struct___before, rss_stat) +
						       PLACE(mm_rss_stat, count) + 8 * kind);
	} else {
		char *counter = (char *)mm + PLACE(mm_struct, rss_stat) +
				kind * (__u64)__builtin_preserve_type_info(
					       *(struct percpu_counter *)0, TYPE_SIZE);
		char *parts = 0;

		read_kernel(&sum, sizeof(sum), counter + PLACE(percpu_counter, count));
		read_kernel(&parts, sizeof(parts), counter + PLACE(percpu_counter, counters));
		for (__u32 cpu = 0; parts && cpu < cpus && cpu < MOST_CPUS; cpu++) {
			__s32 part = 0;

			read_kernel(&part, sizeof(part), parts + cpu_offset[cpu]);
			sum += part;
		}
	}
	return sum < 0 ? 0 : sum;
}

static ALWAYS_INLINE void read_resident(struct task_struct *task, struct task_record *record)
{
	struct mm_struct *mm = task->mm;
	__u64 after = 0;

	record->resident_pages = 0;
	if (mm) {
		if (!offsets_known && !HAS(mm_rss_stat, count))
			return;
		record->resident_pages = pages(mm, FILE_PAGES) + pages(mm, ANONYMOUS_PAGES) +
					 pages(mm, SHARED_PAGES);
		/* As long as the task has it, it is there. */
		READ(after, task->mm);
		if (after != (__u64)mm)
			return;
	}
	record->filled |= FILLED_RESIDENT;
}

static ALWAYS_INLINE __u32 own_depth(void)
{
	return depth_of(pid_of((void *)current_task()));
}

SEC("iter/task")
int list_processes(struct bpf_iter__task *context)
{
	struct task_struct *task = context->task;
	struct signal_struct *signal;
	struct task_record *record;
	struct task_tally *tally;
	struct task_walk *order;
	__u32 zero = 0, place, container = 0, depth;

	order = map_lookup(&walk, &zero);
	if (!order)
		return 0;
	if (!task) {
		order->finished++;
		return 0;
	}
	if (task->pid != task->tgid)
		return 0;
	if (!order->depth)
		order->depth = own_depth() + 1;
	depth = order->depth - 1;
	signal = task->signal;
	/* All of it has ended; its parent has yet to look. */
	if (!signal->live.counter)
		return 0;
	__u64 pid = pid_of(task);
	__u32 own_number = number(pid, depth);

	if (order->only) {
		if (order->only != own_number)
			return 0;
	} else {
		__u32 *found = container_of_task(task);

		if (!found)
			return 0;
		container = *found;
	}
	tally = map_lookup(&tallies, &container);
	if (!tally)
		return 0;
	tally->seen++;
	if (tally->listed >= per_container)
		return 0;
	place = (__u32)order->count;
	if (place >= capacity)
		return 0;
	record = map_lookup(&tasks, &place);
	if (!record)
		return 0;
	tally->listed++;
	order->count = (__u64)place + 1;
	if (!offsets_known)
		learn_offsets();
	record->container = container;
	record->filled = 0;
	record->pid = own_number;
	record->container_pid = number(pid, depth_of(pid));
	pid = pid_of(task->real_parent->group_leader);
	record->parent_pid = depth_of(pid) >= depth ? number(pid, depth) : 0;
	record->threads = signal->nr_threads;
	record->state = task->__state;
	record->exit_state = task->exit_state;
	record->start_ns = task->start_boottime;
	READ(record->name, task->comm);
	read_times(signal, record);
	read_resident(task, record);
	return 0;
}
