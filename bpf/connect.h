/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A connect or sendmsg from beginning to end: request, range, decision, mark, report. */
#ifndef IMDS_GUARD_CONNECT_H
#define IMDS_GUARD_CONNECT_H

#include <linux/types.h>
#include <linux/bpf.h>
#include "address.h"
#include "caller.h"
#include "decide.h"
#include "endpoint.h"
#include "helpers.h"
#include "imds_guard.h"
#include "mark.h"
#include "notify.h"
#include "redirect.h"
#include "request.h"

/*
 * A connected socket that sends with a control message and without an address runs the sendmsg hooks, too, with an
 * address of zeros. It was judged when it was connected. A caller can't write such an address: port 0 is EINVAL
 * (udp_sendmsg() in net/ipv4/udp.c), and udpv6_sendmsg() takes AF_UNSPEC for no address.
 */
ig_inline bool ig_has_no_address(struct bpf_sock_addr *ctx)
{
	return ctx->user_family == 0 && ctx->user_port == 0;
}

ig_inline bool ig_destination_may_be_locked(__u32 generation, struct bpf_sock_addr *ctx, __u32 hook)
{
	struct ig_address to;

	if (ig_is_for_ipv4(hook)) {
		ig_set_ipv4(&to, ctx->user_ip4);
		return ig_may_be_locked(generation, &to);
	}
	ig_set_ipv6(&to, ctx->user_ip6);
	return ig_may_be_locked(generation, &to);
}

/* The decision about the caller, and for IG_FILTERED the filter's address, of IPv4. */
ig_inline __u32 ig_judge(__u32 generation, const struct ig_settings *settings, const struct ig_port_range *range,
			 struct ig_caller *caller, struct bpf_sock_addr *ctx, struct bpf_sock *sk, __u32 hook,
			 __u32 *filter_ip4)
{
	__u32 reason = ig_judge_caller(generation, settings, range, caller) + settings->zero;

	if (!IG_HAS_FILTERS)
		return reason;
	*filter_ip4 = settings->zero;
	if (reason != IG_FILTERED)
		return reason;
	return ig_find_filter(generation, settings, range->target, caller->filter, ctx, sk, hook, filter_ip4);
}

/* Under strict: marks the socket of a connect that is let through. It is a denial when the socket can't be marked. */
ig_inline __u32 ig_mark_socket(__u32 generation, const struct ig_settings *settings, __u32 list,
			       const struct ig_caller *caller, struct bpf_sock_addr *ctx, struct bpf_sock *sk,
			       __u32 reason, __u32 filter_ip4)
{
	bool audited = settings->mode == IG_AUDIT, marked;

	if (!settings->strict || (!ig_permits(reason) && !audited))
		return reason;
	/* MPTCP sends packets by the sockets of its subflows, which would not have this mark (net/mptcp/). */
	if (ctx->protocol == IG_IPPROTO_MPTCP)
		return ig_permits(reason) ? IG_UNAPPROVED_SOCKET : reason;
	if (IG_HAS_FILTERS && reason == IG_FILTERED && !audited)
		marked = ig_set_filter_mark(sk, settings, caller, filter_ip4);
	else
		marked = ig_set_mark(sk, settings, caller, generation, list, reason);
	return marked ? reason : IG_UNREADABLE;
}

/*
 * The request is read again. If the first one were used here, the verifier would carry its many states through the loops
 * of the decision (a million instructions on v5.10, for IPv6).
 */
ig_inline void ig_notify_connect(struct ig_decision *decision, struct bpf_sock_addr *ctx, struct bpf_sock *sk,
				 __u32 hook)
{
	struct ig_request request;

	decision->netns_cookie = ig_get_netns_cookie(ctx);
	ig_read_request(&request, ctx, sk, hook);
	ig_resolve_unspecified(&request);
	ig_notify(decision, &request);
}

/* For an address that may be locked: 1 lets the connect through, 0 makes it fail with EPERM. */
ig_inline int ig_check_connect(__u32 generation, struct bpf_sock_addr *ctx, struct bpf_sock *sk, __u32 hook)
{
	const struct ig_settings *settings;
	struct ig_request request;
	struct ig_port_range range;
	struct ig_caller caller = {};
	struct ig_decision decision = { .caller = &caller, .generation = generation, .hook = hook };
	__u32 filter_ip4 = 0;

	ig_read_request(&request, ctx, sk, hook);
	ig_resolve_unspecified(&request);
	if (!ig_find_range(generation, &request, &range)) {
		ig_set_open_mark(generation, sk, request.protocol);
		return 1;
	}
	settings = ig_map_lookup_elem(IG_MAP(IG_MAP_SETTINGS), &generation);
	decision.lock = range.lock;
	decision.reason = IG_NO_SETTINGS;
	decision.verdict = IG_VERDICT_DENIED;
	if (settings && settings->valid) {
		decision.reason = ig_judge(generation, settings, &range, &caller, ctx, sk, hook, &filter_ip4);
		decision.reason =
			ig_mark_socket(generation, settings, range.list, &caller, ctx, sk, decision.reason, filter_ip4);
		if (decision.reason <= IG_DEFAULT_ALLOW)
			decision.verdict = IG_VERDICT_ALLOWED;
		else if (settings->mode == IG_AUDIT)
			decision.verdict = IG_VERDICT_AUDITED;
		else if (IG_HAS_FILTERS && decision.reason == IG_FILTERED)
			decision.verdict = IG_VERDICT_ALLOWED;
	} else {
		ig_read_caller(&caller, ig_get_current_task()); /* for the record: it is a denial in any case */
	}
	ig_count(decision.reason, decision.verdict == IG_VERDICT_AUDITED);
	if (decision.verdict != IG_VERDICT_ALLOWED || ig_log_allowed())
		ig_notify_connect(&decision, ctx, sk, hook);
	if (IG_HAS_FILTERS && decision.reason == IG_FILTERED && decision.verdict == IG_VERDICT_ALLOWED)
		ig_redirect(ctx, hook, filter_ip4);
	return decision.verdict != IG_VERDICT_DENIED;
}

#endif
