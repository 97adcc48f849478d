/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Strict: what let a socket through is marked on it, and whether that still holds. Part of imds_guard.bpf.c. */

#define IG_STORAGE_CREATE 1 /* BPF_SK_STORAGE_GET_F_CREATE */

ig_inline __u32 ig_kind_of_mark(__u32 reason)
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

/* The group that let the caller through; false when it can't be read any more. */
ig_inline bool ig_matched_group(__u32 generation, __u32 number, const struct ig_caller *caller, __u32 *gid)
{
	__u32 record = (generation - 1) * IG_LISTS + number;
	const struct ig_list *list = ig_lookup(IG_MAP(IG_MAP_LISTS), &record);
	const char *group_info = 0;
	__u32 len = 0, i;

	*gid = caller->searched ? caller->allowed_gid : caller->fsgid;
	if (!list || caller->searched)
		return list;
	if (ig_group(generation, number, list, *gid) & IG_ALLOW)
		return true;
	if (ig_read_kernel(&group_info, sizeof(group_info), caller->cred + IG_OFF_CRED_GROUP_INFO) ||
	    ig_read_kernel(&len, sizeof(len), group_info + IG_OFF_GROUP_INFO_NGROUPS))
		return false;
	group_info += IG_OFF_GROUP_INFO_GID + (__u64)caller->allowed_at * sizeof(*gid);
#pragma clang loop unroll(full)
	for (i = 0; i < IG_QUAD; i++) {
		if (caller->allowed_at + i >= len || ig_read_kernel(gid, sizeof(*gid), group_info + i * sizeof(*gid)))
			return false;
		if (ig_group(generation, number, list, *gid) & IG_ALLOW)
			return true;
	}
	return false;
}

/* False when the socket could not be marked: its packets would be dropped, so the connect had better be denied. */
ig_inline bool ig_mark(struct bpf_sock *sk, const struct ig_settings *settings, const struct ig_caller *caller,
		       __u32 generation, __u32 list, __u32 reason)
{
	struct ig_mark *mark = ig_socket_storage(IG_MAP(IG_MAP_MARKS), sk, 0, IG_STORAGE_CREATE);
	__u32 gid = 0;

	if (!mark || (reason == IG_ALLOWED_GROUP && !ig_matched_group(generation, list, caller, &gid)))
		return false;
	mark->serial = settings->serial;
	mark->fsuid = caller->fsuid;
	mark->gid = gid;
	mark->list = list;
	mark->kind = ig_kind_of_mark(reason);
	mark->container_unchecked = settings->allow_containers != 0;
	return true;
}

/*
 * A connect to a port of a locked address that is open: only the answers ask for this mark (ig_answers_approved()), so
 * a socket that can't be marked loses nothing but those of a service on this machine.
 */
ig_inline void ig_mark_open(__u32 generation, struct bpf_sock *sk, __u32 protocol)
{
	const struct ig_settings *settings = ig_lookup(IG_MAP(IG_MAP_SETTINGS), &generation);
	struct ig_mark *mark;

	if (!settings || !settings->strict || protocol != IG_TCP)
		return;
	mark = ig_socket_storage(IG_MAP(IG_MAP_MARKS), sk, 0, IG_STORAGE_CREATE);
	if (mark)
		mark->kind = IG_MARK_OPEN;
}

/*
 * Does what let the socket through once still let it through? Under the same policy and the same list it does. Later a
 * right that is still listed counts, with one exception: whether the caller is in a denied group can't be seen from
 * here, so that a list with such groups wants a new connect after each change of policy.
 */
ig_inline bool ig_mark_holds(__u32 generation, const struct ig_settings *settings, __u32 number,
			     const struct ig_mark *mark)
{
	__u32 record = (generation - 1) * IG_LISTS + number;
	const struct ig_list *list = ig_lookup(IG_MAP(IG_MAP_LISTS), &record);
	__u32 user, group;

	if (mark->kind == 0 || mark->kind >= IG_MARK_AUDIT || !list || !(list->flags & IG_LIST_VALID))
		return false;
	if (mark->serial == settings->serial && mark->list == number)
		return true;
	if ((list->flags & IG_LIST_DENY_GROUPS) || (mark->container_unchecked && !settings->allow_containers))
		return false;
	user = ig_member(generation, number, list, IG_USER, mark->fsuid);
	if (user & IG_DENY)
		return false;
	if (mark->kind == IG_MARK_USER)
		return user & IG_ALLOW;
	if (mark->kind == IG_MARK_DEFAULT)
		return list->flags & IG_LIST_DEFAULT_ALLOW;
	group = ig_member(generation, number, list, IG_GROUP, mark->gid);
	return group & IG_ALLOW;
}
