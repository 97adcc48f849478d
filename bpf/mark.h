/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Strict mode: a mark on a socket says why it was let through, and whether that still holds. */
#ifndef IMDS_GUARD_MARK_H
#define IMDS_GUARD_MARK_H

#include <linux/types.h>
#include <linux/bpf.h>
#include "caller.h"
#include "groups.h"
#include "helpers.h"
#include "imds_guard.h"

#define IG_STORAGE_CREATE 1 /* BPF_SK_STORAGE_GET_F_CREATE */

/* T << 8 | F of the address of a filter. */
ig_inline __u32 ig_filter_number(__u32 ip4)
{
	return ig_be32(ip4) & ~IG_FILTER_PREFIX_MASK;
}

ig_inline __u32 ig_mark_kind_of(__u32 reason)
{
	switch (reason) {
	case IG_ALLOWED_USER:
		return IG_MARK_USER;
	case IG_ALLOWED_GROUP:
		return IG_MARK_GROUP;
	case IG_DEFAULT_ALLOW:
		return IG_MARK_DEFAULT;
	}
	return IG_MARK_AUDIT;
}

/* The group that let the caller through. False when it can't be read any more. */
ig_inline bool ig_matched_group(__u32 generation, __u32 number, const struct ig_caller *caller, __u32 *gid)
{
	__u32 record = (generation - 1) * IG_LISTS + number;
	const struct ig_list *list = ig_map_lookup_elem(IG_MAP(IG_MAP_LISTS), &record);
	const char *group_info = 0;
	__u32 len = 0, i;

	*gid = caller->searched ? caller->allowed_gid : caller->fsgid;
	if (!list || caller->searched)
		return list;
	if (ig_lookup_group(generation, number, list, *gid) & IG_ALLOW)
		return true;
	if (ig_probe_read_kernel(&group_info, sizeof(group_info), caller->cred + IG_OFF_CRED_GROUP_INFO) ||
	    ig_probe_read_kernel(&len, sizeof(len), group_info + IG_OFF_GROUP_INFO_NGROUPS))
		return false;
	group_info += IG_OFF_GROUP_INFO_GID + (__u64)caller->allowed_index * sizeof(*gid);
#pragma clang loop unroll(full)
	for (i = 0; i < IG_GIDS_PER_READ; i++) {
		if (caller->allowed_index + i >= len ||
		    ig_probe_read_kernel(gid, sizeof(*gid), group_info + i * sizeof(*gid)))
			return false;
		if (ig_lookup_group(generation, number, list, *gid) & IG_ALLOW)
			return true;
	}
	return false;
}

/* The mark of the socket's last call, before another one takes its place. False when there is no memory for it. */
ig_inline bool ig_keep_mark(struct bpf_sock *sk, const struct ig_mark *mark, __u64 serial, __u32 list)
{
	struct ig_earlier *earlier;

	if (mark->kind == 0 || mark->kind > IG_MARK_AUDIT || (mark->serial == serial && mark->list == list))
		return true;
	earlier = ig_sk_storage_get(IG_MAP(IG_MAP_EARLIER), sk, 0, IG_STORAGE_CREATE);
	if (!earlier)
		return false;
	earlier->marks[mark->list % IG_EARLIER_MARKS] = *mark;
	return true;
}

/* False when the socket can't be marked: its packets would be dropped, so ig_judge_and_mark() denies the connect. */
ig_inline bool ig_set_mark(struct bpf_sock *sk, const struct ig_settings *settings, const struct ig_caller *caller,
			   __u32 generation, __u32 list, __u32 reason)
{
	struct ig_mark *mark = ig_sk_storage_get(IG_MAP(IG_MAP_MARKS), sk, 0, IG_STORAGE_CREATE);
	__u32 gid = 0;

	if (!mark || (reason == IG_ALLOWED_GROUP && !ig_matched_group(generation, list, caller, &gid)) ||
	    !ig_keep_mark(sk, mark, settings->serial, list))
		return false;
	mark->serial = settings->serial;
	mark->fsuid = caller->fsuid;
	mark->gid = gid;
	mark->list = list;
	mark->kind = ig_mark_kind_of(reason);
	mark->container_unchecked = settings->allow_containers != 0;
	return true;
}

/* For a connect that is redirected to a filter. False when the socket can't be marked. */
ig_inline bool ig_set_filter_mark(struct bpf_sock *sk, const struct ig_settings *settings,
				  const struct ig_caller *caller, __u32 ip4)
{
	struct ig_mark *mark = ig_sk_storage_get(IG_MAP(IG_MAP_MARKS), sk, 0, IG_STORAGE_CREATE);

	if (!mark)
		return false;
	mark->serial = settings->serial;
	mark->fsuid = caller->fsuid;
	mark->gid = ig_filter_number(ip4);
	mark->list = IG_FILTER_LIST;
	mark->kind = IG_MARK_FILTER;
	mark->container_unchecked = 0;
	return true;
}

/*
 * For a connect to a port of a locked address that is open. Only ig_is_reply_to_approved() reads this mark. A socket
 * that can't be marked loses nothing but the replies of a service on this machine.
 */
ig_inline void ig_set_open_mark(__u32 generation, struct bpf_sock *sk, __u32 protocol)
{
	const struct ig_settings *settings = ig_map_lookup_elem(IG_MAP(IG_MAP_SETTINGS), &generation);
	struct ig_mark *mark;

	if (!settings || !settings->strict || protocol != IG_TCP)
		return;
	mark = ig_sk_storage_get(IG_MAP(IG_MAP_MARKS), sk, 0, IG_STORAGE_CREATE);
	if (mark)
		mark->kind = IG_MARK_OPEN;
}

/*
 * Does the reason of a mark still let the socket through? Under the same policy and the same list it does. Under a
 * later policy it does if the user or group is still allowed. The exception: nobody can see from a socket whether the
 * caller is in a denied group, so a list with denied groups demands a new connect after each change of policy.
 */
ig_inline bool ig_mark_holds(__u32 generation, const struct ig_settings *settings, __u32 number,
			     const struct ig_mark *mark)
{
	__u32 record = (generation - 1) * IG_LISTS + number;
	const struct ig_list *list = ig_map_lookup_elem(IG_MAP(IG_MAP_LISTS), &record);
	__u32 user, group;

	if (mark->kind == 0 || mark->kind >= IG_MARK_AUDIT || !list || !(list->flags & IG_LIST_VALID))
		return false;
	if (mark->serial == settings->serial && mark->list == number)
		return true;
	if ((list->flags & IG_LIST_DENY_GROUPS) || (mark->container_unchecked && !settings->allow_containers))
		return false;
	user = ig_lookup_member(generation, number, list, IG_USER, mark->fsuid);
	if (user & IG_DENY)
		return false;
	if (mark->kind == IG_MARK_USER)
		return user & (IG_ALLOW | IG_FILTER_ACCOUNT);
	if (mark->kind == IG_MARK_DEFAULT)
		return list->flags & IG_LIST_DEFAULT_ALLOW;
	group = ig_lookup_member(generation, number, list, IG_GROUP, mark->gid);
	return group & IG_ALLOW;
}

#endif
