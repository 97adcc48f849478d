/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What all parts of the program use: the kernel's helper functions, maps, loops, byte order. */
#ifndef IMDS_GUARD_HELPERS_H
#define IMDS_GUARD_HELPERS_H

#include <linux/types.h>
#include <linux/bpf.h>
#include "imds_guard.h"

/*
 * Features: what only some policies need. A program has the code of those that its policy has, so that other policies
 * don't pay for it: backends/ebpf/features.py.
 */
#ifdef IG_FEATURE_FILTERS
#define IG_HAS_FILTERS 1
#else
#define IG_HAS_FILTERS 0
#endif

#define ig_inline static inline __attribute__((always_inline))
#define ig_likely(x) __builtin_expect(!!(x), 1)

/*
 * Helpers by their number in include/uapi/linux/bpf.h. The prefix is there because bcc declares the kernel's names.
 */
static void *(*ig_map_lookup_elem)(const void *map, const void *key) = (void *)1;
static long (*ig_map_update_elem)(const void *map, const void *key, const void *value, __u64 flags) = (void *)2;
static __u64 (*ig_get_current_pid_tgid)(void) = (void *)14;
static long (*ig_get_current_comm)(void *to, __u32 size) = (void *)16;
static long (*ig_skb_load_bytes)(const void *skb, __u32 offset, void *to, __u32 size) = (void *)26;
static __u32 (*ig_get_socket_uid)(const void *skb) = (void *)47;
static __u64 (*ig_get_current_cgroup_id)(void) = (void *)80;
static void *(*ig_sk_lookup_tcp)(const void *ctx, const void *tuple, __u32 size, __u64 netns, __u64 flags) = (void *)84;
#define IG_TUPLE4_SIZE 12 /* sizes of struct bpf_sock_tuple: the verifier demands a constant */
#define IG_TUPLE6_SIZE 36
static long (*ig_sk_release)(void *sk) = (void *)86;
static void *(*ig_sk_fullsock)(const void *sk) = (void *)95;
static struct bpf_sock *(*ig_skc_lookup_tcp)(const void *skb, const void *tuple, __u32 size, __u64 netns,
					     __u64 flags) = (void *)99;
static void *(*ig_sk_storage_get)(const void *map, const void *sk, const void *value, __u64 flags) = (void *)107;
static long (*ig_probe_read_kernel)(void *to, __u32 size, const void *from) = (void *)113;
static __u64 (*ig_get_netns_cookie)(const void *ctx) = (void *)122;
static __u64 (*ig_ktime_get_boot_ns)(void) = (void *)125;
static long (*ig_ringbuf_output)(const void *map, const void *record, __u64 size, __u64 flags) = (void *)130;

/*
 * ig_read(to, from) reads a member of a kernel struct; the result is not 0 when it can't be read. Where the verifier
 * knows the type of the current task (bpf_get_current_task_btf(), which 5.10 lacks) a plain load serves, at a seventh
 * of the helper's price. The task's own credentials are always readable. Pointers that may be NULL are tested by the
 * caller. A load that faults gives 0: tests/vm/test_odd_states.py says what that means for each.
 */
#ifdef IG_DIRECT_READS
static const char *(*ig_get_current_task)(void) = (void *)158;
#define ig_read(to, from) (*(to) = *(const __typeof__(*(to)) *)(from), 0)
#else
static const char *(*ig_get_current_task)(void) = (void *)35;
#define ig_read(to, from) ig_probe_read_kernel(to, sizeof(*(to)), from)
#endif

/* A constant that the loader replaces: kernel/compiler.py. */
__u64 ig_pseudo(__u64 kind, __u64 number) asm("llvm.bpf.pseudo");
#define IG_MAP(number) ((const void *)ig_pseudo(1, IG_MAP_BASE + (number))) /* 1: BPF_PSEUDO_MAP_FD */
#define IG_THIS_HOOK() ((__u32)ig_pseudo(1, IG_HOOK_PLACEHOLDER)) /* becomes a value of enum ig_hook */

/*
 * ig_repeat() calls callback(context) until it returns another value than 0, at most min(times, max) times. *failed
 * becomes non-zero when bpf_loop() refuses to call it: groups that nobody has looked at may be denied ones. With
 * bpf_loop() (v5.17) the verifier follows the callback once, and not once for each call. The callback is then a
 * function of its own, which the loader puts behind the program (kernel/compiler.py). It has one argument, since bcc
 * takes further ones for the arguments of a kprobe.
 */
#ifdef IG_BPF_LOOP
static long (*ig_bpf_loop)(__u32 times, const void *callback, void *context, __u64 flags) = (void *)181;
#define ig_callback int
#define ig_repeat(times, max, callback, context, failed) \
	(*(failed) |= (__u64)ig_bpf_loop(times, (const void *)ig_pseudo(4, IG_CALLBACK_##callback), context, 0) >> 63)
/* 4: BPF_PSEUDO_FUNC. The result is the number of calls, or -E2BIG or -EINVAL. */
#else
#define ig_callback ig_inline int
/* Without the asm clang merges the two bounds into one that the verifier does not know. */
#define ig_repeat(times, max, callback, context, failed)     \
	for (__u32 ig_run = 0; ig_run < (max); ig_run++) {   \
		__u32 ig_times = (times);                    \
                                                             \
		asm volatile("" : "+r"(ig_times));           \
		if (ig_run >= ig_times || callback(context)) \
			break;                               \
	}
#endif

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define ig_be16(x) ((__u16)__builtin_bswap16(x))
#define ig_be32(x) __builtin_bswap32(x)
#else
#define ig_be16(x) ((__u16)(x))
#define ig_be32(x) (x)
#endif

#endif
