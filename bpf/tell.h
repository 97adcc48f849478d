/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What people get to know of a decision: a count, a record in the ring buffer, a row of the report. Part of imds_guard.bpf.c. */

ig_inline void ig_count(__u32 reason, bool audited)
{
	struct ig_counter *counter = ig_lookup(IG_MAP(IG_MAP_COUNTERS), &reason);

	/* Add 1 and drop the result: that is BPF_XADD, which every kernel has. Other atomics came with v5.12. */
	if (counter)
		__sync_fetch_and_add(audited ? &counter->audited : &counter->enforced, 1);
}

/* What is to be told of one connect or packet. */
struct ig_told {
	const struct ig_caller *caller; /* .cred is NULL when nobody knows the task */
	__u64 netns_cookie;
	__u32 generation;
	__u32 hook; /* enum ig_hook */
	__u32 lock;
	__u32 reason;
	__u32 verdict; /* enum ig_verdict */
};

/* The task's own words. It runs for denials, and for what someone asked to see: never on the way of most connects. */
ig_inline void ig_describe_task(struct ig_event *event, const struct ig_caller *caller)
{
	__u64 pid_tgid = ig_pid_tgid();
	const char *group_info = 0;

	event->pid = (__u32)pid_tgid;
	event->tgid = pid_tgid >> 32;
	event->fsgid = caller->fsgid;
	event->cgroup_id = ig_current_cgroup_id();
	ig_current_comm(event->comm, sizeof(event->comm));
	/* Should one of these fail, the record has no group: that is not worth losing the rest of it. */
	if (!ig_read_kernel(&group_info, sizeof(group_info), caller->cred + IG_OFF_CRED_GROUP_INFO))
		ig_read_kernel(&event->groups_len, sizeof(event->groups_len), group_info + IG_OFF_GROUP_INFO_NGROUPS);
}

/* One row for each lock, user and reason: the first of its kind makes it, with its address and its command. */
ig_inline void ig_report(const struct ig_told *told, const struct ig_event *event)
{
	struct ig_report_key key = {
		.generation = told->generation, .reason = told->reason, .lock = told->lock, .fsuid = event->fsuid
	};
	struct ig_report *row = ig_lookup(IG_MAP(IG_MAP_REPORT), &key);

	if (!row) {
		struct ig_report first = { .first_ns = event->time_ns, .address = event->address, .port = event->port };

		first.protocol = event->protocol;
		__builtin_memcpy(first.comm, event->comm, sizeof(first.comm));
		ig_update(IG_MAP(IG_MAP_REPORT), &key, &first, BPF_NOEXIST); /* another CPU may have made it: fine */
		row = ig_lookup(IG_MAP(IG_MAP_REPORT), &key);
	}
	if (!row) {
		ig_count(IG_REPORT_OVERFLOW, false);
		return;
	}
	__sync_fetch_and_add(&row->count, 1);
	row->last_ns = event->time_ns;
}

ig_inline void ig_tell(const struct ig_told *told, const struct ig_request *request)
{
	struct ig_event event = {};

	event.time_ns = ig_boot_time();
	event.netns_cookie = told->netns_cookie;
	event.fsuid = told->caller->fsuid;
	event.address = request->to;
	event.port = request->port;
	event.lock = told->lock;
	event.generation = told->generation;
	event.hook = told->hook;
	event.reason = told->reason;
	event.verdict = told->verdict;
	event.protocol = request->protocol;
	if (told->caller->cred)
		ig_describe_task(&event, told->caller);
	if (ig_ringbuf_output(IG_MAP(IG_MAP_EVENTS), &event, sizeof(event), 0))
		ig_count(IG_LOST_EVENTS, false);
	if (told->verdict != IG_VERDICT_ALLOWED)
		ig_report(told, &event);
}

ig_inline bool ig_log_allowed(void)
{
	__u32 zero = 0;
	const struct ig_watch *watch = ig_lookup(IG_MAP(IG_MAP_WATCH), &zero);

	return watch && watch->log_allowed;
}
