/* Where the kernel keeps each CPU's part of a variable. */
#ifndef PERCPU_H
#define PERCPU_H

#include "cgroup_types.h"

/* Most CPUs whose parts are added up; beyond, files are read. */
#define MOST_CPUS 1024

/* Set by the loader: CPUs that may ever be there; 0 when there are more than that. */
const volatile __u32 cpus = 1;

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

/* Where each CPU keeps its part of a per-CPU variable, relative to the variable's address. */
static ALWAYS_INLINE int learn_offsets(void)
{
	struct bpf_array *array;
	__u64 base = 0;
	__u32 zero = 0;

	/* Nothing added up is no sum. */
	if (!cpus)
		return -1;
	landmark_address = (__u64)&landmark;
	array = (void *)landmark_address;
	if (!__builtin_preserve_field_info(array->pptrs, FIELD_EXISTS))
		return -1;
	/* The field and not its first element, which kernels that declare none refuse to relocate. */
	read_kernel(&base, sizeof(base), __builtin_preserve_access_index(&array->pptrs));
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

#endif
