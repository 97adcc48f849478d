/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The ABI between the hooks and user space: what lies in the maps, and which map is which.
 *
 * src/imds_guard/backends/ebpf/abi.py says the same in Python; tests/unit/test_abi.py compares the two through BTF.
 * A change here that alters a size, an offset or a meaning raises IG_ABI.
 *
 * Every record belongs to a generation (1 or 2). config.generation names the one in force; 0 means nothing is locked.
 */
#ifndef IMDS_GUARD_H
#define IMDS_GUARD_H

#define IG_ABI 2

/* Stands where a map's file descriptor goes; the loader puts the real one there (IG_MAP_BASE + the number below). */
#define IG_MAP_BASE 0x494d4400
#define IG_HOOK_PLACEHOLDER 0x494d44ff /* the same for the number of the hook that the program is for (enum ig_hook) */
#define IG_CALLBACK_ig_walk_four 0x494d4500 /* the same for where this function begins */
#define IG_CALLBACK_ig_search_one 0x494d4501
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
	IG_MAPS
};

#define IG_GENERATIONS 3 /* 0, 1 and 2: array maps have a record for each */

/* ARRAY, one record. The flip is a change of the one octet .generation. */
struct ig_config {
	__u8 generation;
	__u8 pad[7];
};

enum ig_mode { IG_ENFORCE = 1, IG_AUDIT = 2 };

/* ARRAY by generation. One that is not .valid denies every connect to a locked endpoint. */
struct ig_settings {
	__u32 valid;
	__u32 mode; /* enum ig_mode */
	__u32 allow_containers;
	__u32 abi; /* IG_ABI of who wrote the generation */
	__u8 digest[16]; /* of all records of the generation; the hooks don't look at it */
	__u32 strict; /* approved sockets are marked, packets of others are dropped */
	__u32 pad;
	__u64 serial; /* never 0; another with every change of policy, for as long as the maps live */
};

/*
 * ARRAY by generation: may this address be locked? No false "no".
 * hosts: one bit for each locked single address, at ig_host_bit(). networks4, networks6: one bit for each value of the
 * address's first 16 bits that a locked prefix covers.
 */
#define IG_HOST_BITS_LOG2 18
#define IG_HOST_WORDS (1 << (IG_HOST_BITS_LOG2 - 5))
#define IG_NETWORK_WORDS (65536 / 32)
struct ig_address_bitmap {
	__u32 hosts[IG_HOST_WORDS];
	__u32 networks4[IG_NETWORK_WORDS];
	__u32 networks6[IG_NETWORK_WORDS];
};

/* Any IPv4 address is ::ffff:a.b.c.d, in network byte order. */
struct ig_address {
	__u32 word[4];
};

/* LPM_TRIE. .generation and .pad are part of the prefix: prefixlen is 32 + the bits of the address. */
struct ig_endpoint_key {
	__u32 prefixlen;
	__u8 generation;
	__u8 pad[3];
	struct ig_address address;
};

enum ig_protocol { IG_TCP = 1, IG_UDP = 2 };

#define IG_INHERITED 1 /* the range comes from a shorter prefix, not from this endpoint */
#define IG_NO_LIST 0xffff /* the destination is unspecified and the range locked somewhere: deny */

struct ig_port_range {
	__u16 low; /* inclusive, host byte order */
	__u16 high;
	__u16 lock;
	__u16 list;
	__u8 protocols; /* bits of enum ig_protocol */
	__u8 flags;
	__u16 pad;
};

/* Ranges of one protocol are disjoint: the ranges of shorter prefixes were cut to fit when they were written. */
#define IG_RANGES 24
struct ig_endpoint {
	__u32 ranges_len;
	__u32 pad;
	struct ig_port_range ranges[IG_RANGES];
};

/* ARRAY: record (generation - 1) * IG_LISTS + list. Who may pass; locks with the same lists share one. */
#define IG_LISTS 4096
#define IG_LIST_VALID 1
#define IG_LIST_DEFAULT_ALLOW 2
#define IG_LIST_GROUPS 4 /* some group is listed */
#define IG_LIST_DENY_GROUPS 8 /* some group is denied: members of the allow list are not let through early */
#define IG_LIST_SMALL 16 /* at most IG_SEARCHED groups: they stand in the map of groups, too */
#define IG_LIST_USERS 32 /* some user is listed */
#define IG_GID_BITMAP_WORDS 16
struct ig_list {
	__u32 flags;
	__u32 zero; /* always 0 */
	__u32 gid_bitmap[IG_GID_BITMAP_WORDS]; /* bit gid % 512 is set for each listed group */
};

enum ig_kind { IG_USER = 1, IG_GROUP = 2 };
#define IG_ALLOW 1
#define IG_DENY 2

/* HASH: the value is IG_ALLOW, IG_DENY or both. */
struct ig_member {
	__u8 generation;
	__u8 kind; /* enum ig_kind: gid 0 is not uid 0 */
	__u16 list;
	__u32 id;
};
#define IG_MEMBERS 262144 /* both generations together */

/* HASH: the groups of a list once more, in order, for callers with more than IG_WALKED groups. */
struct ig_list_key {
	__u8 generation;
	__u8 pad;
	__u16 list;
};
#ifndef IG_SEARCHED /* tests make it small where a program must load fast */
#define IG_SEARCHED 128
#endif
struct ig_groups {
	__u32 denied; /* gid[0 .. denied) are denied, gid[denied .. len) allowed */
	__u32 len;
	__u32 gid[IG_SEARCHED];
};

/* HASH: for people and for reading the policy back. The hooks don't look at it. */
#define IG_LOCKS 32768 /* both generations together */
#define IG_LOCK_NAME 64
struct ig_lock_key {
	__u8 generation;
	__u8 pad;
	__u16 lock;
};
struct ig_lock {
	__u16 list;
	__u16 pad;
	char name[IG_LOCK_NAME]; /* UTF-8, padded with NUL */
};

#define IG_ENDPOINTS 65536 /* both generations together, entries made by rendering included */

/* policy.py: Reason */
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
	IG_UNAPPROVED_SOCKET, /* a packet under strict: no hook approved the socket, or the right is gone since */
	IG_REASONS
};

/*
 * PERCPU_ARRAY by reason: connects to locked endpoints. The others are not counted, it would cost them time. Behind the
 * reasons two that count in .enforced alone.
 */
enum ig_counted { IG_LOST_EVENTS = IG_REASONS, IG_REPORT_OVERFLOW, IG_COUNTERS };
struct ig_counter {
	__u64 enforced;
	__u64 audited; /* of these, the ones that audit mode let through */
};

/* --- for people ---------------------------------------------------------------------------------------------------- */

enum ig_hook { IG_CONNECT4 = 1, IG_CONNECT6, IG_SENDMSG4, IG_SENDMSG6, IG_EGRESS };
enum ig_verdict { IG_VERDICT_DENIED = 1, IG_VERDICT_AUDITED, IG_VERDICT_ALLOWED };
#define IG_COMM 16 /* TASK_COMM_LEN, include/linux/sched.h */
#define IG_NO_LOCK 0xffff

/*
 * RINGBUF: a record for each denied connect (audit mode's too), and for allowed ones when ig_watch says so. What does
 * not fit is counted as IG_LOST_EVENTS. IDs are those of the initial namespaces. Of a packet (IG_EGRESS) nobody knows
 * the task: all of them but fsuid, the socket's owner, are zero, and so is netns_cookie.
 */
#define IG_EVENTS_BYTES (1 << 19)
struct ig_event {
	__u64 time_ns; /* CLOCK_BOOTTIME */
	__u64 cgroup_id; /* of the task: the inode of its cgroup2 directory */
	__u64 netns_cookie;
	__u32 pid; /* the thread */
	__u32 tgid;
	__u32 fsuid;
	__u32 fsgid;
	__u32 groups_len; /* supplementary groups */
	__u16 port; /* host byte order */
	__u16 lock; /* key of IG_MAP_LOCKS together with .generation, or IG_NO_LOCK */
	struct ig_address address; /* as it was judged: 0.0.0.0 resolved */
	char comm[IG_COMM]; /* NUL-padded; the caller chooses it */
	__u8 generation;
	__u8 hook; /* enum ig_hook */
	__u8 reason;
	__u8 verdict; /* enum ig_verdict */
	__u8 protocol; /* enum ig_protocol */
	__u8 pad[3];
};

/* HASH: who was denied, or would have been in audit mode, since the generation came into force. */
#define IG_REPORT_ROWS 16384
struct ig_report_key {
	__u8 generation;
	__u8 reason;
	__u16 lock;
	__u32 fsuid;
};
struct ig_report {
	__u64 count;
	__u64 first_ns; /* CLOCK_BOOTTIME */
	__u64 last_ns;
	struct ig_address address; /* this and what follows: of the first one */
	__u16 port;
	__u8 protocol;
	__u8 pad[5];
	char comm[IG_COMM];
};

/* ARRAY, one record: outside the generations, since it is not policy. */
struct ig_watch {
	__u32 log_allowed;
};

/* SK_STORAGE, under strict: what let the socket's last connect or sendmsg through. */
enum ig_mark_kind { IG_MARK_USER = IG_USER, IG_MARK_GROUP = IG_GROUP, IG_MARK_DEFAULT, IG_MARK_AUDIT, IG_MARK_OPEN };
struct ig_mark {
	__u64 serial; /* ig_settings.serial of that moment */
	__u32 fsuid;
	__u32 gid; /* the group that was allowed, for IG_MARK_GROUP */
	__u16 list; /* that allowed it, in the generation of that moment */
	__u8 kind; /* enum ig_mark_kind; 0: nothing did */
	__u8 container_unchecked; /* containers were allowed then: nobody looked whether it is in one */
	__u8 pad[4];
};

#ifndef IG_WALKED /* as IG_SEARCHED */
#define IG_WALKED 1024 /* supplementary groups of a caller that are compared one by one */
#endif
#define IG_MAX_GROUPS 65536 /* NGROUPS_MAX, include/uapi/linux/limits.h */

#endif
