/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The caller: the task that connects, its credentials and its namespaces. */
#ifndef IMDS_GUARD_CALLER_H
#define IMDS_GUARD_CALLER_H

#include <linux/types.h>
#include "helpers.h"

/* The credentials with which the kernel itself checks access to files (credentials(7)). */
struct ig_caller {
	const char *cred;
	__u32 fsuid;
	__u32 fsgid;
	__u32 allowed_gid; /* the allowed group that ig_search_groups() has found */
	__u32 allowed_index; /* ig_walk_groups() has found one here, or among the next IG_GIDS_PER_READ - 1 groups */
	__u32 filter; /* the bit of the filter that ig_judge_filters() has found */
	bool searched;
};

/* 1 when the caller is in the initial user namespace, 0 when it is not, -1 when that can't be read. */
ig_inline int ig_in_initial_user_namespace(const char *cred)
{
	const char *namespace = 0;
	__s32 level = 0;

	if (ig_read(&namespace, cred + IG_OFF_CRED_USER_NS) || !namespace ||
	    ig_read(&level, namespace + IG_OFF_USER_NAMESPACE_LEVEL))
		return -1;
	return level == 0;
}

/*
 * 1 when the caller is in the initial PID namespace, 0 when it is not, -1 when that can't be read. It is the
 * namespace of the task itself, not the one that its children would get (pid_namespaces(7)).
 */
ig_inline int ig_in_initial_pid_namespace(const char *task)
{
	const char *pid = 0;
	__u32 level = 0;

	if (ig_read(&pid, task + IG_OFF_TASK_STRUCT_THREAD_PID) || !pid || ig_read(&level, pid + IG_OFF_PID_LEVEL))
		return -1;
	return level == 0;
}

#endif
