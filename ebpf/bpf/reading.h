/* Reading memory of the kernel, by plain loads where there are such. */
#ifndef READING_H
#define READING_H

#include "cgroup_types.h"
#include "percpu.h"

static long (*const loop)(__u32, void *, void *, __u64) = (void *)181;

/* The kernel function bpf_rdonly_cast (from 6.2 on): the loader puts its number in the place of this
 * one, where there is it. Its answer is read by plain loads, which the processor can have under way at the
 * same time; each call of a helper costs ten times as much and waits for the one before. */
#define CAST_CALL 0x7ffffff1
static void *(*const cast)(const void *, __u32) = (void *)CAST_CALL;

#define PLACE(type, field) \
	__builtin_preserve_field_info(((struct type *)0)->field, FIELD_BYTE_OFFSET)

/* What is read is taken for a type that begins with a number as wide: one instruction reads it. Where
 * these types begin otherwise, nothing is read (`read_targets_plainly`). */
#define AS(type, from) \
	((struct type *)cast(from, __builtin_btf_type_id(*(struct type *)0, 1)))
#define WIDE_TYPES_BEGIN_SO \
	(PLACE(task_cputime, stime) == 0 && PLACE(refcount_struct, refs.counter) == 0)

/* `plain` is known when this is compiled. */
static ALWAYS_INLINE __u64 read_u64(const void *from, const int plain)
{
	if (plain)
		return AS(task_cputime, from)->stime;
	__u64 value = 0;

	read_kernel(&value, sizeof(value), from);
	return value;
}

static ALWAYS_INLINE __u32 read_u32(const void *from, const int plain)
{
	if (plain)
		return AS(refcount_struct, from)->refs.counter;
	__u32 value = 0;

	read_kernel(&value, sizeof(value), from);
	return value;
}

/* How is in `plain`. */
#define READ(into, from)                                                                        \
	((into) = (__typeof__(into))(                                                           \
		 sizeof(from) == 4 ? read_u32(__builtin_preserve_access_index(&(from)), plain) : \
				     read_u64(__builtin_preserve_access_index(&(from)), plain)))

#endif
