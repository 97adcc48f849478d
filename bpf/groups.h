/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Members of a list: does it allow or deny this user, this group, one of the caller's supplementary groups? */
#ifndef IMDS_GUARD_GROUPS_H
#define IMDS_GUARD_GROUPS_H

#include <linux/types.h>
#include "caller.h"
#include "helpers.h"
#include "imds_guard.h"

/* Results beside IG_ALLOW and IG_DENY. */
#define IG_READ_FAILED 4
#define IG_TOO_MANY 8
#define IG_FILTERS_UNKNOWN IG_LIST_FILTER_GROUPS /* which filters list a group of the caller, nobody has looked */

#define IG_GIDS_PER_READ 4 /* a read costs more than the tests of four groups */

/*
 * IG_ALLOW, IG_DENY and bits of filters, or 0. The 0 is read from the list's record: a constant would be one more state for the
 * verifier to follow through all code that comes after.
 */
ig_inline __u32 ig_lookup_member(__u32 generation, __u32 number, const struct ig_list *list, __u32 kind, __u32 id)
{
	struct ig_member key = { .generation = generation, .kind = kind, .list = number, .id = id };
	const __u32 *verdict = ig_map_lookup_elem(IG_MAP(IG_MAP_MEMBERS), &key);

	return verdict ? *verdict : list->zero;
}

/* Most groups of most callers are on no list: one bit saves the lookup. */
ig_inline __u32 ig_lookup_group(__u32 generation, __u32 number, const struct ig_list *list, __u32 gid)
{
	if (!(list->gid_bitmap[(gid >> 5) & (IG_GID_BITMAP_WORDS - 1)] >> (gid & 31) & 1))
		return list->zero;
	return ig_lookup_member(generation, number, list, IG_GROUP, gid);
}

/* --- a walk through the caller's groups ------------------------------------------------------------------------- */

struct ig_walk {
	const struct ig_list *list;
	const char *gid; /* of the first group */
	__u64 failed;
	__u32 generation;
	__u32 number; /* of the list */
	__u32 index; /* of the next group */
	__u32 allowed_index; /* of an allowed group, or of one of the IG_GIDS_PER_READ - 1 before it */
	__u32 verdicts;
};

ig_inline void ig_walk_one(struct ig_walk *walk)
{
	__u32 gid = 0;

	walk->failed |= ig_probe_read_kernel(&gid, sizeof(gid), walk->gid + (__u64)walk->index * sizeof(gid));
	walk->verdicts |= ig_lookup_group(walk->generation, walk->number, walk->list, gid);
	walk->index++;
}

/*
 * The product with a computed 0 or 1 replaces a branch. Without bpf_loop() a branch is two paths at each call (more
 * than a million instructions on v5.10), and a mask makes later verifiers fork all the same.
 */
ig_callback ig_walk_four(struct ig_walk *walk)
{
	const struct ig_list *list = walk->list;
	__u32 generation = walk->generation, number = walk->number, gids[IG_GIDS_PER_READ] = {}, four, hit;

	walk->failed |= ig_probe_read_kernel(gids, sizeof(gids), walk->gid + (__u64)walk->index * sizeof(gids[0]));
	four = ig_lookup_group(generation, number, list, gids[0]);
	four |= ig_lookup_group(generation, number, list, gids[1]);
	four |= ig_lookup_group(generation, number, list, gids[2]);
	four |= ig_lookup_group(generation, number, list, gids[3]);
	hit = four & IG_ALLOW;
	asm volatile("" : "+r"(hit));
	walk->allowed_index += (walk->index - walk->allowed_index) * hit;
	walk->verdicts |= four;
	walk->index += IG_GIDS_PER_READ;
	return 0;
}

/* Up to IG_MAX_WALKED_GROUPS groups of the caller against a list of any length. */
ig_inline __u32 ig_walk_groups(__u32 generation, __u32 number, const struct ig_list *list, const char *gid, __u32 len,
			       __u32 *allowed_index)
{
	struct ig_walk walk = { .list = list,
				.gid = gid,
				.generation = generation,
				.number = number,
				.allowed_index = list->zero,
				.verdicts = list->zero };
	__u32 i;

	/* Unrolled, because clang would count down to 0, and before v6.8 the verifier learned no bound from "!= 0". */
#pragma clang loop unroll(full)
	for (i = 0; i < IG_GIDS_PER_READ - 1; i++)
		if (i < len % IG_GIDS_PER_READ)
			ig_walk_one(&walk);
	ig_repeat(len / IG_GIDS_PER_READ, IG_MAX_WALKED_GROUPS / IG_GIDS_PER_READ, ig_walk_four, &walk, &walk.failed);
	*allowed_index = walk.allowed_index;
	return walk.failed ? IG_READ_FAILED : walk.verdicts;
}

/* --- a search in the caller's groups ---------------------------------------------------------------------------- */

/*
 * Whether a sorted array of len (1 to 65,536) group IDs has a listed one. *failed becomes non-zero when it can't be
 * read. Binary search without a branch, so that the verifier sees one path: position moves by half times a computed 0
 * or 1, which the empty asm keeps clang from turning back into a branch. When half is 0 it reads the word before the
 * array, without an effect: that word is ngroups of group_info.
 */
ig_inline bool ig_has_gid(const struct ig_groups *groups, __u32 index, const char *gid, __u32 len, __u64 *failed)
{
	__u32 wanted = groups->gid[index];
	__u64 position = 0, left = len;
	__u32 step, value = 0;

	for (step = 0; step < 17; step++) {
		__u64 half = left >> 1;
		__u64 below;

		*failed |= ig_probe_read_kernel(&value, sizeof(value), gid + (position + half) * 4 - 4);
		below = (__u64)value - wanted;
		asm volatile("" : "+r"(below));
		below >>= 63;
		asm volatile("" : "+r"(below));
		position += half * below;
		left -= half;
	}
	*failed |= ig_probe_read_kernel(&value, sizeof(value), gid + position * 4);
	return value == wanted;
}

struct ig_search {
	const struct ig_groups *groups;
	const char *gid;
	__u64 failed;
	__u32 len; /* of gid */
	__u32 next; /* the listed group to look for */
	__u32 found; /* the listed group that the caller is in */
	__u32 verdict; /* IG_ALLOW or IG_DENY of that group */
};

ig_callback ig_search_one(struct ig_search *search)
{
	const struct ig_groups *groups = search->groups;
	__u32 next = search->next++;

	if (next >= IG_MAX_SEARCHED_GROUPS) /* the verifier demands this test */
		return 1;
	if (ig_has_gid(groups, next, search->gid, search->len, &search->failed)) {
		search->found = groups->gid[next];
		search->verdict = next < groups->denied ? IG_DENY : IG_ALLOW;
	}
	return search->verdict || search->failed;
}

/*
 * For callers with more than IG_MAX_WALKED_GROUPS groups: looks for each listed group among them. Denied groups come
 * first in the list, so the first hit decides. Groups of filters are not searched: the first hit need not be the first
 * filter.
 */
ig_inline __u32 ig_search_groups(__u32 generation, __u32 number, const struct ig_list *list, const char *gid, __u32 len,
				 struct ig_caller *caller)
{
	struct ig_list_key key = { .generation = generation, .list = number };
	struct ig_search search = { .groups = ig_map_lookup_elem(IG_MAP(IG_MAP_GROUPS), &key), .gid = gid, .len = len };

	if (!search.groups || search.groups->len > IG_MAX_SEARCHED_GROUPS)
		return IG_READ_FAILED;
	ig_repeat(search.groups->len, IG_MAX_SEARCHED_GROUPS, ig_search_one, &search, &search.failed);
	caller->searched = search.verdict;
	caller->allowed_gid = search.found;
	if (search.failed)
		return IG_READ_FAILED;
	return search.verdict | (list->flags & IG_FILTERS_UNKNOWN);
}

/*
 * What the list says of the caller's supplementary groups: struct group_info, whose gid[] is sorted (groups_sort()).
 */
ig_inline __u32 ig_judge_supplementary_groups(__u32 generation, __u32 number, const struct ig_list *list,
					      struct ig_caller *caller)
{
	const char *group_info = 0;
	__u32 len = 0;

	/* Always by the helper: the verifier forbids an index into gid[] when it knows the type of the pointer. */
	if (ig_probe_read_kernel(&group_info, sizeof(group_info), caller->cred + IG_OFF_CRED_GROUP_INFO) ||
	    ig_probe_read_kernel(&len, sizeof(len), group_info + IG_OFF_GROUP_INFO_NGROUPS))
		return IG_READ_FAILED;
	if (len > IG_MAX_GROUPS)
		return IG_READ_FAILED;
	if (len <= IG_MAX_WALKED_GROUPS)
		return ig_walk_groups(generation, number, list, group_info + IG_OFF_GROUP_INFO_GID, len,
				      &caller->allowed_index);
	if (!(list->flags & IG_LIST_SMALL))
		return IG_TOO_MANY;
	return ig_search_groups(generation, number, list, group_info + IG_OFF_GROUP_INFO_GID, len, caller);
}

#endif
