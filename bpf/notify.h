/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Reports a decision to user space: a counter, a record in the ring buffer, a row of the report. */
#ifndef IMDS_GUARD_NOTIFY_H
#define IMDS_GUARD_NOTIFY_H

#include <linux/types.h>
#include <linux/bpf.h>
#include "caller.h"
#include "helpers.h"
#include "imds_guard.h"
#include "request.h"

/* The decision about one connect or packet. */
struct ig_decision {
	const struct ig_caller *caller; /* .cred is NULL when the task is unknown */
	__u64 netns_cookie;
	__u32 generation;
	__u32 hook; /* enum ig_hook */
	__u32 lock;
	__u32 reason;
	__u32 verdict; /* enum ig_verdict */
};

/*
 * The result of the addition is not used: that makes it BPF_XADD, which every kernel has. Other atomics came in
 * v5.12.
 */
ig_inline void ig_count(__u32 reason, bool audited)
{
	struct ig_counter *counter = ig_map_lookup_elem(IG_MAP(IG_MAP_COUNTERS), &reason);

	if (counter)
		__sync_fetch_and_add(audited ? &counter->audited : &counter->enforced, 1);
}

/* Runs for denials, and for allowed connects that somebody asked to see: never for most connects. */
ig_inline void ig_describe_task(struct ig_event *event, const struct ig_caller *caller)
{
	__u64 pid_tgid = ig_get_current_pid_tgid();
	const char *group_info = 0;

	event->pid = (__u32)pid_tgid;
	event->tgid = pid_tgid >> 32;
	event->fsgid = caller->fsgid;
	event->cgroup_id = ig_get_current_cgroup_id();
	ig_get_current_comm(event->comm, sizeof(event->comm));
	/* When a read fails, groups_len is 0: the rest of the record is still worth sending. */
	if (!ig_probe_read_kernel(&group_info, sizeof(group_info), caller->cred + IG_OFF_CRED_GROUP_INFO))
		ig_probe_read_kernel(&event->groups_len, sizeof(event->groups_len),
				     group_info + IG_OFF_GROUP_INFO_NGROUPS);
}

/* In another user namespace than the initial one the caller chooses its ID: its owner is whom the row is about. */
ig_inline void ig_find_who(struct ig_report_key *key, const struct ig_caller *caller)
{
	const char *namespace = 0;
	__s32 level = 0;
	__u32 owner;

	key->who = IG_WHO_USER;
	key->id = caller->fsuid;
	if (!caller->cred || ig_probe_read_kernel(&namespace, sizeof(namespace), caller->cred + IG_OFF_CRED_USER_NS) ||
	    !namespace || ig_probe_read_kernel(&level, sizeof(level), namespace + IG_OFF_USER_NAMESPACE_LEVEL) ||
	    level == 0 || ig_probe_read_kernel(&owner, sizeof(owner), namespace + IG_OFF_USER_NAMESPACE_OWNER))
		return;
	key->who = IG_WHO_NAMESPACES;
	key->id = owner;
}

/* The ID that the share of an ID begins with. */
ig_inline __u32 ig_share_of(__u32 id)
{
	return id < IG_SHARE_IDS ? id : id & ~(IG_SHARE_IDS - 1);
}

/* True when the share of the key's ID has room for one more row, which is counted. CPUs may race for the last ones. */
ig_inline bool ig_take_row(const struct ig_report_key *key)
{
	struct ig_share_key share = { .generation = key->generation, .first = ig_share_of(key->id) };
	struct ig_share *taken = ig_map_lookup_elem(IG_MAP(IG_MAP_SHARES), &share);

	if (!taken) {
		struct ig_share none = {};

		ig_map_update_elem(IG_MAP(IG_MAP_SHARES), &share, &none, BPF_NOEXIST);
		taken = ig_map_lookup_elem(IG_MAP(IG_MAP_SHARES), &share);
	}
	if (!taken || taken->rows >= (key->id < IG_SHARE_IDS ? IG_ROWS_OF_ACCOUNT : IG_ROWS_OF_BLOCK))
		return false;
	__sync_fetch_and_add(&taken->rows, 1);
	return true;
}

/* One row for each lock, caller and reason. The first denial makes the row, with its address and command name. */
ig_inline void ig_update_report(const struct ig_decision *decision, const struct ig_event *event)
{
	struct ig_report_key key = { .generation = decision->generation,
				     .reason = decision->reason,
				     .lock = decision->lock };
	struct ig_report *row;

	ig_find_who(&key, decision->caller);
	row = ig_map_lookup_elem(IG_MAP(IG_MAP_REPORT), &key);
	if (!row && !ig_take_row(&key)) {
		key.who = IG_WHO_OTHERS;
		key.id = ig_share_of(key.id);
		key.lock = IG_NO_LOCK;
		row = ig_map_lookup_elem(IG_MAP(IG_MAP_REPORT), &key);
	}
	if (!row) {
		struct ig_report first = { .first_ns = event->time_ns, .address = event->address, .port = event->port };

		first.protocol = event->protocol;
		__builtin_memcpy(first.comm, event->comm, sizeof(first.comm));
		/* It fails when another CPU has just made the row. */
		ig_map_update_elem(IG_MAP(IG_MAP_REPORT), &key, &first, BPF_NOEXIST);
		row = ig_map_lookup_elem(IG_MAP(IG_MAP_REPORT), &key);
	}
	if (!row) {
		ig_count(IG_REPORT_OVERFLOW, false);
		return;
	}
	__sync_fetch_and_add(&row->count, 1);
	row->last_ns = event->time_ns;
}

ig_inline void ig_notify(const struct ig_decision *decision, const struct ig_request *request)
{
	struct ig_event event = {};

	event.time_ns = ig_ktime_get_boot_ns();
	event.netns_cookie = decision->netns_cookie;
	event.fsuid = decision->caller->fsuid;
	event.address = request->to;
	event.port = request->port;
	event.lock = decision->lock;
	event.generation = decision->generation;
	event.hook = decision->hook;
	event.reason = decision->reason;
	event.verdict = decision->verdict;
	event.protocol = request->protocol;
	if (decision->caller->cred)
		ig_describe_task(&event, decision->caller);
	if (ig_ringbuf_output(IG_MAP(IG_MAP_EVENTS), &event, sizeof(event), 0))
		ig_count(IG_LOST_EVENTS, false);
	if (decision->verdict != IG_VERDICT_ALLOWED)
		ig_update_report(decision, &event);
}

ig_inline bool ig_log_allowed(void)
{
	__u32 zero = 0;
	const struct ig_watch *watch = ig_map_lookup_elem(IG_MAP(IG_MAP_WATCH), &zero);

	return watch && watch->log_allowed;
}

#endif
