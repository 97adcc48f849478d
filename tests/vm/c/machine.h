/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A machine in user space that runs the instructions of the hooks: what its parts share. tests/vm/__init__.py says what
 * it is for; tests/vm/structs.py has the structs of the second half in Python.
 */
#ifndef MACHINE_H
#define MACHINE_H

#include <linux/bpf.h>
#include <stdbool.h>
#include <stdint.h>
#include <stddef.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int32_t s32;
typedef int64_t s64;

/* What a program must never do. A run with a trap is a fault of the program, or of the machine. structs.py: Trap. */
enum trap {
	TRAP_OPCODE = 1 << 0, /* unknown to the machine */
	TRAP_HELPER = 1 << 1, /* unknown to the machine */
	TRAP_ARGUMENT = 1 << 2, /* a helper got something that the verifier would refuse */
	TRAP_LOAD = 1 << 3, /* outside every object */
	TRAP_STORE = 1 << 4, /* outside every object, or into one that is read-only */
	TRAP_KERNEL_LOAD = 1 << 5, /* a plain load from kernel memory in a program that must use the helper */
	TRAP_KERNEL_READ = 1 << 6, /* bpf_probe_read_kernel() of something that is no object: -EFAULT */
	TRAP_JUMP = 1 << 7, /* out of the program */
	TRAP_ENDLESS = 1 << 8,
	TRAP_RETURN = 1 << 9, /* a value that the kernel does not take */
	TRAP_REFERENCE = 1 << 10, /* a socket that was found was not released, or another one was */
	TRAP_DEPTH = 1 << 11, /* too many functions inside each other */
};

/* --- memory ------------------------------------------------------------------------------------------------------ */

/* What a program may do with an object. memory.c */
enum right {
	MAY_READ = 0x10,
	MAY_WRITE = 0x20,
	KERNEL = 0x40, /* by bpf_probe_read_kernel(), or by plain loads where the verifier knows the type */
};

struct memory {
	u8 *at;
	u8 *shadow; /* for each 8 bytes: the rights, and how many of the bytes belong to the object */
	u64 used;
	u64 size;
};

/* --- maps -------------------------------------------------------------------------------------------------------- */

#define MAPS 32
#define BUCKETS 4096
#define MAX_KEY 32
#define SOCKETS 8
#define MAP_HANDLE 0x4d41500000000000ull /* what a program has in a register for map n: this + n */

struct element {
	struct element *next; /* of the bucket */
	u8 *value;
	u8 key[MAX_KEY];
};

struct map {
	const struct map_kind *kind;
	u32 key_size, value_size, max_entries;
	u32 count;
	u8 *array;
	struct element **buckets;
	u32 low, high; /* no bucket outside of these has an element */
	u32 lengths[8 * MAX_KEY + 1]; /* LPM trie: elements of each prefix length */
	u8 *storage[SOCKETS]; /* socket storage */
	bool stored[SOCKETS];
	struct element *freed; /* whose memory is used again */
};

/* --- programs ---------------------------------------------------------------------------------------------------- */

#define PROGRAMS 64
#define FRAMES 8 /* MAX_CALL_FRAMES in include/linux/bpf_verifier.h */
#define FRAME_BYTES 512
#define FRAME_STRIDE 1024 /* nothing lies between the frames, so that an access beyond one is seen */

struct program {
	struct bpf_insn *instructions;
	u32 len;
	bool direct; /* plain loads from kernel memory are part of this form */
	u32 *executed, *taken; /* coverage, for each instruction */
};

/* --- the kernel around a program --------------------------------------------------------------------------------- */

#define TASKS 4096
#define TASK_OBJECTS 5

/* Offsets from BTF, in the order of program.OFFSETS. */
struct layout {
	s32 task_cred, task_flags, task_thread_pid;
	s32 cred_fsuid, cred_fsgid, cred_group_info, cred_user_ns;
	s32 group_info_ngroups, group_info_gid;
	s32 user_ns_level, user_ns_owner, pid_level;
};

/* structs.py: TaskC. */
struct task_facts {
	u64 pid_tgid, cgroup_id, netns_cookie;
	u32 fsuid, fsgid, flags, pid_level, user_ns_level, user_ns_owner;
	u32 groups; /* how many gids there are */
	u32 claimed_groups; /* what group_info.ngroups says */
	u8 comm[16];
};

enum task_object { OBJECT_TASK, OBJECT_CRED, OBJECT_GROUP_INFO, OBJECT_USER_NS, OBJECT_PID };

struct task {
	struct task_facts facts;
	u8 *objects[TASK_OBJECTS];
};

#define MARK_BYTES 64
#define EARLIER_BYTES 192

/* structs.py: SocketC. Addresses and ports in network byte order, IPv4 in word[0]. */
struct socket_facts {
	u32 family; /* AF_INET or AF_INET6 */
	u32 state; /* BPF_TCP_* */
	u32 local[4], remote[4];
	u16 local_port, remote_port;
	u32 device;
	u32 full; /* false for TIME_WAIT and request sockets: struct inet_timewait_sock has no storage */
	u32 type; /* SOCK_* */
	u32 protocol; /* IPPROTO_* */
	u32 snd_una; /* the next byte that the peer has not acknowledged */
	u64 bytes_acked;
	u32 marked; /* it has storage, mark[] */
	u32 marked_earlier; /* and earlier[] */
	u32 filter_marked; /* the mark of a filter's listener, filter_mark[] */
	u32 filter_mark[2], pad;
	u8 mark[MARK_BYTES];
	u8 earlier[EARLIER_BYTES]; /* marks of earlier calls */
};

struct socket {
	struct socket_facts facts;
	struct bpf_sock *view; /* what the program sees of it */
	struct bpf_tcp_sock *tcp_view; /* and by bpf_tcp_sock() */
};

#define ATTEMPT_SOCKETS 2

/* structs.py: AttemptC. A connect, sendmsg or getpeername of socket 0. Network byte order; IPv4 in the first word. */
struct attempt {
	u32 family; /* of the address: user_family */
	u32 protocol;
	u32 to[4];
	u32 port; /* user_port */
	u32 message_source[4]; /* msg_src_ip4, msg_src_ip6 */
	u32 is_ipv4; /* the hook is for IPv4 */
	u32 is_message; /* the hook is for sendmsg: a program at connect must not read msg_src_* */
	u32 repeat; /* how often it is run; the outcome is that of the last run, and counts of all */
	u32 others_len;
	struct socket_facts socket;
	struct socket_facts others[ATTEMPT_SOCKETS]; /* of the same network namespace */
};

/* structs.py: PacketC. */
struct packet {
	u32 protocol; /* EtherType, in network byte order */
	u32 ifindex;
	u32 uid; /* bpf_get_socket_uid() */
	s32 socket; /* skb->sk: the number of a socket, or -1 */
	u32 len;
};

/* structs.py: PacketCaseC. A packet and the sockets around it. */
#define CASE_SOCKETS 4
struct packet_case {
	struct packet packet;
	u32 bytes_at; /* in the bytes of all packets */
	u32 sockets_len;
	u32 pad;
	struct socket_facts sockets[CASE_SOCKETS];
};

/* structs.py: ReplayC. A run that is repeated: an attempt or a packet, and what fails in it. */
#define COVERED_WORDS 96
struct replay {
	u32 slot;
	u32 task;
	u32 fail_first, fail_last, fail_load; /* struct controls */
	u32 ring_full;
	u32 is_packet;
	struct attempt attempt;
	struct packet_case packet;
};

/* structs.py: ControlsC. Calls of helpers and plain loads of kernel memory are counted from 1. */
struct controls {
	u32 fail_first, fail_last; /* these calls fail, if they can */
	u32 fail_load; /* this load gives 0, as a load that faults does */
	u32 callback_at; /* before this call the callback runs; 0: before each */
	void (*callback)(u32 call);
	u64 time_ns; /* of the first run; each further one is a nanosecond later */
	u64 step_limit;
	u32 ring_full; /* bpf_ringbuf_output() finds no room */
	u32 keep_results; /* counters and report go on from the run before */
};

/* structs.py: OutcomeC. What a test compares; the same in every form of the program. */
#define EVENT_BYTES 128
#define ROW_BYTES 64
#define COUNTS 64
struct outcome {
	u64 returned;
	u32 traps;
	u32 events;
	u32 rows; /* of the report */
	u32 marked;
	u32 marked_earlier;
	u32 port; /* user_port, where the program has changed the address; else 0 */
	u8 counts[COUNTS]; /* enforced and audited of each counter, at most 255 */
	u8 event[EVENT_BYTES]; /* the last one */
	u8 row_key[12], row[ROW_BYTES]; /* of the report */
	u8 mark[MARK_BYTES], earlier[EARLIER_BYTES]; /* of socket 0 */
	u32 to[4]; /* where it has changed it, user_ip4 or user_ip6 */
	u8 pad_to_words[4];
};

#define TRACE 8192
struct call {
	u16 helper;
	u16 map; /* its number, or NO_MAP */
	u32 instruction;
};
#define NO_MAP 0xffff

/* The state of the run that goes on. */
struct run {
	u32 traps;
	u32 calls, loads;
	u64 steps;
	struct call trace[TRACE];
	u32 depth; /* of the function that runs */
	u64 references[SOCKETS]; /* taken by look-ups and not yet released */
	u32 events, event_len;
	u8 event[EVENT_BYTES];
	const struct task *task;
	const struct packet *packet;
	const u8 *packet_bytes;
	u64 time_ns;
	const struct program *program;
};

/* Which maps of the guard the outcome is read from; the machine itself knows none of them. */
struct roles {
	s32 counters, report, shares, marks, earlier, filter_marks;
};

/* Bytes as they were before a change that may be undone. */
struct undo {
	void *at;
	u32 len;
	u32 saved_at; /* in .saved of the journal */
};

struct journal {
	bool on;
	struct undo *undos;
	u32 len, size;
	u8 *saved;
	u32 saved_len, saved_size;
	u64 map_memory_used;
};

struct machine {
	struct memory map_memory, kernel_memory;
	struct map maps[MAPS];
	struct program programs[PROGRAMS];
	struct layout layout;
	struct task tasks[TASKS];
	struct socket sockets[SOCKETS];
	u32 sockets_len;
	struct bpf_sock_addr *sock_addr;
	struct bpf_sock_addr context; /* as it was before the run */
	struct __sk_buff *skb;
	struct roles roles;
	struct controls controls;
	struct run run;
	u64 junk;
	bool reuse_freed; /* an element that was removed is used again at once */
	struct journal journal;
	u64 total_steps, total_runs;
	u8 frames[FRAMES * FRAME_STRIDE] __attribute__((aligned(16)));
};

/* memory.c */
u64 junk(struct machine *m);
void fill_with_junk(struct machine *m, void *at, u64 len);
void memory_open(struct memory *memory, u64 size);
void *memory_new(struct memory *memory, u64 len, u32 rights);
void memory_close(struct memory *memory);
void memory_cut(struct memory *memory, u64 used);
bool memory_allows(const struct memory *memory, u64 address, u64 len, u32 rights);
bool program_may(const struct machine *m, u64 address, u64 len, u32 rights);
u64 read_little(const void *from, u32 len);

/* maps.c */
struct map *map_of(struct machine *m, u64 handle);
u8 *map_find(struct machine *m, struct map *map, const u8 *key);
int map_update(struct machine *m, struct map *map, const u8 *key, const u8 *value, u64 flags);
int map_remove(struct machine *m, struct map *map, const u8 *key);
void map_clear(struct machine *m, struct map *map);
bool map_is_array(const struct map *map);
bool map_is_storage(const struct map *map);
bool map_is_ring(const struct map *map);

/* journal.c */
void journal_bytes(struct machine *m, void *at, u32 len);

/* kernel.c */
void build_sockets(struct machine *m, const struct attempt *attempt);
void build_attempt(struct machine *m, const struct attempt *attempt);
void read_destination(struct machine *m, const struct attempt *attempt, struct outcome *outcome);
void build_packet(struct machine *m, const struct packet *packet, const u8 *bytes);
s32 socket_number(const struct machine *m, u64 address);
s32 find_socket(const struct machine *m, const struct bpf_sock_tuple *tuple, u32 tuple_len);

/* helpers.c */
u64 call_helper(struct machine *m, u32 number, const u64 *registers, u32 instruction);

/* interpreter.c */
u64 execute(struct machine *m, u32 start, u64 r1, u64 r2);
void trap(struct machine *m, enum trap which);

#endif
