// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The hooks: connect4, connect6, sendmsg4 and sendmsg6 of cgroups, egress under strict mode, and getpeername4 and
 * getpeername6 where the policy has filters.
 *
 * SECURITY: why can't a denied caller reach a locked endpoint?
 *
 * 1. Can it get past the hooks? Every connect(2) of a TCP or UDP socket, and every sendto(2) and sendmsg(2) with an
 *    address, runs them before a packet is sent: in every namespace, and from io_uring, too. The links are attached
 *    to a cgroup that the caller is in, and no other program can turn EPERM into success. There is one form of each
 *    address: IPv4 is mapped to IPv6, and 0.0.0.0 and :: are resolved as the kernel does it. A raw socket
 *    (CAP_NET_RAW) needs no connect: under strict mode its packets are dropped. Packet sockets (CAP_NET_RAW) pass
 *    below every hook.
 *
 * 2. Can it forge what decides? The hooks read the kernel's copy of the address, and the task's own fsuid, fsgid and
 *    groups in the kernel's memory, as IDs of the initial user namespace. They change only with CAP_SETUID or
 *    CAP_SETGID there, or by a set-user-ID program. Namespaces give no right: processes of containers are denied
 *    unless the policy allows them, and "default allow" is for the initial user namespace alone. Only root can write
 *    the maps of the policy. Each run reads one generation, so two policies never mix. What can't be read is a
 *    denial; tests/vm/test_failing_calls.py makes each call fail, and lists those where it is none.
 *
 * docs/security.md lists the attacks that were tried, and those that are not stopped.
 *
 * No header of the kernel is included: the offsets of its structs come in as IG_OFF_* from BTF (kernel/btf.py). bcc
 * compiles this file as plain C. None of bcc's extensions is used, so that clang alone can check it.
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include "address.h"
#include "connect.h"
#include "egress.h"
#include "generation.h"
#include "helpers.h"
#include "imds_guard.h"
#include "redirect.h"

/*
 * connect4, connect6, sendmsg4 and sendmsg6. The function is compiled once, because compiling is most of the time of
 * a start, and loaded once for each hook. The verifier does not follow branches for other hooks and removes them
 * (opt_hard_wire_dead_code_branches() and opt_remove_dead_code() in kernel/bpf/verifier.c).
 */
int ig_sock_addr(struct bpf_sock_addr *ctx)
{
	__u32 hook = IG_THIS_HOOK();
	struct bpf_sock *sk;
	__u32 generation;

	if ((hook == IG_SENDMSG4 || hook == IG_SENDMSG6) && ig_has_no_address(ctx))
		return 1;
	generation = ig_generation();
	if (!generation || ig_likely(!ig_destination_may_be_locked(generation, ctx, hook)))
		return 1;
	sk = ctx->sk;
	/* The verifier demands the test; the kernel always gives a socket. */
	return sk ? ig_check_connect(generation, ctx, sk, hook) : 0;
}

/*
 * getpeername(2) of a redirected socket shows the endpoint. The verifier demands the result 1. Two functions, because in one
 * for both clang computes pointers to context fields, which no verifier accepts.
 */
int ig_getpeername4(struct bpf_sock_addr *ctx)
{
	const struct ig_target *target;
	struct ig_address peer;

	ig_set_ipv4(&peer, ctx->user_ip4);
	target = ig_find_target(&peer, ctx->user_port);
	if (!target || !ig_is_ipv4(&target->address))
		return 1;
	ctx->user_ip4 = target->address.word[3];
	ctx->user_port = ig_be16(target->port);
	return 1;
}

int ig_getpeername6(struct bpf_sock_addr *ctx)
{
	const struct ig_target *target;
	struct ig_address peer;

	ig_set_ipv6(&peer, ctx->user_ip6);
	target = ig_find_target(&peer, ctx->user_port);
	if (!target)
		return 1;
	ctx->user_ip6[0] = target->address.word[0];
	ctx->user_ip6[1] = target->address.word[1];
	ctx->user_ip6[2] = target->address.word[2];
	ctx->user_ip6[3] = target->address.word[3];
	ctx->user_port = ig_be16(target->port);
	return 1;
}

#ifndef IG_WITHOUT_EGRESS
/* Under strict mode. The function stands here because bcc makes programs only of functions in the main file. */
int ig_egress(struct __sk_buff *skb)
{
	__u32 generation = ig_generation();
	struct ig_packet packet = {};
	bool ipv4 = skb->protocol == IG_ETH_P_IP;
	__u32 word;

	if (!generation || (!ipv4 && skb->protocol != IG_ETH_P_IPV6))
		return 1;
	if (ipv4) {
		if (ig_skb_load_bytes(skb, 16, &word, sizeof(word)))
			return 1; /* shorter than the header: not an IP packet */
		ig_set_ipv4(&packet.request.to, word);
	} else if (ig_skb_load_bytes(skb, 24, &packet.request.to, sizeof(packet.request.to))) {
		return 1;
	}
	if (ig_likely(!ig_may_be_locked(generation, &packet.request.to)))
		return 1;
	return ig_check_packet(skb, generation, &packet, ipv4);
}
#endif

#ifndef BCC_SEC /* bcc adds a licence of its own; the loader gives the kernel the licence */
char _license[] __attribute__((section("license"), used)) = "Dual BSD/GPL";
#endif
