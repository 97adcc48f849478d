/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The redirect: a caller that a filter names reaches the filter's listener in place of the endpoint. The address of the
 * listener, 127.169.T.F:169, tells the filter who is there and where it wanted to go. So no record of the connection is
 * kept that could be lost, or mistaken for another one's.
 *
 * SECURITY: what if something else listens there? A number alone is no identity: rules change, and anybody may bind an
 * address of 127.0.0.0/8 in a network namespace of its own. So the listener is looked up at each connect, in the network
 * namespace of the caller's socket. Its mark, which root alone can set, must be the digest of the target and the rules
 * that the policy in force wants there.
 */
#ifndef IMDS_GUARD_REDIRECT_H
#define IMDS_GUARD_REDIRECT_H

#include <linux/types.h>
#include <linux/bpf.h>
#include "address.h"
#include "caller.h"
#include "generation.h"
#include "helpers.h"
#include "imds_guard.h"
#include "request.h"

ig_inline bool ig_is_filter_address(__u32 ip4)
{
	return (ip4 & ig_be32(IG_FILTER_PREFIX_MASK)) == ig_be32(IG_FILTER_NETWORK);
}

/*
 * Whether the listener with this mark is at this address of IPv4, in the network namespace of the caller's socket:
 * __bpf_sk_lookup() in net/core/filter.c.
 */
ig_inline bool ig_is_filter_there(struct bpf_sock_addr *ctx, __u32 ip4, __u64 digest)
{
	struct bpf_sock_tuple tuple = {};
	const struct ig_filter_mark *mark;
	struct bpf_sock *listener;
	bool is_there;

	tuple.ipv4.saddr = IG_LOOPBACK4;
	tuple.ipv4.daddr = ip4;
	tuple.ipv4.dport = ig_be16(IG_FILTER_PORT);
	listener = ig_sk_lookup_tcp(ctx, &tuple, IG_TUPLE4_SIZE, (__u64)BPF_F_CURRENT_NETNS, 0);
	if (!listener)
		return false;
	mark = ig_sk_storage_get(IG_MAP(IG_MAP_FILTER_MARKS), listener, 0, 0);
	is_there = listener->state == BPF_TCP_LISTEN && mark && mark->digest == digest;
	ig_sk_release(listener);
	return is_there;
}

/*
 * Whether the kernel can connect this socket to an address of IPv4 on loopback. It can't when the socket is bound to an
 * interface, or to an address of IPv6. It can't either when the socket is for IPv6 alone (IPV6_V6ONLY), which no hook
 * sees: then the kernel refuses the connect after the redirect (ENETUNREACH).
 */
ig_inline bool ig_can_redirect(struct bpf_sock *sk, __u32 hook)
{
	struct ig_address from;

	if (sk->bound_dev_if)
		return false;
	if (hook == IG_CONNECT4)
		return true;
	ig_set_ipv6(&from, sk->src_ip6);
	return ig_is_unspecified(&from) || ig_is_ipv4(&from);
}

/* Where a caller goes that a filter names: IG_FILTERED with an address of IPv4, or the reason to deny it. */
ig_inline __u32 ig_find_filter(__u32 generation, const struct ig_settings *settings, __u32 target, __u32 bit,
			       struct bpf_sock_addr *ctx, struct bpf_sock *sk, __u32 hook, __u32 *ip4)
{
	struct ig_filter_key key = { .generation = generation, .target = target, .bit = bit };
	const struct ig_filter *filter;

	if ((hook != IG_CONNECT4 && hook != IG_CONNECT6) || !ig_can_redirect(sk, hook))
		return IG_NOT_SERVED;
	filter = ig_map_lookup_elem(IG_MAP(IG_MAP_FILTERS), &key);
	if (!filter)
		return IG_NOT_SERVED;
	*ip4 = ig_be32(IG_FILTER_NETWORK | target << 8 | filter->number);
	/* In audit mode nobody is redirected. */
	return settings->mode == IG_AUDIT || ig_is_filter_there(ctx, *ip4, filter->digest) ? IG_FILTERED : IG_NO_FILTER;
}

/*
 * The last step of a connect: what is reported is the destination that the caller gave. The asm keeps clang from one store
 * behind a computed pointer to the context, which no verifier accepts.
 */
ig_inline void ig_redirect(struct bpf_sock_addr *ctx, __u32 hook, __u32 ip4)
{
	if (hook == IG_CONNECT4) {
		ctx->user_ip4 = ip4;
		ctx->user_port = ig_be16(IG_FILTER_PORT);
		asm volatile("" : : "r"(4));
	} else if (hook == IG_CONNECT6) {
		ctx->user_ip6[0] = 0;
		ctx->user_ip6[1] = 0;
		ctx->user_ip6[2] = IG_MAPPED;
		ctx->user_ip6[3] = ip4;
		ctx->user_port = ig_be16(IG_FILTER_PORT);
		asm volatile("" : : "r"(6));
	}
}

/* What T in the address of a listener stands for; NULL where peer is no such address. */
ig_inline const struct ig_target *ig_find_target(const struct ig_address *peer, __u32 port_be)
{
	struct ig_target_key key = {};

	if ((__u16)port_be != ig_be16(IG_FILTER_PORT) || !ig_is_ipv4(peer) || !ig_is_filter_address(peer->word[3]))
		return 0;
	key.generation = ig_generation();
	key.target = ig_be32(peer->word[3]) >> 8 & 0xff;
	return ig_map_lookup_elem(IG_MAP(IG_MAP_TARGETS), &key);
}

#endif
