/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Strict mode: packets of connections that others made to a service of this machine. They pass, whatever the port of
 * the peer: load balancers probe from a locked address, and a client may be bound to one.
 *
 * SECURITY: why can't a denied caller use this for a request of its own?
 *
 * A service that listens at a locked endpoint takes part in a connection only after a SYN without ACK from this
 * machine. No such packet passes here. All others are nothing but data for a connection that it has accepted, or for
 * one that it has made itself.
 *
 * A socket that connected and was not approved must not pass for one that was accepted. The kernel does not record who
 * connected, but the peer has acknowledged the SYN of a connect: it counts as a byte (tcp_rcv_synsent_state_process()
 * and tcp_snd_una_update() in net/ipv4/tcp_input.c). An accepted socket begins behind its SYN
 * (tcp_create_openreq_child() in net/ipv4/tcp_minisocks.c). So a connection whose handshake is over, without an
 * acknowledged byte, was accepted. kernel/tcp_birth.py says more. The first packet of a service is such a one; it
 * marks the socket for those that follow.
 *
 * The mark holds for the one connection: connect() to AF_UNSPEC and connect() again begin another one on the same
 * socket. Without the acknowledged bytes, snd_una is where the connection's numbers began, and they begin at random.
 *
 * TCP_REPAIR makes connections without a SYN. It takes CAP_NET_ADMIN, and the connect hook sees its connect(2).
 */
#ifndef IMDS_GUARD_INCOMING_H
#define IMDS_GUARD_INCOMING_H

#include <linux/types.h>
#include <linux/bpf.h>
#include "helpers.h"
#include "imds_guard.h"
#include "mark.h"
#include "request.h"

#define IG_SOCK_STREAM 1 /* SOCK_STREAM: a raw socket can have the protocol TCP, too */
#define IG_TCP_DATA_OFFSET 12 /* RFC 9293, section 3.1: the length of the header in 4 bits, in words */
#define IG_TCP_SYN 0x02
#define IG_TCP_ACK 0x10

static const struct bpf_tcp_sock *(*ig_tcp_sock)(const void *sk) = (void *)96;

ig_inline bool ig_has_data(struct __sk_buff *skb, __u32 transport_offset)
{
	__u8 words;

	if (ig_skb_load_bytes(skb, transport_offset + IG_TCP_DATA_OFFSET, &words, sizeof(words)))
		return false;
	return skb->len > transport_offset + (words >> 4) * 4;
}

/*
 * Whether the handshake of the connection is over, so that a connect would have an acknowledged byte. With Fast Open
 * (RFC 7413) an accepted socket sends data before. A socket that connected while the peer did can't: send() waits
 * (tcp_sendmsg_locked() in net/ipv4/tcp.c).
 */
ig_inline bool ig_handshake_is_over(struct __sk_buff *skb, __u32 transport_offset, __u32 state)
{
	if (state == BPF_TCP_SYN_SENT)
		return false;
	return state != BPF_TCP_SYN_RECV || ig_has_data(skb, transport_offset);
}

ig_inline void ig_set_accepted_mark(struct bpf_sock *sk, __u32 first)
{
	struct ig_mark *mark = ig_sk_storage_get(IG_MAP(IG_MAP_MARKS), sk, 0, IG_STORAGE_CREATE);

	if (!mark)
		return;
	mark->serial = 0;
	mark->fsuid = 0;
	mark->gid = first;
	mark->list = 0;
	mark->kind = IG_MARK_ACCEPTED;
	mark->container_unchecked = 0;
}

/*
 * Whether a whole TCP packet of this socket belongs to a connection that others made. A SYN-ACK is sent by the
 * listening socket, with Fast Open by the accepted one; nobody keeps a mark for it.
 */
ig_inline bool ig_is_of_incoming(struct __sk_buff *skb, __u32 transport_offset, struct bpf_sock *sk, __u8 flags)
{
	const struct bpf_tcp_sock *tcp;
	const struct ig_mark *mark;
	__u32 first;

	if (!(flags & IG_TCP_ACK) || sk->type != IG_SOCK_STREAM || sk->protocol != IG_IPPROTO_TCP)
		return false;
	if (flags & IG_TCP_SYN)
		return sk->state == BPF_TCP_LISTEN || sk->state == BPF_TCP_SYN_RECV;
	tcp = ig_tcp_sock(sk);
	if (!tcp)
		return false;
	first = tcp->snd_una - (__u32)tcp->bytes_acked;
	mark = ig_sk_storage_get(IG_MAP(IG_MAP_MARKS), sk, 0, 0);
	if (mark && mark->kind == IG_MARK_ACCEPTED && mark->gid == first)
		return true;
	if (tcp->bytes_acked || !ig_handshake_is_over(skb, transport_offset, sk->state))
		return false;
	ig_set_accepted_mark(sk, first);
	return true;
}

#endif
