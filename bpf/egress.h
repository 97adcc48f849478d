/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Strict: packets are held to the marks. Runs for every packet of the machine's sockets. Part of imds_guard.bpf.c. */

#define IG_ETH_P_IP ig_be16(0x0800)
#define IG_ETH_P_IPV6 ig_be16(0x86dd)
#define IG_TCP_FLAGS_AT 13
#define IG_TCP_SYN 0x02
#define IG_TCP_RST 0x04

/* Extension headers of IPv6 (RFC 8200, section 4; RFC 4302) that lead on to another one. */
#define IG_NEXT_HOP_BY_HOP 0
#define IG_NEXT_ROUTING 43
#define IG_NEXT_FRAGMENT 44
#define IG_NEXT_AUTHENTICATION 51
#define IG_NEXT_OPTIONS 60
#define IG_EXTENSIONS 8 /* more than any packet of use has */

struct ig_packet {
	struct ig_request request;
	struct ig_address from;
	__u16 ports[2]; /* source and destination, in network byte order */
	__u32 transport_at; /* octets from the network header */
	bool first_fragment; /* what comes after it may overlap it: to some receivers its flags are not what they seem */
	bool later_fragment; /* it has no ports: without the first fragment nobody can put it together */
	bool obscure; /* nobody can tell what it carries */
};

ig_inline void ig_find_transport4(struct __sk_buff *skb, struct ig_packet *packet)
{
	__u8 head[10]; /* RFC 791, section 3.1 */
	__u32 from;

	if (ig_load_octets(skb, 0, head, sizeof(head)) || ig_load_octets(skb, 12, &from, sizeof(from))) {
		packet->obscure = true;
		return;
	}
	ig_set_ipv4(&packet->from, from);
	packet->transport_at = (head[0] & 15) * 4;
	packet->later_fragment = (head[6] & 0x1f) || head[7];
	packet->first_fragment = head[6] & 0x20;
	packet->request.protocol = ig_protocol_of(head[9]);
}

ig_inline void ig_find_transport6(struct __sk_buff *skb, struct ig_packet *packet)
{
	__u32 at = 40, i;
	__u8 next, head[4]; /* next header, length, and of a fragment its offset */

	packet->obscure = true;
	if (ig_load_octets(skb, 6, &next, sizeof(next)) || ig_load_octets(skb, 8, &packet->from, sizeof(packet->from)))
		return;
#pragma clang loop unroll(full)
	for (i = 0; i < IG_EXTENSIONS; i++) {
		if (next != IG_NEXT_HOP_BY_HOP && next != IG_NEXT_ROUTING && next != IG_NEXT_FRAGMENT &&
		    next != IG_NEXT_AUTHENTICATION && next != IG_NEXT_OPTIONS) {
			packet->obscure = false;
			packet->transport_at = at;
			packet->request.protocol = ig_protocol_of(next);
			return;
		}
		if (ig_load_octets(skb, at, head, sizeof(head)))
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
			packet->obscure = false;
			return;
		}
	}
}

/* 0 for what is not TCP, or too short for it. */
ig_inline __u8 ig_tcp_flags(struct __sk_buff *skb, const struct ig_packet *packet)
{
	__u8 flags = 0;

	if (packet->obscure || packet->request.protocol != IG_TCP ||
	    ig_load_octets(skb, packet->transport_at + IG_TCP_FLAGS_AT, &flags, sizeof(flags)))
		return 0;
	return flags;
}

/* No stack sends what is obscure: it counts for the whole address. */
ig_inline bool ig_find_packets_range(__u32 generation, const struct ig_packet *packet, struct ig_port_range *found)
{
	const struct ig_endpoint *endpoint;

	if (!packet->obscure)
		return ig_find_range(generation, &packet->request, found);
	endpoint = ig_find_endpoint(generation, &packet->request.to);
	if (!endpoint)
		return false;
	*found = endpoint->ranges[0];
	return true;
}

/* Does the mark of a socket let it talk to what a list is about, audit mode's included? Those connects were counted. */
ig_inline bool ig_mark_passes(__u32 generation, const struct ig_settings *settings, __u32 list, const void *sk)
{
	const struct ig_mark *mark = ig_socket_storage(IG_MAP(IG_MAP_MARKS), sk, 0, 0);

	if (!mark)
		return false;
	if (mark->kind == IG_MARK_AUDIT)
		return settings->mode == IG_AUDIT;
	if (mark->kind == IG_MARK_OPEN)
		return list == IG_NO_LIST;
	return ig_mark_holds(generation, settings, list, mark);
}

/* How the kernel knows the connection that a packet belongs to: as the one whom it is sent to sees it, or turned round. */
ig_inline void ig_tuple(struct bpf_sock_tuple *tuple, const struct ig_packet *packet, bool ipv4, bool turned)
{
	const struct ig_address *from = turned ? &packet->request.to : &packet->from;
	const struct ig_address *to = turned ? &packet->from : &packet->request.to;

	if (ipv4) {
		tuple->ipv4.saddr = from->word[3];
		tuple->ipv4.daddr = to->word[3];
		tuple->ipv4.sport = packet->ports[turned];
		tuple->ipv4.dport = packet->ports[!turned];
		return;
	}
	__builtin_memcpy(tuple->ipv6.saddr, from, sizeof(tuple->ipv6.saddr));
	__builtin_memcpy(tuple->ipv6.daddr, to, sizeof(tuple->ipv6.daddr));
	tuple->ipv6.sport = packet->ports[turned];
	tuple->ipv6.dport = packet->ports[!turned];
}

#define IG_LOOPBACK 1 /* LOOPBACK_IFINDEX, include/net/flow.h */
#define IG_TUPLE4 12 /* octets of a tuple: the verifier wants a constant */
#define IG_TUPLE6 36

/*
 * Where a locked address is one of this machine's own, its clients have it, too, and the service's answers go to a
 * locked address: they pass when the socket that they go to was let through to where they come from.
 */
ig_inline bool ig_answers_approved(struct __sk_buff *skb, __u32 generation, const struct ig_settings *settings,
				   const struct ig_packet *packet, bool ipv4)
{
	struct ig_request asked = { .to = packet->from, .port = ig_be16(packet->ports[0]), .protocol = IG_TCP };
	struct bpf_sock_tuple tuple = {};
	struct ig_port_range range;
	__u32 list = IG_NO_LIST;
	struct bpf_sock *sk;
	bool passes;

	/*
	 * What goes to an address of this machine leaves by loopback. Elsewhere the tuple would find whatever somebody has
	 * bound to that port here, or to that address (IP_TRANSPARENT in ip(7)).
	 */
	if (skb->ifindex != IG_LOOPBACK)
		return false;
	if (ig_find_range(generation, &asked, &range))
		list = range.list;

	ig_tuple(&tuple, packet, ipv4, false);
	sk = ipv4 ? ig_find_tcp(skb, &tuple, IG_TUPLE4, (__u64)BPF_F_CURRENT_NETNS, 0) :
		    ig_find_tcp(skb, &tuple, IG_TUPLE6, (__u64)BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return false;
	/* Who listens has asked for nothing, whatever the socket was let through to before. */
	passes = sk->state != BPF_TCP_LISTEN && ig_mark_passes(generation, settings, list, sk);
	ig_release(sk);
	return passes;
}

ig_inline bool ig_is_time_wait(struct __sk_buff *skb, const struct ig_packet *packet, bool ipv4, bool turned)
{
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sk;
	bool is;

	ig_tuple(&tuple, packet, ipv4, turned);
	sk = ipv4 ? ig_find_any_tcp(skb, &tuple, IG_TUPLE4, (__u64)BPF_F_CURRENT_NETNS, 0) :
		    ig_find_any_tcp(skb, &tuple, IG_TUPLE6, (__u64)BPF_F_CURRENT_NETNS, 0);
	if (!sk)
		return false;
	is = sk->state == BPF_TCP_TIME_WAIT;
	ig_release(sk);
	return is;
}

/*
 * What goes on without an approved socket. A reset takes a connection down, and the other end would wait for what was
 * cut. When a connection is closed the kernel remembers it in TIME_WAIT, without the socket and its mark, and answers
 * for it: none of that can carry data that anybody reads. A SYN could begin a new one. The kernel never sends any of it
 * in fragments, of which a later one may write over the flags (RFC 1858, section 3).
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

/* 1 lets the packet out, 0 drops it: no socket that was approved sends it. */
ig_inline int ig_judge_packet(struct __sk_buff *skb, __u32 generation, struct ig_packet *packet, bool ipv4)
{
	const struct ig_settings *settings;
	struct ig_port_range range;
	struct ig_caller caller = {};
	struct ig_told told = { .caller = &caller, .generation = generation, .hook = IG_EGRESS };
	struct bpf_sock *sk;
	__u8 flags;

	if (!ig_find_packets_range(generation, packet, &range))
		return 1;
	settings = ig_lookup(IG_MAP(IG_MAP_SETTINGS), &generation);
	told.reason = IG_NO_SETTINGS;
	told.verdict = IG_VERDICT_DENIED;
	if (settings && settings->valid) {
		if (!settings->strict)
			return 1;
		sk = skb->sk;
		sk = sk ? ig_full_socket(sk) : 0;
		if (sk && ig_mark_passes(generation, settings, range.list, sk))
			return 1;
		flags = ig_tcp_flags(skb, packet);
		if (flags && ig_answers_approved(skb, generation, settings, packet, ipv4))
			return 1;
		if (ig_is_harmless(skb, packet, ipv4, flags))
			return 1;
		told.reason = IG_UNAPPROVED_SOCKET;
		if (settings->mode == IG_AUDIT)
			told.verdict = IG_VERDICT_AUDITED;
	}
	ig_count(told.reason, told.verdict == IG_VERDICT_AUDITED);
	told.lock = range.lock;
	caller.fsuid = ig_socket_uid(skb);
	ig_tell(&told, &packet->request);
	return told.verdict == IG_VERDICT_AUDITED;
}

/* Reads what the packet carries, and to which port, and judges it. */
ig_inline int ig_judge_locked_packet(struct __sk_buff *skb, __u32 generation, struct ig_packet *packet, bool ipv4)
{
	if (ipv4)
		ig_find_transport4(skb, packet);
	else
		ig_find_transport6(skb, packet);
	if (packet->later_fragment)
		return 1;
	if (!packet->obscure && !packet->request.protocol)
		return 1; /* another protocol: not ours to judge */
	if (!packet->obscure && ig_load_octets(skb, packet->transport_at, packet->ports, sizeof(packet->ports)))
		packet->obscure = true;
	packet->request.port = ig_be16(packet->ports[1]);
	return ig_judge_packet(skb, generation, packet, ipv4);
}
