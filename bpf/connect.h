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

/* The decision about the caller; under strict it is a denial, too, when the socket can't be marked. */
ig_inline __u32 ig_judge_and_mark(__u32 generation, const struct ig_settings *settings, __u32 list,
				  struct ig_caller *caller, struct bpf_sock_addr *ctx, struct bpf_sock *sk)
{
	__u32 reason = ig_judge_caller(generation, settings, list, caller);

	if (!settings->strict || (reason > IG_DEFAULT_ALLOW && settings->mode != IG_AUDIT))
		return reason;
	/* MPTCP sends packets by the sockets of its subflows, which would not have this mark (net/mptcp/). */
	if (ctx->protocol == IG_IPPROTO_MPTCP)
		return reason > IG_DEFAULT_ALLOW ? reason : IG_UNAPPROVED_SOCKET;
	return ig_set_mark(sk, settings, caller, generation, list, reason) ? reason : IG_UNREADABLE;
}

/* For an address that may be locked: 1 lets the connect through, 0 makes it fail with EPERM. */
ig_inline int ig_check_connect(__u32 generation, struct bpf_sock_addr *ctx, struct bpf_sock *sk, __u32 hook)
{
	const struct ig_settings *settings;
	struct ig_request request;
	struct ig_port_range range;
	struct ig_caller caller = {};
	struct ig_decision decision = { .caller = &caller, .generation = generation, .hook = hook };
	bool valid, audited;

	ig_read_request(&request, ctx, sk, hook);
	ig_resolve_unspecified(&request);
	if (!ig_find_range(generation, &request, &range)) {
		ig_set_open_mark(generation, sk, request.protocol);
		return 1;
	}
	settings = ig_map_lookup_elem(IG_MAP(IG_MAP_SETTINGS), &generation);
	valid = settings && settings->valid;
	decision.lock = range.lock;
	decision.reason =
		valid ? ig_judge_and_mark(generation, settings, range.list, &caller, ctx, sk) : IG_NO_SETTINGS;
	audited = valid && decision.reason > IG_DEFAULT_ALLOW && settings->mode == IG_AUDIT;
	ig_count(decision.reason, audited);
	if (decision.reason <= IG_DEFAULT_ALLOW) {
		decision.verdict = IG_VERDICT_ALLOWED;
		if (ig_likely(!ig_log_allowed()))
			return 1;
	} else {
		decision.verdict = audited ? IG_VERDICT_AUDITED : IG_VERDICT_DENIED;
	}
	decision.netns_cookie = ig_get_netns_cookie(ctx);
	/*
	 * The request is read again. If the first one were used here, the verifier would carry its many states through
	 * the loops of the decision (a million instructions on v5.10, for IPv6).
	 */
	ig_read_request(&request, ctx, sk, hook);
	ig_resolve_unspecified(&request);
	ig_notify(&decision, &request);
	return decision.verdict != IG_VERDICT_DENIED;
}

#endif
