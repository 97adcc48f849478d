/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The decision about a caller and a list. policy/decide.py: decide() is its specification. */
#ifndef IMDS_GUARD_DECIDE_H
#define IMDS_GUARD_DECIDE_H

#include <linux/types.h>
#include "caller.h"
#include "groups.h"
#include "helpers.h"
#include "imds_guard.h"

#define IG_PF_KTHREAD 0x00200000 /* include/linux/sched.h */

/* policy/decide.py: Reason.permits */
ig_inline bool ig_permits(__u32 reason)
{
	return reason <= IG_DEFAULT_ALLOW || (IG_HAS_FILTERS && reason == IG_FILTERED);
}

/*
 * The first filter that names the caller, for redirect.h. named: the bits of the filters that list its user or a group of
 * it. Outside the initial user namespace a caller may take an ID that an earlier filter does not list, so "everyone" does
 * not count there.
 */
ig_inline __u32 ig_judge_filters(const struct ig_list *list, struct ig_caller *caller, __u32 named)
{
	__u32 all = named | list->everyone;

	caller->filter = all & -all;
	if (named & caller->filter)
		return IG_FILTERED;
	switch (ig_in_initial_user_namespace(caller->cred)) {
	case 1:
		return IG_FILTERED;
	case 0:
		return IG_USER_NAMESPACE;
	}
	return IG_UNREADABLE;
}

/* Deny lists, then allowlists, then filters, then the default. */
ig_inline __u32 ig_judge_lists(__u32 generation, const struct ig_port_range *range, const struct ig_list *list,
			       struct ig_caller *caller)
{
	__u32 number = range->list;
	/* The verifier would know a constant 0: one more state to follow through the loops. */
	__u32 user = list->zero, group;

	caller->allowed_index = list->zero;
	if (list->flags & IG_LIST_USERS)
		user = ig_lookup_member(generation, number, list, IG_USER, caller->fsuid);
	if (user & IG_DENY)
		return IG_DENIED_USER;
	if ((user & IG_ALLOW) && !(list->flags & IG_LIST_DENY_GROUPS))
		return IG_ALLOWED_USER;
	if (list->flags & IG_LIST_GROUPS) {
		/* fsgid need not be in group_info: in_group_p() in kernel/groups.c looks at both. */
		group = ig_lookup_group(generation, number, list, caller->fsgid);
		if (group & IG_DENY)
			return IG_DENIED_GROUP;
		if ((group & IG_ALLOW) && !(list->flags & IG_LIST_DENY_GROUPS))
			return IG_ALLOWED_GROUP;
		/* Without these clang makes constants of what was tested above: one more path each through the rest. */
		asm volatile("" : "+r"(user));
		asm volatile("" : "+r"(group));
		group |= ig_judge_supplementary_groups(generation, number, list, caller);
		if (group & IG_READ_FAILED)
			return IG_UNREADABLE;
		if (group & IG_TOO_MANY)
			return IG_TOO_MANY_GROUPS;
		if (group & IG_DENY)
			return IG_DENIED_GROUP;
		if (user & IG_ALLOW)
			return IG_ALLOWED_USER;
		if (group & IG_ALLOW)
			return IG_ALLOWED_GROUP;
		user |= group;
	}
	if (IG_HAS_FILTERS) {
		if ((user & IG_FILTER_ACCOUNT) && range->target)
			return IG_ALLOWED_USER;
		if (user & IG_FILTERS_UNKNOWN)
			return IG_TOO_MANY_GROUPS;
		user &= IG_FILTER_BITS;
		if (user | list->everyone)
			return ig_judge_filters(list, caller, user);
	} else if (user | list->everyone) {
		return IG_UNREADABLE; /* a filter: user space has loaded the wrong program */
	}
	if (!(list->flags & IG_LIST_DEFAULT_ALLOW))
		return IG_NOT_LISTED;
	switch (ig_in_initial_user_namespace(caller->cred)) {
	case 1:
		return IG_DEFAULT_ALLOW;
	case 0:
		return IG_USER_NAMESPACE;
	}
	return IG_UNREADABLE;
}

/* 0 when the caller is one of the host's own processes, else the reason to deny it. */
ig_inline __u32 ig_judge_container(const struct ig_settings *settings, const char *task, const char *cred)
{
	__u32 flags = 0;
	int user, pid;

	if (ig_read(&flags, task + IG_OFF_TASK_STRUCT_FLAGS))
		return IG_UNREADABLE;
	if (flags & IG_PF_KTHREAD)
		return IG_KERNEL_THREAD;
	if (settings->allow_containers)
		return 0;
	user = ig_in_initial_user_namespace(cred);
	pid = ig_in_initial_pid_namespace(task);
	if (user < 0 || pid < 0)
		return IG_UNREADABLE;
	return user && pid ? 0 : IG_CONTAINER;
}

/* False when they can't be read. */
ig_inline bool ig_read_caller(struct ig_caller *caller, const char *task)
{
	return !ig_read(&caller->cred, task + IG_OFF_TASK_STRUCT_CRED) && caller->cred &&
	       !ig_read(&caller->fsuid, caller->cred + IG_OFF_CRED_FSUID) &&
	       !ig_read(&caller->fsgid, caller->cred + IG_OFF_CRED_FSGID);
}

/* The reason (enum ig_reason) to let the caller through or to deny it. All that can't be read is a denial. */
ig_inline __u32 ig_judge_caller(__u32 generation, const struct ig_settings *settings, const struct ig_port_range *range,
				struct ig_caller *caller)
{
	__u32 number = range->list, record = (generation - 1) * IG_LISTS + number;
	const struct ig_list *list = ig_map_lookup_elem(IG_MAP(IG_MAP_LISTS), &record);
	const char *task = ig_get_current_task();
	__u32 reason;

	/* First of all, because the record of every denial names the caller. */
	if (!ig_read_caller(caller, task))
		return IG_UNREADABLE;
	if (number == IG_NO_LIST)
		return IG_UNSPECIFIED_DESTINATION;
	if (IG_HAS_FILTERS && number == IG_FILTER_LIST)
		return IG_FILTER_ADDRESS;
	if (!list || !(list->flags & IG_LIST_VALID))
		return IG_UNREADABLE;
	reason = ig_judge_container(settings, task, caller->cred);
	return reason ? reason : ig_judge_lists(generation, range, list, caller);
}

#endif
