// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The hooks: cgroup connect4, connect6, sendmsg4 and sendmsg6, and the one decision that they share; under strict also
 * egress, which holds packets to what the others approved.
 *
 * policy.py's decide() is the specification of decide() below. No header of the kernel is included: the offsets of the
 * kernel's structs come in as IG_OFF_* from its BTF (kernel/btf.py). On doubt, a locked endpoint is denied.
 *
 * bcc compiles this as plain C; none of its map or tracing extensions is used, so that clang alone can check it.
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include "imds_guard.h"

#define ig_inline static inline __attribute__((always_inline))
#define ig_likely(x) __builtin_expect(!!(x), 1)

/* Helpers by their number in include/uapi/linux/bpf.h; names of our own, since bcc declares the usual ones. */
static void *(*ig_lookup)(const void *map, const void *key) = (void *)1;
static long (*ig_update)(const void *map, const void *key, const void *value, __u64 flags) = (void *)2;
static __u64 (*ig_pid_tgid)(void) = (void *)14;
static long (*ig_current_comm)(void *to, __u32 octets) = (void *)16;
static long (*ig_load_octets)(const void *skb, __u32 offset, void *to, __u32 octets) = (void *)26;
static __u32 (*ig_socket_uid)(const void *skb) = (void *)47;
static __u64 (*ig_current_cgroup_id)(void) = (void *)80;
static void *(*ig_find_tcp)(const void *skb, const void *tuple, __u32 octets, __u64 netns, __u64 flags) = (void *)84;
static long (*ig_release)(void *sk) = (void *)86;
static void *(*ig_full_socket)(const void *sk) = (void *)95;
static struct bpf_sock *(*ig_find_any_tcp)(const void *skb, const void *tuple, __u32 octets, __u64 netns,
					   __u64 flags) = (void *)99;
static void *(*ig_socket_storage)(const void *map, const void *sk, const void *value, __u64 flags) = (void *)107;
static long (*ig_read_kernel)(void *to, __u32 octets, const void *from) = (void *)113;
static __u64 (*ig_netns_cookie)(const void *ctx) = (void *)122;
static __u64 (*ig_boot_time)(void) = (void *)125;
static long (*ig_ringbuf_output)(const void *map, const void *record, __u64 octets, __u64 flags) = (void *)130;

/*
 * A word of the kernel's memory; not 0 when it can't be read. Where the verifier knows the type of the current task
 * (bpf_get_current_task_btf(), which 5.10 lacks) a plain load will do: a seventh of the price of the helper. The task's
 * own credentials are always there to be read; a pointer that is not is NULL, and tested for.
 */
#ifdef IG_DIRECT
static const char *(*ig_current_task)(void) = (void *)158;
#define ig_read(to, from) (*(to) = *(const __typeof__(*(to)) *)(from), 0)
#else
static const char *(*ig_current_task)(void) = (void *)35;
#define ig_read(to, from) ig_read_kernel(to, sizeof(*(to)), from)
#endif

__u64 ig_pseudo(__u64 kind, __u64 number) asm("llvm.bpf.pseudo");
#define IG_MAP(number) ((const void *)ig_pseudo(1, IG_MAP_BASE + (number))) /* 1: BPF_PSEUDO_MAP_FD */
#define IG_THIS_HOOK() ((__u32)ig_pseudo(1, IG_HOOK_PLACEHOLDER)) /* the loader makes a constant of it */

/*
 * A loop: up to times, at the most most, runs of step(context), until one returns another value than 0. With bpf_loop()
 * (v5.17) the verifier follows the step once, and not each run of it. The step is a function then, which the loader puts
 * behind the program (compiler.with_steps()); it has one argument, since bcc takes further ones for those of a kprobe.
 */
#ifdef IG_LOOP
static long (*ig_loop)(__u32 times, const void *step, void *context, __u64 flags) = (void *)181;
#define ig_step int
#define ig_repeat(times, most, step, context) \
	ig_loop(times, (const void *)ig_pseudo(4, IG_CALLBACK_##step), context, 0) /* 4: BPF_PSEUDO_FUNC */
#else
#define ig_step ig_inline int
/* Without the asm clang makes one bound of the two, and the verifier does not know that one. */
#define ig_repeat(times, most, step, context)                     \
	for (__u32 ig_run = 0; ig_run < (most); ig_run++) {       \
		__u32 ig_times = (times);                         \
                                                                  \
		asm volatile("" : "+r"(ig_times));                \
		if (ig_run >= ig_times || step(context))          \
			break;                                    \
	}
#endif

#define IG_PF_KTHREAD 0x00200000 /* include/linux/sched.h */
#define IG_IPPROTO_TCP 6
#define IG_IPPROTO_UDP 17
#define IG_IPPROTO_MPTCP 262

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define ig_be16(x) ((__u16)__builtin_bswap16(x))
#define ig_be32(x) __builtin_bswap32(x)
#else
#define ig_be16(x) ((__u16)(x))
#define ig_be32(x) (x)
#endif
#define IG_MAPPED ig_be32(0xffff) /* word[2] of ::ffff:a.b.c.d */
#define IG_LOOPBACK4 ig_be32(0x7f000001)

/* What one connect or sendmsg asks for. */
struct ig_request {
	struct ig_address to;
	struct ig_address from; /* the socket's own address, zero when it has none */
	__u32 from_device; /* the kernel would take the address of an interface that we don't know */
	__u32 port; /* host byte order */
	__u32 protocol; /* enum ig_protocol, 0 for any other */
};

/* The credentials of the connecting task: what the kernel itself checks access to files with (credentials(7)). */
struct ig_caller {
	const char *cred;
	__u32 fsuid;
	__u32 fsgid;
	__u32 allowed_gid; /* the group that a search found on the allow list */
	__u32 allowed_at; /* or where among the caller's groups a walk found one: it is one of IG_QUAD from there on */
	bool searched;
};

/* --- is the address locked at all? -------------------------------------------------------------------------------- */

/* abi.py: host_bit(). Any spread will do; a collision costs one look-up in the trie, never a wrong answer. */
ig_inline __u32 ig_host_bit(const struct ig_address *address)
{
	__u32 hash = address->word[0] * 0x9e3779b1u + address->word[1] * 0x85ebca77u +
		     address->word[2] * 0xc2b2ae3du + address->word[3] * 0x27d4eb2fu;

	hash ^= hash >> 15;
	hash *= 0x2c1b3c6du;
	return hash >> (32 - IG_HOST_BITS_LOG2);
}

ig_inline bool ig_is_ipv4(const struct ig_address *address)
{
	return address->word[0] == 0 && address->word[1] == 0 && address->word[2] == IG_MAPPED;
}

/* :: or ::ffff:0.0.0.0 */
ig_inline bool ig_is_unspecified(const struct ig_address *address)
{
	return address->word[3] == 0 && address->word[0] == 0 && address->word[1] == 0 &&
	       (address->word[2] == 0 || address->word[2] == IG_MAPPED);
}

/* The path of nearly every connect of the machine: two bits, no hash look-up. */
ig_inline bool ig_may_be_locked(__u32 generation, const struct ig_address *address)
{
	const struct ig_address_bitmap *bitmap = ig_lookup(IG_MAP(IG_MAP_ADDRESS_BITMAP), &generation);
	__u32 host = ig_host_bit(address);
	__u32 network, bits;

	if (!bitmap || ig_is_unspecified(address)) /* where that leads is seen later */
		return true;
	bits = bitmap->hosts[(host >> 5) & (IG_HOST_WORDS - 1)] >> (host & 31);
	if (ig_is_ipv4(address)) {
		network = ig_be32(address->word[3]) >> 16;
		bits |= bitmap->networks4[(network >> 5) & (IG_NETWORK_WORDS - 1)] >> (network & 31);
	} else {
		network = ig_be32(address->word[0]) >> 16;
		bits |= bitmap->networks6[(network >> 5) & (IG_NETWORK_WORDS - 1)] >> (network & 31);
	}
	return bits & 1;
}

ig_inline __u32 ig_protocol_of(__u32 protocol)
{
	if (protocol == IG_IPPROTO_TCP || protocol == IG_IPPROTO_MPTCP)
		return IG_TCP;
	return protocol == IG_IPPROTO_UDP ? IG_UDP : 0;
}

ig_inline void ig_set_ipv4(struct ig_address *address, __u32 word)
{
	address->word[0] = 0;
	address->word[1] = 0;
	address->word[2] = IG_MAPPED;
	address->word[3] = word;
}

/* A macro, since a pointer to a field of the context is none that the verifier takes. */
#define ig_set_ipv6(address, words)              \
	do {                                     \
		(address)->word[0] = (words)[0]; \
		(address)->word[1] = (words)[1]; \
		(address)->word[2] = (words)[2]; \
		(address)->word[3] = (words)[3]; \
	} while (0)

ig_inline bool ig_is_for_ipv4(__u32 hook)
{
	return hook == IG_CONNECT4 || hook == IG_SENDMSG4;
}

/*
 * What the connect or sendmsg asks for. No hook sees IP_UNICAST_IF or IP_PKTINFO's interface, and only UDP sockets heed
 * them: a UDP socket without an address of its own counts as one whose address comes from an interface.
 */
ig_inline void ig_read_request(struct ig_request *request, struct bpf_sock_addr *ctx, struct bpf_sock *sk, __u32 hook)
{
	request->port = ig_be16((__u16)ctx->user_port);
	request->protocol = ig_protocol_of(ctx->protocol);
	request->from_device = sk->bound_dev_if || request->protocol == IG_UDP;
	if (ig_is_for_ipv4(hook)) {
		__u32 from;

		/* The socket's own address, unless an IP_PKTINFO put another one, or none, in its place. */
		if (hook == IG_SENDMSG4) {
			from = ctx->msg_src_ip4;
			/* Else clang makes one load of the two, from an address that it computes, and no verifier takes that. */
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
 * 0.0.0.0 leads to the socket's own source address, or to loopback when it has none: ip_route_output_key_hash_rcu() in
 * net/ipv4/route.c. With an interface given (SO_BINDTODEVICE, IP_UNICAST_IF, IP_PKTINFO) it leads to that interface's
 * address, which no hook can see: then the address stays 0.0.0.0, and the trie has an entry for it that denies what is
 * locked anywhere. :: leads to loopback: tcp_v6_connect() in net/ipv6/tcp_ipv6.c.
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
	else if (!request->from_device)
		to->word[3] = IG_LOOPBACK4;
}

ig_inline const struct ig_endpoint *ig_find_endpoint(__u32 generation, const struct ig_address *address)
{
	struct ig_endpoint_key key = { .prefixlen = 32 + 128, .generation = generation, .address = *address };

	return ig_lookup(IG_MAP(IG_MAP_ENDPOINTS), &key);
}

/* The range of the most specific endpoint that has this port: ranges of shorter prefixes were copied into longer ones. */
ig_inline bool ig_find_range(__u32 generation, const struct ig_request *request, struct ig_port_range *found)
{
	const struct ig_endpoint *endpoint = ig_find_endpoint(generation, &request->to);
	__u32 i;

	if (!endpoint)
		return false;
	for (i = 0; i < IG_RANGES; i++) {
		const struct ig_port_range *range = &endpoint->ranges[i];

		if (i >= endpoint->ranges_len)
			break;
		if (request->port >= range->low && request->port <= range->high &&
		    (range->protocols & request->protocol)) {
			*found = *range;
			return true;
		}
	}
	return false;
}

/* --- who asks? ---------------------------------------------------------------------------------------------------- */

/*
 * IG_ALLOW, IG_DENY, both or 0. The 0 is read from the list's record: a constant would be one more state for the
 * verifier to follow through everything that comes after.
 */
ig_inline __u32 ig_member(__u32 generation, __u32 number, const struct ig_list *list, __u32 kind, __u32 id)
{
	struct ig_member key = { .generation = generation, .kind = kind, .list = number, .id = id };
	const __u32 *verdict = ig_lookup(IG_MAP(IG_MAP_MEMBERS), &key);

	return verdict ? *verdict : list->zero;
}

/* Most groups of most callers are on no list: one bit spares the look-up. */
ig_inline __u32 ig_group(__u32 generation, __u32 number, const struct ig_list *list, __u32 gid)
{
	if (!(list->gid_bitmap[(gid >> 5) & (IG_GID_BITMAP_WORDS - 1)] >> (gid & 31) & 1))
		return list->zero;
	return ig_member(generation, number, list, IG_GROUP, gid);
}

#define IG_UNREAD 4 /* beside IG_ALLOW and IG_DENY */
#define IG_TOO_MANY 8

#define IG_QUAD 4 /* groups read at a time: a read costs more than the test of what it brought */

struct ig_walk {
	const struct ig_list *list;
	const char *gid; /* of the first group */
	__u64 failed;
	__u32 generation;
	__u32 number;
	__u32 at; /* the next group to look at */
	__u32 allowed_at; /* where an allowed one stands, or up to IG_QUAD - 1 before it */
	__u32 seen;
};

ig_inline void ig_walk_one(struct ig_walk *walk)
{
	__u32 gid = 0;

	walk->failed |= ig_read_kernel(&gid, sizeof(gid), walk->gid + (__u64)walk->at * sizeof(gid));
	walk->seen |= ig_group(walk->generation, walk->number, walk->list, gid);
	walk->at++;
}

/*
 * By a product with a computed 0 or 1, since without bpf_loop() a branch is two paths at each step (more than a million
 * instructions on v5.10), and a mask makes later verifiers fork all the same.
 */
ig_step ig_walk_four(struct ig_walk *walk)
{
	const struct ig_list *list = walk->list;
	__u32 generation = walk->generation, number = walk->number, gids[IG_QUAD] = {}, four, hit;

	walk->failed |= ig_read_kernel(gids, sizeof(gids), walk->gid + (__u64)walk->at * sizeof(gids[0]));
	four = ig_group(generation, number, list, gids[0]);
	four |= ig_group(generation, number, list, gids[1]);
	four |= ig_group(generation, number, list, gids[2]);
	four |= ig_group(generation, number, list, gids[3]);
	hit = four & IG_ALLOW;
	asm volatile("" : "+r"(hit));
	walk->allowed_at += (walk->at - walk->allowed_at) * hit;
	walk->seen |= four;
	walk->at += IG_QUAD;
	return 0;
}

/* Up to IG_WALKED groups of the caller against a list of any length. */
ig_inline __u32 ig_walk_groups(__u32 generation, __u32 number, const struct ig_list *list, const char *gid, __u32 len,
			       __u32 *allowed_at)
{
	struct ig_walk walk = { .list = list, .gid = gid, .generation = generation, .number = number,
				.allowed_at = list->zero, .seen = list->zero };
	__u32 i;

	/* Unrolled, or clang counts down to 0, and before v6.8 "!= 0" taught the verifier nothing of a bound. */
#pragma clang loop unroll(full)
	for (i = 0; i < IG_QUAD - 1; i++)
		if (i < len % IG_QUAD)
			ig_walk_one(&walk);
	ig_repeat(len / IG_QUAD, IG_WALKED / IG_QUAD, ig_walk_four, &walk);
	*allowed_at = walk.allowed_at;
	return walk.failed ? IG_UNREAD : walk.seen;
}

/*
 * Whether a sorted array of len (1 to 65,536) group IDs has a listed one; *failed becomes non-zero when it can't be read.
 * Branch-free, so that the verifier sees one path: position moves by half times a computed 0 or 1, which the empty asm
 * keeps clang from turning back into a branch. With half 0 it reads the word before the array, to no effect:
 * that is group_info's ngroups.
 */
ig_inline bool ig_has_group(const struct ig_groups *groups, __u32 index, const char *gid, __u32 len, __u64 *failed)
{
	__u32 wanted = groups->gid[index];
	__u64 position = 0, left = len;
	__u32 step, value = 0;

	for (step = 0; step < 17; step++) {
		__u64 half = left >> 1;
		__u64 below;

		*failed |= ig_read_kernel(&value, sizeof(value), gid + (position + half) * 4 - 4);
		below = (__u64)value - wanted;
		asm volatile("" : "+r"(below));
		below >>= 63;
		asm volatile("" : "+r"(below));
		position += half * below;
		left -= half;
	}
	*failed |= ig_read_kernel(&value, sizeof(value), gid + position * 4);
	return value == wanted;
}

struct ig_search {
	const struct ig_groups *groups;
	const char *gid;
	__u64 failed;
	__u32 len; /* of gid */
	__u32 next; /* the listed group to look for */
	__u32 found; /* the listed group that the caller is in, and what the list says of it */
	__u32 verdict;
};

ig_step ig_search_one(struct ig_search *search)
{
	const struct ig_groups *groups = search->groups;
	__u32 next = search->next++;

	if (next >= IG_SEARCHED) /* the verifier asks */
		return 1;
	if (ig_has_group(groups, next, search->gid, search->len, &search->failed)) {
		search->found = groups->gid[next];
		search->verdict = next < groups->denied ? IG_DENY : IG_ALLOW;
	}
	return search->verdict || search->failed;
}

/* More than IG_WALKED groups: look for each listed group among them. Denied ones come first, so the first hit decides. */
ig_inline __u32 ig_search_groups(__u32 generation, __u32 number, const char *gid, __u32 len, struct ig_caller *caller)
{
	struct ig_list_key key = { .generation = generation, .list = number };
	struct ig_search search = { .groups = ig_lookup(IG_MAP(IG_MAP_GROUPS), &key), .gid = gid, .len = len };

	if (!search.groups || search.groups->len > IG_SEARCHED)
		return IG_UNREAD;
	ig_repeat(search.groups->len, IG_SEARCHED, ig_search_one, &search);
	caller->searched = search.verdict;
	caller->allowed_gid = search.found;
	return search.failed ? IG_UNREAD : search.verdict;
}

/* What the lists say of the caller's supplementary groups: struct group_info, whose gid[] is sorted (groups_sort()). */
ig_inline __u32 ig_supplementary(__u32 generation, __u32 number, const struct ig_list *list,
				struct ig_caller *caller)
{
	const char *group_info = 0;
	__u32 len = 0;

	/* By the helper in any case: gid[] is indexed, which the verifier forbids for an address that it knows the type of. */
	if (ig_read_kernel(&group_info, sizeof(group_info), caller->cred + IG_OFF_CRED_GROUP_INFO) ||
	    ig_read_kernel(&len, sizeof(len), group_info + IG_OFF_GROUP_INFO_NGROUPS))
		return IG_UNREAD;
	if (len > IG_MAX_GROUPS)
		return IG_UNREAD;
	if (len <= IG_WALKED)
		return ig_walk_groups(generation, number, list, group_info + IG_OFF_GROUP_INFO_GID, len,
				      &caller->allowed_at);
	if (!(list->flags & IG_LIST_SMALL))
		return IG_TOO_MANY;
	return ig_search_groups(generation, number, group_info + IG_OFF_GROUP_INFO_GID, len, caller);
}

/* 1 when the caller lives in the initial user namespace, 0 when not, -1 when that can't be read. */
ig_inline int ig_in_initial_user_namespace(const char *cred)
{
	const char *namespace = 0;
	__s32 level = 0;

	if (ig_read(&namespace, cred + IG_OFF_CRED_USER_NS) || !namespace ||
	    ig_read(&level, namespace + IG_OFF_USER_NAMESPACE_LEVEL))
		return -1;
	return level == 0;
}

/* The same for the active PID namespace: that of the task itself, not the one that its children would get. */
ig_inline int ig_in_initial_pid_namespace(const char *task)
{
	const char *pid = 0;
	__u32 level = 0;

	if (ig_read(&pid, task + IG_OFF_TASK_STRUCT_THREAD_PID) || !pid || ig_read(&level, pid + IG_OFF_PID_LEVEL))
		return -1;
	return level == 0;
}

/* --- the decision ------------------------------------------------------------------------------------------------- */

/* Deny lists, then allow lists, then the default. */
ig_inline __u32 ig_judge_lists(__u32 generation, __u32 number, const struct ig_list *list, struct ig_caller *caller)
{
	/* Not 0, which the verifier would know: one more state to carry through the loops. */
	__u32 user = list->zero, group;

	caller->allowed_at = list->zero;
	if (list->flags & IG_LIST_USERS)
		user = ig_member(generation, number, list, IG_USER, caller->fsuid);
	if (user & IG_DENY)
		return IG_DENIED_USER;
	if ((user & IG_ALLOW) && !(list->flags & IG_LIST_DENY_GROUPS))
		return IG_ALLOWED_USER;
	if (list->flags & IG_LIST_GROUPS) {
		/* fsgid need not be in group_info: in_group_p() in kernel/groups.c looks at both. */
		group = ig_group(generation, number, list, caller->fsgid);
		if (group & IG_DENY)
			return IG_DENIED_GROUP;
		if ((group & IG_ALLOW) && !(list->flags & IG_LIST_DENY_GROUPS))
			return IG_ALLOWED_GROUP;
		/* Without these clang carries the tests above on as constants: a path each through all that follows. */
		asm volatile("" : "+r"(user));
		asm volatile("" : "+r"(group));
		group |= ig_supplementary(generation, number, list, caller);
		if (group & IG_UNREAD)
			return IG_UNREADABLE;
		if (group & IG_TOO_MANY)
			return IG_TOO_MANY_GROUPS;
		if (group & IG_DENY)
			return IG_DENIED_GROUP;
		if (user & IG_ALLOW)
			return IG_ALLOWED_USER;
		if (group & IG_ALLOW)
			return IG_ALLOWED_GROUP;
	}
	if (!(list->flags & IG_LIST_DEFAULT_ALLOW))
		return IG_NOT_LISTED;
	switch (ig_in_initial_user_namespace(caller->cred)) {
	case 1:
		return IG_DEFAULT_ALLOW;
	case 0:
		return IG_USER_NAMESPACE;
	}
	return IG_UNREADABLE;
}

/* 0 when the caller is one of the host's own processes, else the reason to deny it. */
ig_inline __u32 ig_judge_place(const struct ig_settings *settings, const char *task, const char *cred)
{
	__u32 flags = 0;
	int user, pid;

	if (ig_read(&flags, task + IG_OFF_TASK_STRUCT_FLAGS))
		return IG_UNREADABLE;
	if (flags & IG_PF_KTHREAD)
		return IG_KERNEL_THREAD;
	if (settings->allow_containers)
		return 0;
	user = ig_in_initial_user_namespace(cred);
	pid = ig_in_initial_pid_namespace(task);
	if (user < 0 || pid < 0)
		return IG_UNREADABLE;
	return user && pid ? 0 : IG_CONTAINER;
}

ig_inline __u32 ig_judge(__u32 generation, const struct ig_settings *settings, __u32 number, struct ig_caller *caller)
{
	__u32 record = (generation - 1) * IG_LISTS + number;
	const struct ig_list *list = ig_lookup(IG_MAP(IG_MAP_LISTS), &record);
	const char *task = ig_current_task();
	__u32 reason;

	if (number == IG_NO_LIST)
		return IG_UNSPECIFIED_DESTINATION;
	if (!list || !(list->flags & IG_LIST_VALID))
		return IG_UNREADABLE;
	if (ig_read(&caller->cred, task + IG_OFF_TASK_STRUCT_CRED) || !caller->cred ||
	    ig_read(&caller->fsuid, caller->cred + IG_OFF_CRED_FSUID) ||
	    ig_read(&caller->fsgid, caller->cred + IG_OFF_CRED_FSGID))
		return IG_UNREADABLE;
	reason = ig_judge_place(settings, task, caller->cred);
	return reason ? reason : ig_judge_lists(generation, number, list, caller);
}

#include "tell.h"
#include "marks.h"

#ifdef IG_WIDEN
/* For the tests alone: holds the gap open between reading the generation and using it. */
ig_inline void ig_dawdle(void)
{
	__u32 i;

	for (i = 0; i < IG_WIDEN; i++)
		ig_lookup(IG_MAP(IG_MAP_MEMBERS), &(struct ig_member){ .id = i });
}
#else
ig_inline void ig_dawdle(void)
{
}
#endif

/*
 * The generation in force, 0 for none. Read once in a run, and everything else by this value: a second read could see
 * another generation.
 */
ig_inline __u32 ig_generation(void)
{
	__u32 zero = 0, generation;
	const struct ig_config *config = ig_lookup(IG_MAP(IG_MAP_CONFIG), &zero);

	generation = config ? *(const volatile __u8 *)&config->generation : 0;
	if (generation)
		ig_dawdle();
	return generation;
}

/* What a range's list says, and under strict whether the socket could be marked. */
ig_inline __u32 ig_judge_and_mark(__u32 generation, const struct ig_settings *settings, __u32 list,
				  struct ig_caller *caller, struct bpf_sock_addr *ctx, struct bpf_sock *sk)
{
	__u32 reason = ig_judge(generation, settings, list, caller);

	if (!settings->strict || (reason > IG_DEFAULT_ALLOW && settings->mode != IG_AUDIT))
		return reason;
	/* Packets are sent by the sockets below it, one for each path, which this mark would not be on (net/mptcp/). */
	if (ctx->protocol == IG_IPPROTO_MPTCP)
		return reason > IG_DEFAULT_ALLOW ? reason : IG_UNAPPROVED_SOCKET;
	return ig_mark(sk, settings, caller, generation, list, reason) ? reason : IG_UNREADABLE;
}

/* For an address that may be locked: 1 lets the connect through, 0 makes it EPERM. */
ig_inline int ig_decide(__u32 generation, struct bpf_sock_addr *ctx, struct bpf_sock *sk, __u32 hook)
{
	const struct ig_settings *settings;
	struct ig_request request;
	struct ig_port_range range;
	struct ig_caller caller = {};
	struct ig_told told = { .caller = &caller, .generation = generation, .hook = hook };
	bool valid, audited;

	ig_read_request(&request, ctx, sk, hook);
	ig_resolve_unspecified(&request);
	if (!ig_find_range(generation, &request, &range)) {
		ig_mark_open(generation, sk, request.protocol);
		return 1;
	}
	settings = ig_lookup(IG_MAP(IG_MAP_SETTINGS), &generation);
	valid = settings && settings->valid;
	told.lock = range.lock;
	told.reason = valid ? ig_judge_and_mark(generation, settings, range.list, &caller, ctx, sk) : IG_NO_SETTINGS;
	audited = valid && told.reason > IG_DEFAULT_ALLOW && settings->mode == IG_AUDIT;
	ig_count(told.reason, audited);
	if (told.reason <= IG_DEFAULT_ALLOW) {
		told.verdict = IG_VERDICT_ALLOWED;
		if (ig_likely(!ig_log_allowed()))
			return 1;
	} else {
		told.verdict = audited ? IG_VERDICT_AUDITED : IG_VERDICT_DENIED;
	}
	told.netns_cookie = ig_netns_cookie(ctx);
	/*
	 * Read once more: what was known of the request would be so many states for the verifier to carry through the
	 * loops of the judgement (a million instructions on v5.10, for IPv6).
	 */
	ig_read_request(&request, ctx, sk, hook);
	ig_resolve_unspecified(&request);
	ig_tell(&told, &request);
	return told.verdict != IG_VERDICT_DENIED;
}

#include "egress.h"

/* --- the hooks ---------------------------------------------------------------------------------------------------- */

/*
 * A connected socket that sends with a control message and without an address runs the sendmsg hooks too, with an
 * address of zeros: it was judged when it was connected. A caller can't write such an address, since port 0 is EINVAL
 * (udp_sendmsg() in net/ipv4/udp.c) and the IPv6 one turns AF_UNSPEC into no address.
 */
ig_inline bool ig_has_no_address(struct bpf_sock_addr *ctx)
{
	return ctx->user_family == 0 && ctx->user_port == 0;
}

ig_inline bool ig_may_lead_to_a_lock(__u32 generation, struct bpf_sock_addr *ctx, __u32 hook)
{
	struct ig_address to;

	if (ig_is_for_ipv4(hook)) {
		ig_set_ipv4(&to, ctx->user_ip4);
		return ig_may_be_locked(generation, &to);
	}
	ig_set_ipv6(&to, ctx->user_ip6);
	return ig_may_be_locked(generation, &to);
}

/*
 * connect4, connect6, sendmsg4 and sendmsg6. Compiled once, which is most of the time that a start takes, and loaded once
 * for each hook: the verifier follows none of the branches for other hooks and takes them out
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
	if (!generation || ig_likely(!ig_may_lead_to_a_lock(generation, ctx, hook)))
		return 1;
	sk = ctx->sk;
	return sk ? ig_decide(generation, ctx, sk, hook) : 0; /* the verifier asks; the kernel always gives one */
}

#ifndef IG_WITHOUT_EGRESS
/* Under strict. bcc takes only what stands in this very file for a program. */
int ig_egress(struct __sk_buff *skb)
{
	__u32 generation = ig_generation();
	struct ig_packet packet = {};
	bool ipv4 = skb->protocol == IG_ETH_P_IP;
	__u32 word;

	if (!generation || (!ipv4 && skb->protocol != IG_ETH_P_IPV6))
		return 1;
	if (ipv4) {
		if (ig_load_octets(skb, 16, &word, sizeof(word)))
			return 1; /* shorter than a header: no packet of IP */
		ig_set_ipv4(&packet.request.to, word);
	} else if (ig_load_octets(skb, 24, &packet.request.to, sizeof(packet.request.to))) {
		return 1;
	}
	if (ig_likely(!ig_may_be_locked(generation, &packet.request.to)))
		return 1;
	return ig_judge_locked_packet(skb, generation, &packet, ipv4);
}
#endif

#ifndef BCC_SEC /* bcc adds one of its own; the loader names the licence to the kernel */
char _license[] __attribute__((section("license"), used)) = "Dual BSD/GPL";
#endif
