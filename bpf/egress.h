/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Strict mode: a packet to a locked endpoint must come from a marked socket, or answer a connection that others made.
 * Runs for every packet that leaves.
 * policy/decide_packet.py: decide_packet() is its specification.
 */
#ifndef IMDS_GUARD_EGRESS_H
#define IMDS_GUARD_EGRESS_H

#include <linux/types.h>
#include <linux/bpf.h>
#include "address.h"
#include "caller.h"
#include "endpoint.h"
#include "helpers.h"
#include "imds_guard.h"
#include "incoming.h"
#include "mark.h"
#include "notify.h"
#include "request.h"

#define IG_ETH_P_IP ig_be16(0x0800)
#define IG_ETH_P_IPV6 ig_be16(0x86dd)
#define IG_TCP_FLAGS_OFFSET 13
#define IG_TCP_RST 0x04
#define IG_LOOPBACK_IFINDEX 1 /* LOOPBACK_IFINDEX, include/net/flow.h */
#define IG_OPEN_PORT 0x10000 /* in place of a list: the port is not locked */

/* Extension headers of IPv6 that another header can follow (RFC 8200, section 4; RFC 4302). */
#define IG_NEXT_HOP_BY_HOP 0
#define IG_NEXT_ROUTING 43
#define IG_NEXT_FRAGMENT 44
#define IG_NEXT_AUTHENTICATION 51
#define IG_NEXT_OPTIONS 60
#define IG_EXTENSIONS 8 /* more than any real packet has */

struct ig_packet {
	struct ig_request request;
	struct ig_address from;
	__u16 ports[2]; /* source and destination, in network byte order */
	__u32 transport_offset; /* bytes from the network header */
	bool first_fragment; /* a later fragment may overlap it, so its TCP flags can't be trusted */
	bool later_fragment; /* it has no ports; without the first fragment nobody can reassemble it */
	bool unparsable; /* what it carries is unknown */
};

/* --- what the packet carries ------------------------------------------------------------------------------------ */

ig_inline void ig_find_transport4(struct __sk_buff *skb, struct ig_packet *packet)
{
	__u8 head[10]; /* RFC 791, section 3.1 */
	__u32 from;

	if (ig_skb_load_bytes(skb, 0, head, sizeof(head)) || ig_skb_load_bytes(skb, 12, &from, sizeof(from))) {
		packet->unparsable = true;
		return;
	}
	ig_set_ipv4(&packet->from, from);
	/*
	 * A receiver discards these (RFC 1122, section 3.2.1.1): nothing in them can be relied on. Raw sockets send
	 * short headers. Since Linux 915fab69823a ("ipv4: raw: reject IP_HDRINCL packets with ihl < 5") (in v7.1) they
	 * do not.
	 */
	if (head[0] >> 4 != 4 || (head[0] & 15) < 5) {
		packet->unparsable = true;
		return;
	}
	packet->transport_offset = (head[0] & 15) * 4;
	packet->later_fragment = (head[6] & 0x1f) || head[7];
	packet->first_fragment = head[6] & 0x20;
	packet->request.protocol = ig_protocol_of(head[9]);
}

ig_inline void ig_find_transport6(struct __sk_buff *skb, struct ig_packet *packet)
{
	__u32 at = 40, i;
	__u8 next, first[7]; /* RFC 8200, section 3 */
	__u8 head[4]; /* next header, length; of a fragment the offset */

	packet->unparsable = true;
	if (ig_skb_load_bytes(skb, 0, first, sizeof(first)) ||
	    ig_skb_load_bytes(skb, 8, &packet->from, sizeof(packet->from)) || first[0] >> 4 != 6)
		return;
	next = first[6];
#pragma clang loop unroll(full)
	for (i = 0; i < IG_EXTENSIONS; i++) {
		if (next != IG_NEXT_HOP_BY_HOP && next != IG_NEXT_ROUTING && next != IG_NEXT_FRAGMENT &&
		    next != IG_NEXT_AUTHENTICATION && next != IG_NEXT_OPTIONS) {
			packet->unparsable = false;
			packet->transport_offset = at;
			packet->request.protocol = ig_protocol_of(next);
			return;
		}
		/*
		 * Where a receiver does not obey RFC 5722, a later fragment overwrites all of the first one but its
		 * first 8 bytes: not the ports when they are there, but those behind another header.
		 */
		if (packet->first_fragment || ig_skb_load_bytes(skb, at, head, sizeof(head)))
			return;
		if (next == IG_NEXT_FRAGMENT) {
			packet->later_fragment = head[2] || (head[3] & 0xf8);
			packet->first_fragment = head[3] & 1;
			at += 8;
		} else {
			at += next == IG_NEXT_AUTHENTICATION ? (head[1] + 2) * 4 : (head[1] + 1) * 8;
		}
		next = head[0];
		if (packet->later_fragment) {
			packet->unparsable = false;
			return;
		}
	}
}

/* 0 for a packet that is not TCP, or too short for it. */
ig_inline __u8 ig_tcp_flags(struct __sk_buff *skb, const struct ig_packet *packet)
{
	__u8 flags = 0;

	if (packet->unparsable || packet->request.protocol != IG_TCP ||
	    ig_skb_load_bytes(skb, packet->transport_offset + IG_TCP_FLAGS_OFFSET, &flags, sizeof(flags)))
		return 0;
	return flags;
}

/*
 * No stack sends unparsable packets: they are treated as if they were for every port of the address. Nobody can say for
 * which lock, so no mark approves them.
 */
ig_inline bool ig_find_packet_range(__u32 generation, const struct ig_packet *packet, struct ig_port_range *found)
{
	const struct ig_endpoint *endpoint;

	if (!packet->unparsable)
		return ig_find_range(generation, &packet->request, found);
	endpoint = ig_find_endpoint(generation, &packet->request.to);
	found->lock = IG_NO_LOCK;
	found->list = IG_NO_LIST;
	/* An endpoint without ranges locks nothing: it keeps a shorter prefix from this part of it. */
	return endpoint && endpoint->ranges_len;
}

/* --- what may pass without an approved socket ------------------------------------------------------------------- */

/* Whether a mark approves a list; in audit mode the audited connects, too, which were counted then. */
ig_inline bool ig_mark_passes(__u32 generation, const struct ig_settings *settings, __u32 list,
			      const struct ig_mark *mark)
{
	if (mark->kind == IG_MARK_AUDIT)
		return settings->mode == IG_AUDIT;
	return ig_mark_holds(generation, settings, list, mark);
}

/* Whether a mark is of a socket that was redirected to this filter. Such a socket may send nowhere else. */
ig_inline bool ig_reaches_filter(const struct ig_settings *settings, const struct ig_mark *mark,
				 const struct ig_address *filter)
{
	if (mark->kind == IG_MARK_AUDIT)
		return settings->mode == IG_AUDIT;
	return mark->kind == IG_MARK_FILTER && mark->gid == ig_filter_number(filter->word[3]);
}

/* Whether the socket was approved for a list, by its last call or by an earlier one. */
ig_inline bool ig_sender_passes(__u32 generation, const struct ig_settings *settings, __u32 list,
				const struct ig_address *to, const void *sk)
{
	const struct ig_mark *mark = ig_sk_storage_get(IG_MAP(IG_MAP_MARKS), sk, 0, 0);
	const struct ig_earlier *earlier;
	__u32 i;

	if (!mark || list == IG_NO_LIST)
		return false;
	if (list == IG_FILTER_LIST)
		return ig_reaches_filter(settings, mark, to);
	if (ig_mark_passes(generation, settings, list, mark))
		return true;
	earlier = ig_sk_storage_get(IG_MAP(IG_MAP_EARLIER), sk, 0, 0);
	if (!earlier)
		return false;
	for (i = 0; i < IG_EARLIER_MARKS; i++)
		if (ig_mark_passes(generation, settings, list, &earlier->marks[i]))
			return true;
	return false;
}

/*
 * Whether the client of a service was approved for it. It is a TCP socket, so its last connect is its only connection.
 * Anybody may connect to a port that is not locked: there a mark only shows that the socket has made a connect.
 */
ig_inline bool ig_client_passes(__u32 generation, const struct ig_settings *settings, __u32 list,
				const struct ig_address *service, const void *sk)
{
	const struct ig_mark *mark = ig_sk_storage_get(IG_MAP(IG_MAP_MARKS), sk, 0, 0);

	if (!mark || list == IG_NO_LIST)
		return false;
	if (list == IG_FILTER_LIST)
		return ig_reaches_filter(settings, mark, service);
	if (list == IG_OPEN_PORT)
		return mark->kind && mark->kind != IG_MARK_ACCEPTED;
	return ig_mark_passes(generation, settings, list, mark);
}

/* The tuple by which the kernel finds a socket: as the receiver of the packet sees it, or reversed. */
ig_inline void ig_tuple(struct bpf_sock_tuple *tuple, const struct ig_packet *packet, bool ipv4, bool reversed)
{
	const struct ig_address *from = reversed ? &packet->request.to : &packet->from;
	const struct ig_address *to = reversed ? &packet->from : &packet->request.to;

	if (ipv4) {
		tuple->ipv4.saddr = from->word[3];
		tuple->ipv4.daddr = to->word[3];
		tuple->ipv4.sport = packet->ports[reversed];
		tuple->ipv4.dport = packet->ports[!reversed];
		return;
	}
	__builtin_memcpy(tuple->ipv6.saddr, from, sizeof(tuple->ipv6.saddr));
	__builtin_memcpy(tuple->ipv6.daddr, to, sizeof(tuple->ipv6.daddr));
	tuple->ipv6.sport = packet->ports[reversed];
	tuple->ipv6.dport = packet->ports[!reversed];
}

/*
 * When a locked address belongs to this machine, its clients have that address, too, and the service's replies go to
 * a locked address. They pass when the socket that receives them was approved for the address that they come from.
 */
ig_inline bool ig_is_reply_to_approved(struct __sk_buff *skb, __u32 generation, const struct ig_settings *settings,
				       const struct ig_packet *packet, bool ipv4)
{
	struct ig_request asked = { .to = packet->from, .port = ig_be16(packet->ports[0]), .protocol = IG_TCP };
	struct bpf_sock_tuple tuple = {};
	struct ig_port_range range;
	__u32 list = IG_OPEN_PORT;
	struct bpf_sock *sk;
	bool passes;

	/*
	 * Packets to an address of this machine leave by loopback. On other interfaces the tuple would find any socket
	 * that is bound to that port here, or to that address (IP_TRANSPARENT in ip(7)).
	 */
	if (skb->ifindex != IG_LOOPBACK_IFINDEX)
		return false;
	if (ig_find_range(generation, &asked, &range))
		list = range.list;

	ig_tuple(&tuple, packet, ipv4, false);
	sk = ipv4 ? ig_sk_lookup_tcp(skb, &tuple, IG_TUPLE4_SIZE, (__u64)BPF_F_CURRENT_NETNS, 0) :
		    ig_sk_lookup_tcp(skb, &tuple, IG_TUPLE6_SIZE, (__u64)BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return false;
	/* A listening socket is not a client, whatever it was approved for before. */
	passes = sk->state != BPF_TCP_LISTEN && ig_client_passes(generation, settings, list, &packet->from, sk);
	ig_sk_release(sk);
	return passes;
}

ig_inline bool ig_is_time_wait(struct __sk_buff *skb, const struct ig_packet *packet, bool ipv4, bool reversed)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;
	bool is;

	ig_tuple(&tuple, packet, ipv4, reversed);
	sk = ipv4 ? ig_skc_lookup_tcp(skb, &tuple, IG_TUPLE4_SIZE, (__u64)BPF_F_CURRENT_NETNS, 0) :
		    ig_skc_lookup_tcp(skb, &tuple, IG_TUPLE6_SIZE, (__u64)BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return false;
	is = sk->state == BPF_TCP_TIME_WAIT;
	ig_sk_release(sk);
	return is;
}

/*
 * Packets that pass without an approved socket. A reset ends a connection; without it the other end would wait for a
 * connection that was cut. When a connection is closed, the kernel keeps it in TIME_WAIT, without the socket and its
 * mark, and answers for it. None of these packets can carry data that anybody reads. A SYN is excluded because it
 * could begin a new connection, and so are fragments: the kernel sends none of these packets in fragments, and a
 * later fragment may overwrite the flags (RFC 1858, section 3).
 */
ig_inline bool ig_is_harmless(struct __sk_buff *skb, const struct ig_packet *packet, bool ipv4, __u8 flags)
{
	if (packet->first_fragment)
		return false;
	if (flags & IG_TCP_RST)
		return true;
	if (!flags || (flags & IG_TCP_SYN))
		return false;
	return ig_is_time_wait(skb, packet, ipv4, true) || ig_is_time_wait(skb, packet, ipv4, false);
}

/* --- the decision about a packet -------------------------------------------------------------------------------- */

/* 1 lets the packet out. 0 drops it, because no approved socket sends it. */
ig_inline int ig_judge_packet(struct __sk_buff *skb, __u32 generation, struct ig_packet *packet, bool ipv4)
{
	const struct ig_settings *settings;
	struct ig_port_range range;
	struct ig_caller caller = {};
	struct ig_decision decision = { .caller = &caller, .generation = generation, .hook = IG_EGRESS };
	struct bpf_sock *sk;
	__u8 flags;

	if (!ig_find_packet_range(generation, packet, &range))
		return 1;
	settings = ig_map_lookup_elem(IG_MAP(IG_MAP_SETTINGS), &generation);
	decision.reason = IG_NO_SETTINGS;
	decision.verdict = IG_VERDICT_DENIED;
	if (settings && settings->valid) {
		if (!settings->strict)
			return 1;
		sk = skb->sk;
		sk = sk ? ig_sk_fullsock(sk) : 0;
		if (sk && ig_sender_passes(generation, settings, range.list, &packet->request.to, sk))
			return 1;
		flags = ig_tcp_flags(skb, packet);
		if (sk && !packet->first_fragment && ig_is_of_incoming(skb, packet->transport_offset, sk, flags))
			return 1;
		if (flags && ig_is_reply_to_approved(skb, generation, settings, packet, ipv4))
			return 1;
		if (ig_is_harmless(skb, packet, ipv4, flags))
			return 1;
		decision.reason = IG_UNAPPROVED_SOCKET;
		if (settings->mode == IG_AUDIT)
			decision.verdict = IG_VERDICT_AUDITED;
	}
	ig_count(decision.reason, decision.verdict == IG_VERDICT_AUDITED);
	decision.lock = range.lock;
	caller.fsuid = ig_get_socket_uid(skb);
	ig_notify(&decision, &packet->request);
	return decision.verdict == IG_VERDICT_AUDITED;
}

/* Reads the protocol and the ports of the packet, and judges it: 1 lets it out, 0 drops it. */
ig_inline int ig_check_packet(struct __sk_buff *skb, __u32 generation, struct ig_packet *packet, bool ipv4)
{
	if (ipv4)
		ig_find_transport4(skb, packet);
	else
		ig_find_transport6(skb, packet);
	if (packet->later_fragment)
		return 1;
	if (!packet->unparsable && !packet->request.protocol)
		return 1; /* neither TCP nor UDP: not guarded */
	if (!packet->unparsable &&
	    ig_skb_load_bytes(skb, packet->transport_offset, packet->ports, sizeof(packet->ports)))
		packet->unparsable = true;
	packet->request.port = ig_be16(packet->ports[1]);
	return ig_judge_packet(skb, generation, packet, ipv4);
}

#endif
