/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The request: what one connect or sendmsg asks for, from the hook's context and the socket. */
#ifndef IMDS_GUARD_REQUEST_H
#define IMDS_GUARD_REQUEST_H

#include <linux/types.h>
#include <linux/bpf.h>
#include "address.h"
#include "helpers.h"
#include "imds_guard.h"

#define IG_IPPROTO_TCP 6
#define IG_IPPROTO_UDP 17
#define IG_IPPROTO_MPTCP 262

struct ig_request {
	struct ig_address to;
	struct ig_address from; /* the socket's own address; zero when it has none */
	__u32 from_unknown_interface; /* the kernel would use the address of an interface that no hook can see */
	__u32 port; /* host byte order */
	__u32 protocol; /* enum ig_protocol, 0 for any other */
};

ig_inline __u32 ig_protocol_of(__u32 protocol)
{
	if (protocol == IG_IPPROTO_TCP || protocol == IG_IPPROTO_MPTCP)
		return IG_TCP;
	return protocol == IG_IPPROTO_UDP ? IG_UDP : 0;
}

ig_inline bool ig_is_for_ipv4(__u32 hook)
{
	return hook == IG_CONNECT4 || hook == IG_SENDMSG4;
}

/*
 * No hook sees IP_UNICAST_IF or the interface of IP_PKTINFO. Only UDP sockets obey these, so a UDP socket without an
 * address of its own is treated as one whose address comes from an interface.
 */
ig_inline void ig_read_request(struct ig_request *request, struct bpf_sock_addr *ctx, struct bpf_sock *sk, __u32 hook)
{
	request->port = ig_be16((__u16)ctx->user_port);
	request->protocol = ig_protocol_of(ctx->protocol);
	request->from_unknown_interface = sk->bound_dev_if || request->protocol == IG_UDP;
	if (ig_is_for_ipv4(hook)) {
		__u32 from;

		/* The socket's own address, or what IP_PKTINFO has put in its place: another address or none. */
		if (hook == IG_SENDMSG4) {
			from = ctx->msg_src_ip4;
			/* Without this clang merges the two loads into one that no verifier accepts. */
			asm volatile("" : "+r"(from));
		} else {
			from = sk->src_ip4;
		}
		ig_set_ipv4(&request->to, ctx->user_ip4);
		ig_set_ipv4(&request->from, from);
		return;
	}
	ig_set_ipv6(&request->to, ctx->user_ip6);
	if (hook == IG_SENDMSG6) {
		ig_set_ipv6(&request->from, ctx->msg_src_ip6);
		if (!ig_is_unspecified(&request->from))
			return;
	}
	ig_set_ipv6(&request->from, sk->src_ip6);
}

/*
 * 0.0.0.0 leads to the socket's own source address, or to loopback when it has none: ip_route_output_key_hash_rcu()
 * in net/ipv4/route.c. When an interface is given (SO_BINDTODEVICE, IP_UNICAST_IF, IP_PKTINFO) it leads to that
 * interface's address, which no hook can see. The address then stays 0.0.0.0, for which the trie has an entry that
 * denies every port that is locked anywhere. :: leads to loopback: tcp_v6_connect() in net/ipv6/tcp_ipv6.c.
 */
ig_inline void ig_resolve_unspecified(struct ig_request *request)
{
	struct ig_address *to = &request->to;
	const struct ig_address *from = &request->from;

	if (ig_likely(!ig_is_unspecified(to)))
		return;
	if (!ig_is_unspecified(from)) {
		*to = *from;
		return;
	}
	if (to->word[2] == 0)
		to->word[3] = ig_be32(1);
	else if (!request->from_unknown_interface)
		to->word[3] = IG_LOOPBACK4;
}

#endif
