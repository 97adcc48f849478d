/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The ABI between the hooks and user space: the maps and their records.
 *
 * src/imds_guard/backends/ebpf/abi.py is the same in Python; tests/unit/test_abi.py compares the two through BTF. A
 * change of a size, an offset or a meaning raises IG_ABI.
 *
 * Every record belongs to a generation (1 or 2). config.generation is the one in force; 0 means that nothing is
 * locked.
 */
#ifndef IMDS_GUARD_H
#define IMDS_GUARD_H

#include <linux/types.h>

#define IG_ABI 3

/* Placeholders in the instructions, which the loader replaces: kernel/compiler.py. */
#define IG_MAP_BASE 0x494d4400 /* + enum ig_map: the map's file descriptor */
#define IG_HOOK_PLACEHOLDER 0x494d44ff /* the hook that the program is loaded for (enum ig_hook) */
#define IG_CALLBACK_ig_walk_four 0x494d4500 /* where this function begins */
#define IG_CALLBACK_ig_search_one 0x494d4501

/* User space pins each map under its name here, in lower case; IG_MAP_ADDRESS_BITMAP as "first_look". */
enum ig_map {
	IG_MAP_CONFIG,
	IG_MAP_SETTINGS,
	IG_MAP_ADDRESS_BITMAP,
	IG_MAP_ENDPOINTS,
	IG_MAP_LISTS,
	IG_MAP_MEMBERS,
	IG_MAP_GROUPS,
	IG_MAP_LOCKS,
	IG_MAP_COUNTERS,
	IG_MAP_EVENTS,
	IG_MAP_REPORT,
	IG_MAP_WATCH,
	IG_MAP_MARKS,
	IG_MAP_EARLIER,
	IG_MAP_SHARES,
	IG_MAP_FILTERS,
	IG_MAP_TARGETS,
	IG_MAP_FILTER_TEXTS,
	IG_MAP_FILTER_MARKS,
	IG_MAPS
};

/* --- the policy ------------------------------------------------------------------------------------------------- */

#define IG_GENERATIONS 3 /* 0, 1 and 2: array maps have a record for each */

/* ARRAY, one record. A change of policy ends with a change of this one byte. */
struct ig_config {
	__u8 generation;
	__u8 pad[7];
};
_Static_assert(sizeof(struct ig_config) == 8, "ABI");

enum ig_mode { IG_ENFORCE = 1, IG_AUDIT = 2 };

/*
 * ARRAY by generation. When it is not .valid, every connect to a locked endpoint is denied. .valid, .abi and .serial
 * keep their offsets in every layout: an upgrade reads them from the old maps. Record 0 is for user space alone.
 */
struct ig_settings {
	__u32 valid;
	__u32 mode; /* enum ig_mode */
	__u32 allow_containers;
	__u32 abi; /* IG_ABI of the version that wrote the generation */
	__u8 digest[16]; /* of all records of the generation; the hooks don't read it */
	__u32 strict; /* approved sockets are marked, packets of others are dropped */
	__u32 zero; /* always 0 */
	__u64 serial; /* never 0; each change of policy has another one, for the lifetime of the marks */
};
_Static_assert(sizeof(struct ig_settings) == 48, "ABI");

/*
 * ARRAY by generation: may this address be locked? No false "no". hosts: one bit for each locked single address, at
 * ig_host_bit(). networks4, networks6: one bit for each value of the address's first 16 bits that a locked prefix
 * covers.
 */
#define IG_HOST_BITS_LOG2 18
#define IG_HOST_WORDS (1 << (IG_HOST_BITS_LOG2 - 5))
#define IG_NETWORK_WORDS (65536 / 32)
struct ig_address_bitmap {
	__u32 hosts[IG_HOST_WORDS];
	__u32 networks4[IG_NETWORK_WORDS];
	__u32 networks6[IG_NETWORK_WORDS];
};
_Static_assert(sizeof(struct ig_address_bitmap) == 49152, "ABI");

/* An IPv4 address is ::ffff:a.b.c.d. Network byte order. */
struct ig_address {
	__u32 word[4];
};
_Static_assert(sizeof(struct ig_address) == 16, "ABI");

/* LPM_TRIE. .generation and .pad are part of the prefix: prefixlen is 32 + the bits of the address. */
struct ig_endpoint_key {
	__u32 prefixlen;
	__u8 generation;
	__u8 pad[3];
	struct ig_address address;
};
_Static_assert(sizeof(struct ig_endpoint_key) == 24, "ABI");

enum ig_protocol { IG_TCP = 1, IG_UDP = 2 };

#define IG_INHERITED 1 /* the range comes from a shorter prefix, not from this endpoint */
/* In place of a list: deny everyone. */
#define IG_NO_LIST 0xffff /* the destination is unspecified and the range is locked somewhere */
#define IG_FILTER_LIST 0xfffe /* the destination is the address of a filter: only the redirect leads there */

struct ig_port_range {
	__u16 low; /* inclusive, host byte order */
	__u16 high;
	__u16 lock; /* IG_NO_LOCK where .list stands for no list */
	__u16 list;
	__u8 protocols; /* bits of enum ig_protocol */
	__u8 flags;
	__u16 target; /* of filters, 0: none; then the range is one TCP port */
};
_Static_assert(sizeof(struct ig_port_range) == 12, "ABI");

/* Ranges of one protocol are disjoint: user space has cut the ranges of shorter prefixes to fit. */
#define IG_RANGES 24
struct ig_endpoint {
	__u32 ranges_len;
	__u32 pad;
	struct ig_port_range ranges[IG_RANGES];
};
_Static_assert(sizeof(struct ig_endpoint) == 296, "ABI");

#define IG_ENDPOINTS 65536 /* both generations together, including entries that user space adds */

/* ARRAY: record (generation - 1) * IG_LISTS + list. Who may pass; locks with equal lists share one. */
#define IG_LISTS 4096
#define IG_LIST_VALID 1
#define IG_LIST_DEFAULT_ALLOW 2
#define IG_LIST_GROUPS 4 /* some group is listed */
#define IG_LIST_DENY_GROUPS 8 /* some group is denied: members of the allowlist are not let through early */
#define IG_LIST_SMALL 16 /* at most IG_MAX_SEARCHED_GROUPS groups: they are in IG_MAP_GROUPS, too */
#define IG_LIST_USERS 32 /* some user is listed, also by a filter */
#define IG_LIST_FILTER_GROUPS 64 /* a filter lists groups; IG_LIST_GROUPS is set, too */
#define IG_GID_BITMAP_WORDS 16
struct ig_list {
	__u32 flags;
	__u32 zero; /* always 0 */
	__u32 gid_bitmap[IG_GID_BITMAP_WORDS]; /* bit gid % 512 is set for each listed group */
	__u32 everyone; /* the bits of the filters that name everyone: IG_FILTER_BIT */
	__u32 pad;
};
_Static_assert(sizeof(struct ig_list) == 80, "ABI");

enum ig_kind { IG_USER = 1, IG_GROUP = 2 };
#define IG_ALLOW 1
#define IG_DENY 2

#define IG_FILTER_ACCOUNT 128 /* the user that the filters run as: allowed at targets, see struct ig_port_range */

/*
 * HASH: the value has IG_ALLOW, IG_DENY, IG_FILTER_ACCOUNT, and a bit for each filter of the lock that names the member.
 * The lowest bit is the first filter in the policy, and that one counts.
 */
#define IG_FILTERS 24
#define IG_FILTER_BIT(n) (1u << (8 + (n))) /* n: from 0, in the order of the policy */
#define IG_FILTER_BITS 0xffffff00u
struct ig_member {
	__u8 generation;
	__u8 kind; /* enum ig_kind: gid 0 is not uid 0 */
	__u16 list;
	__u32 id;
};
_Static_assert(sizeof(struct ig_member) == 8, "ABI");
#define IG_MEMBERS 262144 /* both generations together */

/*
 * Supplementary groups of a caller that are compared one by one. Tests make it small, so that a program loads fast.
 */
#ifndef IG_MAX_WALKED_GROUPS
#define IG_MAX_WALKED_GROUPS 1024
#endif
#define IG_MAX_GROUPS 65536 /* NGROUPS_MAX, include/uapi/linux/limits.h */

/* HASH: the groups of a list once more, as an array, for callers with more than IG_MAX_WALKED_GROUPS groups. */
struct ig_list_key {
	__u8 generation;
	__u8 pad;
	__u16 list;
};
_Static_assert(sizeof(struct ig_list_key) == 4, "ABI");
#ifndef IG_MAX_SEARCHED_GROUPS /* tests make it small, too */
#define IG_MAX_SEARCHED_GROUPS 128
#endif
struct ig_groups {
	__u32 denied; /* gid[0 .. denied) are denied, gid[denied .. len) allowed */
	__u32 len;
	__u32 gid[IG_MAX_SEARCHED_GROUPS];
};
_Static_assert(sizeof(struct ig_groups) == 8 + 4 * IG_MAX_SEARCHED_GROUPS, "ABI");

/* HASH: the name of a lock, for messages and for reading the policy back. The hooks don't read it. */
#define IG_LOCKS 32768 /* both generations together */
#define IG_LOCK_NAME 64
struct ig_lock_key {
	__u8 generation;
	__u8 pad;
	__u16 lock;
};
_Static_assert(sizeof(struct ig_lock_key) == 4, "ABI");
struct ig_lock {
	__u16 list;
	__u16 pad;
	char name[IG_LOCK_NAME]; /* UTF-8, padded with NUL */
};
_Static_assert(sizeof(struct ig_lock) == 68, "ABI");

/* --- filters ---------------------------------------------------------------------------------------------------- */

/*
 * The listener of a filter is at 127.169.T.F:169. T is the target: one locked address with one port. F is the number of
 * the filter. Both are handed out by user space, and mean what IG_MAP_TARGETS and IG_MAP_FILTERS say of a generation.
 */
#define IG_FILTER_NETWORK 0x7fa90000u
#define IG_FILTER_PREFIX_MASK 0xffff0000u
#define IG_FILTER_PORT 169
#define IG_TARGETS 254
#define IG_NUMBERS 254 /* of filters: more than IG_FILTERS, so that a filter with new rules gets a new number */

/* HASH: where a caller goes that the filter names, and what must listen there. */
struct ig_filter_key {
	__u8 generation;
	__u8 target; /* T */
	__u8 pad[2];
	__u32 bit; /* IG_FILTER_BIT */
};
_Static_assert(sizeof(struct ig_filter_key) == 8, "ABI");
struct ig_filter {
	__u64 digest; /* of the target and the rules: the mark of the listener must be the same */
	__u8 number; /* F */
	__u8 pad[7];
};
_Static_assert(sizeof(struct ig_filter) == 16, "ABI");

/* HASH: what T stands for. getpeername(2) shows it. */
struct ig_target_key {
	__u8 generation;
	__u8 pad;
	__u16 target;
};
_Static_assert(sizeof(struct ig_target_key) == 4, "ABI");
struct ig_target {
	struct ig_address address;
	__u16 port; /* host byte order */
	__u8 pad[6];
};
_Static_assert(sizeof(struct ig_target) == 24, "ABI");

/* HASH: name, locks and rules of a filter as text, in pieces, for reading the policy back. The hooks don't read it. */
#define IG_FILTER_PIECES 4096 /* of all filters, both generations together */
#define IG_FILTER_PIECE 1024
struct ig_filter_text_key {
	__u8 generation;
	__u8 filter; /* n of IG_FILTER_BIT */
	__u16 piece;
};
_Static_assert(sizeof(struct ig_filter_text_key) == 4, "ABI");

/*
 * SK_STORAGE of a listening socket: the digest of the target and the rules that its process serves. Root sets it. The
 * record outlives upgrades, so its size and its meaning stay.
 */
struct ig_filter_mark {
	__u64 digest;
};
_Static_assert(sizeof(struct ig_filter_mark) == 8, "ABI");

/* --- decisions -------------------------------------------------------------------------------------------------- */

/* policy/decide.py: Reason. ig_permits() says which ones let the caller through. */
enum ig_reason {
	IG_NOT_LOCKED,
	IG_ALLOWED_USER,
	IG_ALLOWED_GROUP,
	IG_DEFAULT_ALLOW,
	IG_DENIED_USER,
	IG_DENIED_GROUP,
	IG_NOT_LISTED,
	IG_CONTAINER,
	IG_USER_NAMESPACE,
	IG_KERNEL_THREAD,
	IG_TOO_MANY_GROUPS,
	IG_UNSPECIFIED_DESTINATION,
	IG_UNREADABLE,
	IG_NO_SETTINGS,
	IG_UNAPPROVED_SOCKET, /* strict mode: no hook approved the packet's socket, or its right has ended since */
	IG_FILTERED, /* the caller reaches its filter in place of the endpoint */
	IG_NOT_SERVED, /* a filter names the caller, and can't serve this port or this socket */
	IG_NO_FILTER, /* the listener of the caller's filter is not there */
	IG_FILTER_ADDRESS, /* the destination is the address of a filter */
	IG_REASONS
};

/*
 * SK_STORAGE, strict mode: the reason that let the socket's last connect or sendmsg through. The record outlives
 * upgrades, so its size and its meaning stay.
 */
enum ig_mark_kind {
	IG_MARK_USER = IG_USER,
	IG_MARK_GROUP = IG_GROUP,
	IG_MARK_DEFAULT,
	IG_MARK_AUDIT,
	IG_MARK_OPEN,
	IG_MARK_ACCEPTED, /* by egress: others made the connection */
	IG_MARK_FILTER, /* it may send to one address of a filter, and to no endpoint */
};
struct ig_mark {
	__u64 serial; /* ig_settings.serial of that moment */
	__u32 fsuid;
	/*
	 * The allowed group, for IG_MARK_GROUP; where the numbers began, for IG_MARK_ACCEPTED; T << 8 | F, for
	 * IG_MARK_FILTER.
	 */
	__u32 gid;
	__u16 list; /* that allowed it, in the generation of that moment */
	__u8 kind; /* enum ig_mark_kind; 0: not approved */
	__u8 container_unchecked; /* containers were allowed then, so whether it is in one was not checked */
	__u8 pad[4];
};
_Static_assert(sizeof(struct ig_mark) == 24, "ABI");

/*
 * SK_STORAGE, strict mode, for sockets that were approved by more than one list: the marks of earlier calls, each at its
 * list modulo IG_EARLIER_MARKS. A UDP socket can be connected to one lock and send to another one.
 */
#define IG_EARLIER_MARKS 8
struct ig_earlier {
	struct ig_mark marks[IG_EARLIER_MARKS];
};
_Static_assert(sizeof(struct ig_earlier) == 192, "ABI");

/* --- counters, events and the report ---------------------------------------------------------------------------- */

/*
 * PERCPU_ARRAY by reason: connects to locked endpoints. Others are not counted, because that would make them slower.
 * Two more counters follow the reasons; these use .enforced alone.
 */
enum ig_counter_index { IG_LOST_EVENTS = IG_REASONS, IG_REPORT_OVERFLOW, IG_COUNTERS };
struct ig_counter {
	__u64 enforced;
	__u64 audited; /* denials that audit mode let through */
};
_Static_assert(sizeof(struct ig_counter) == 16, "ABI");

enum ig_hook {
	IG_CONNECT4 = 1,
	IG_CONNECT6,
	IG_SENDMSG4,
	IG_SENDMSG6,
	IG_EGRESS,
	IG_GETPEERNAME4,
	IG_GETPEERNAME6,
};
enum ig_verdict { IG_VERDICT_DENIED = 1, IG_VERDICT_AUDITED, IG_VERDICT_ALLOWED };
#define IG_COMM 16 /* TASK_COMM_LEN, include/linux/sched.h */
#define IG_NO_LOCK 0xffff

/*
 * RINGBUF: a record for each denied connect (in audit mode, too), and for allowed ones when ig_watch asks for them.
 * Records that do not fit are counted as IG_LOST_EVENTS. IDs are those of the initial namespaces. The task that sent
 * a packet (IG_EGRESS) is unknown: then all fields about it are 0, except fsuid, which is the socket's owner.
 */
#define IG_EVENTS_BYTES (1 << 19)
struct ig_event {
	__u64 time_ns; /* CLOCK_BOOTTIME */
	__u64 cgroup_id; /* of the task: the inode of its cgroup2 directory */
	__u64 netns_cookie; /* 0 for IG_EGRESS */
	__u32 pid; /* the thread */
	__u32 tgid;
	__u32 fsuid;
	__u32 fsgid;
	__u32 groups_len; /* supplementary groups */
	__u16 port; /* host byte order */
	__u16 lock; /* key of IG_MAP_LOCKS together with .generation, or IG_NO_LOCK */
	struct ig_address address; /* as it was judged: 0.0.0.0 is resolved */
	char comm[IG_COMM]; /* NUL-padded; the caller chooses it */
	__u8 generation;
	__u8 hook; /* enum ig_hook */
	__u8 reason;
	__u8 verdict; /* enum ig_verdict */
	__u8 protocol; /* enum ig_protocol */
	__u8 pad[3];
};
_Static_assert(sizeof(struct ig_event) == 88, "ABI");

/*
 * HASH: who was denied, or would have been in audit mode, since the generation came into force. A process in a user
 * namespace can take any ID that is mapped there (65,536 by default), so its denials are counted for the owner of that
 * namespace.
 */
enum ig_who {
	IG_WHO_USER = 1, /* .id is the fsuid */
	IG_WHO_NAMESPACES, /* callers in user namespaces that .id owns */
	IG_WHO_OTHERS, /* what is beyond the share that .id begins: see struct ig_share_key */
};
#define IG_REPORT_ROWS 16384
struct ig_report_key {
	__u8 generation;
	__u8 reason;
	__u16 lock; /* IG_NO_LOCK for IG_WHO_OTHERS */
	__u8 who; /* enum ig_who */
	__u8 pad[3];
	__u32 id;
};
_Static_assert(sizeof(struct ig_report_key) == 12, "ABI");
struct ig_report {
	__u64 count;
	__u64 first_ns; /* CLOCK_BOOTTIME */
	__u64 last_ns;
	struct ig_address address; /* this and the following fields are those of the first denial */
	__u16 port;
	__u8 protocol;
	__u8 pad[5];
	char comm[IG_COMM];
};
_Static_assert(sizeof(struct ig_report) == 64, "ABI");

/*
 * HASH: the rows of the report that a share has. Each of the first IG_SHARE_IDS IDs has a share of its own: they are
 * accounts. Above them each block of IG_SHARE_IDS IDs shares one: by default a user's sub-IDs are that many
 * (subuid(5)), and any process of that user can take them, by set-user-ID programs even outside of user namespaces.
 * What is beyond a share is counted in one row for each reason. So no user can fill the report.
 */
#define IG_SHARE_IDS 65536
#define IG_ROWS_OF_ACCOUNT 256
#define IG_ROWS_OF_BLOCK 512
struct ig_share_key {
	__u8 generation;
	__u8 pad[3];
	__u32 first; /* ID */
};
_Static_assert(sizeof(struct ig_share_key) == 8, "ABI");
struct ig_share {
	__u32 rows;
};
_Static_assert(sizeof(struct ig_share) == 4, "ABI");

/* ARRAY, one record. It is not part of the policy, so it belongs to no generation. */
struct ig_watch {
	__u32 log_allowed;
};
_Static_assert(sizeof(struct ig_watch) == 4, "ABI");

#endif
