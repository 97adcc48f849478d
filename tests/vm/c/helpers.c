// SPDX-License-Identifier: Apache-2.0
/*
 * The helper functions that the hooks call. A helper is one function and one row of HELPERS at the end. A call that
 * is told to fail does what the kernel's helper does when it fails.
 */
#include "machine.h"
#include "interface.h"
#include <errno.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>

struct request {
	const u64 *r; /* r1 to r5 at [1] to [5] */
	bool fails;
};

typedef u64 helper(struct machine *m, const struct request *call);

#define FUNCTION_HANDLE 0x46554e0000000000ull /* interpreter.c */
#define CURRENT_NETNS ((u64)-1) /* BPF_F_CURRENT_NETNS */
#define MAX_LOOPS (1u << 23) /* BPF_MAX_LOOPS in include/linux/bpf.h */

static u64 error(int number)
{
	return (u64)(s64)-number;
}

/* Checks an argument as the verifier does; false: a trap. */
static bool demand(struct machine *m, bool holds)
{
	if (!holds)
		trap(m, TRAP_ARGUMENT);
	return holds;
}

static bool is_input(const struct machine *m, u64 address, u64 len)
{
	return program_may(m, address, len, MAY_READ);
}

static bool is_output(const struct machine *m, u64 address, u64 len)
{
	return program_may(m, address, len, MAY_WRITE);
}

/* --- maps ------------------------------------------------------------------------------------------------------------ */

static u64 map_lookup_elem(struct machine *m, const struct request *call)
{
	struct map *map = map_of(m, call->r[1]);

	if (!demand(m, map && !map_is_ring(map) && !map_is_storage(map) && is_input(m, call->r[2], map->key_size)))
		return 0;
	return call->fails ? 0 : (u64)map_find(m, map, (const u8 *)call->r[2]);
}

static u64 map_update_elem(struct machine *m, const struct request *call)
{
	struct map *map = map_of(m, call->r[1]);

	if (!demand(m, map && is_input(m, call->r[2], map->key_size) && is_input(m, call->r[3], map->value_size)))
		return 0;
	if (call->fails)
		return error(E2BIG);
	return (u64)(s64)map_update(m, map, (const u8 *)call->r[2], (const u8 *)call->r[3], call->r[4]);
}

static u64 sk_storage_get(struct machine *m, const struct request *call)
{
	struct map *map = map_of(m, call->r[1]);
	s32 socket = socket_number(m, call->r[2]);

	if (!demand(m, map && map_is_storage(map) && socket >= 0 && !call->r[3] && call->r[4] <= 1))
		return 0;
	/* The kernel gives nothing for sockets that are not full: bpf_sk_storage_get() in net/core/bpf_sk_storage.c. */
	if (call->fails || !m->sockets[socket].facts.full)
		return 0;
	if (!map->stored[socket]) {
		if (!call->r[4])
			return 0;
		memset(map->storage[socket], 0, map->value_size);
		map->stored[socket] = true;
	}
	return (u64)map->storage[socket];
}

static u64 ringbuf_output(struct machine *m, const struct request *call)
{
	struct map *map = map_of(m, call->r[1]);

	if (!demand(m, map && map_is_ring(map) && call->r[3] <= EVENT_BYTES && is_input(m, call->r[2], call->r[3])))
		return 0;
	if (call->fails || m->controls.ring_full)
		return error(EAGAIN);
	m->run.events++;
	m->run.event_len = (u32)call->r[3];
	memcpy(m->run.event, (const void *)call->r[2], call->r[3]);
	return 0;
}

/* --- the current task, and the kernel's memory ------------------------------------------------------------------------- */

static u64 get_current_pid_tgid(struct machine *m, const struct request *call)
{
	(void)call;
	return m->run.task->facts.pid_tgid;
}

static u64 get_current_comm(struct machine *m, const struct request *call)
{
	u32 len = sizeof(m->run.task->facts.comm);

	if (!demand(m, call->r[2] == len && is_output(m, call->r[1], len)))
		return 0;
	if (call->fails) {
		memset((void *)call->r[1], 0, len);
		return error(EINVAL);
	}
	memcpy((void *)call->r[1], m->run.task->facts.comm, len);
	return 0;
}

static u64 get_current_task(struct machine *m, const struct request *call)
{
	(void)call;
	return (u64)m->run.task->objects[OBJECT_TASK];
}

static u64 get_current_cgroup_id(struct machine *m, const struct request *call)
{
	(void)call;
	return m->run.task->facts.cgroup_id;
}

static u64 get_netns_cookie(struct machine *m, const struct request *call)
{
	demand(m, call->r[1] == (u64)m->sock_addr);
	return m->run.task->facts.netns_cookie;
}

static u64 ktime_get_boot_ns(struct machine *m, const struct request *call)
{
	(void)call;
	return m->run.time_ns;
}

static u64 probe_read_kernel(struct machine *m, const struct request *call)
{
	u64 to = call->r[1], len = call->r[2], from = call->r[3];
	bool readable = memory_allows(&m->kernel_memory, from, len, KERNEL);

	if (!demand(m, is_output(m, to, len)))
		return 0;
	if (!readable && !call->fails)
		trap(m, TRAP_KERNEL_READ);
	if (!readable || call->fails) {
		memset((void *)to, 0, len);
		return error(EFAULT);
	}
	memcpy((void *)to, (const void *)from, len);
	return 0;
}

/* --- packets and sockets ----------------------------------------------------------------------------------------------- */

static u64 skb_load_bytes(struct machine *m, const struct request *call)
{
	const struct packet *packet = m->run.packet;
	u64 offset = (u32)call->r[2], to = call->r[3], len = (u32)call->r[4];

	if (!demand(m, packet && call->r[1] == (u64)m->skb && is_output(m, to, len)))
		return 0;
	if (call->fails || offset > 0xffff || offset + len > packet->len) {
		memset((void *)to, 0, len);
		return error(EFAULT);
	}
	memcpy((void *)to, m->run.packet_bytes + offset, len);
	return 0;
}

static u64 get_socket_uid(struct machine *m, const struct request *call)
{
	return demand(m, m->run.packet && call->r[1] == (u64)m->skb) ? m->run.packet->uid : 0;
}

static u64 sk_fullsock(struct machine *m, const struct request *call)
{
	s32 socket = socket_number(m, call->r[1]);

	if (!demand(m, socket >= 0))
		return 0;
	return call->fails || !m->sockets[socket].facts.full ? 0 : call->r[1];
}

/*
 * The kernel takes every whole socket with the protocol TCP for a TCP socket, raw ones too, and reads beyond their end:
 * bpf_tcp_sock() in net/core/filter.c.
 */
static u64 tcp_sock(struct machine *m, const struct request *call)
{
	s32 socket = socket_number(m, call->r[1]);
	const struct socket_facts *facts;

	if (!demand(m, socket >= 0))
		return 0;
	facts = &m->sockets[socket].facts;
	if (!demand(m, facts->type == SOCK_STREAM || facts->protocol != IPPROTO_TCP))
		return 0;
	return call->fails || !facts->full || facts->protocol != IPPROTO_TCP ? 0 : (u64)m->sockets[socket].tcp_view;
}

static u64 look_up_socket(struct machine *m, const struct request *call, bool full)
{
	u64 len = call->r[3];
	s32 found;

	if (!demand(m, (len == 12 || len == 36) && is_input(m, call->r[2], len) && call->r[4] == CURRENT_NETNS &&
			       !call->r[5] && (call->r[1] == (u64)m->skb || call->r[1] == (u64)m->sock_addr)))
		return 0;
	found = call->fails ? -1 : find_socket(m, (const struct bpf_sock_tuple *)call->r[2], (u32)len);
	if (found < 0 || (full && !m->sockets[found].facts.full))
		return 0;
	m->run.references[found]++;
	return (u64)m->sockets[found].view;
}

static u64 sk_lookup_tcp(struct machine *m, const struct request *call)
{
	return look_up_socket(m, call, true);
}

static u64 skc_lookup_tcp(struct machine *m, const struct request *call)
{
	return look_up_socket(m, call, false);
}

static u64 sk_release(struct machine *m, const struct request *call)
{
	s32 socket = socket_number(m, call->r[1]);

	if (!demand(m, socket >= 0))
		return 0;
	if (!m->run.references[socket])
		trap(m, TRAP_REFERENCE);
	else
		m->run.references[socket]--;
	return 0;
}

/* --- loops ------------------------------------------------------------------------------------------------------------- */

static u64 loop(struct machine *m, const struct request *call)
{
	u64 times = (u32)call->r[1], target = call->r[2] - FUNCTION_HANDLE, n;

	if (!demand(m, target < m->run.program->len && !call->r[4]))
		return 0;
	if (call->fails || times > MAX_LOOPS)
		return error(E2BIG);
	if (m->run.depth + 1 >= FRAMES) {
		trap(m, TRAP_DEPTH);
		return 0;
	}
	m->run.depth++;
	for (n = 0; n < times; n++) {
		u64 result = execute(m, (u32)target, n, call->r[3]);

		if (result > 1)
			trap(m, TRAP_RETURN);
		if (result || m->run.traps & ~(u32)TRAP_KERNEL_READ) {
			n++;
			break;
		}
	}
	m->run.depth--;
	return n;
}

/* --- all helpers ------------------------------------------------------------------------------------------------------- */

/* The numbers are those of include/uapi/linux/bpf.h. Whatever .can_fail does, no call of the others ever fails. */
static const struct {
	u32 number;
	const char *name;
	helper *call;
	bool can_fail;
	bool has_map; /* as first argument */
} HELPERS[] = {
	{ 1, "map_lookup_elem", map_lookup_elem, true, true },
	{ 2, "map_update_elem", map_update_elem, true, true },
	{ 14, "get_current_pid_tgid", get_current_pid_tgid, false, false },
	{ 16, "get_current_comm", get_current_comm, true, false },
	{ 26, "skb_load_bytes", skb_load_bytes, true, false },
	{ 35, "get_current_task", get_current_task, false, false },
	{ 47, "get_socket_uid", get_socket_uid, false, false },
	{ 80, "get_current_cgroup_id", get_current_cgroup_id, false, false },
	{ 84, "sk_lookup_tcp", sk_lookup_tcp, true, false },
	{ 86, "sk_release", sk_release, false, false },
	{ 95, "sk_fullsock", sk_fullsock, true, false },
	{ 96, "tcp_sock", tcp_sock, true, false },
	{ 99, "skc_lookup_tcp", skc_lookup_tcp, true, false },
	{ 107, "sk_storage_get", sk_storage_get, true, true },
	{ 113, "probe_read_kernel", probe_read_kernel, true, false },
	{ 122, "get_netns_cookie", get_netns_cookie, false, false },
	{ 125, "ktime_get_boot_ns", ktime_get_boot_ns, false, false },
	{ 130, "ringbuf_output", ringbuf_output, true, true },
	{ 158, "get_current_task_btf", get_current_task, false, false },
	{ 181, "loop", loop, true, false },
};

#define HELPERS_LEN (sizeof(HELPERS) / sizeof(HELPERS[0]))

static u32 row_of(u32 number)
{
	u32 n;

	for (n = 0; n < HELPERS_LEN && HELPERS[n].number != number; n++)
		;
	return n;
}

u64 call_helper(struct machine *m, u32 number, const u64 *registers, u32 instruction)
{
	u32 row = row_of(number), count = ++m->run.calls;
	const struct controls *controls = &m->controls;
	struct request call = { .r = registers };

	if (row == HELPERS_LEN) {
		trap(m, TRAP_HELPER);
		return 0;
	}
	if (count <= TRACE) {
		u64 map = registers[1] - MAP_HANDLE;

		m->run.trace[count - 1] =
			(struct call){ (u16)number, HELPERS[row].has_map && map < MAPS ? (u16)map : NO_MAP,
				       instruction };
	}
	if (controls->callback && (!controls->callback_at || controls->callback_at == count))
		controls->callback(count);
	call.fails = HELPERS[row].can_fail && count >= controls->fail_first && count <= controls->fail_last;
	return HELPERS[row].call(m, &call);
}

/* NULL for a number without a row. */
const char *vm_helper_name(u32 number)
{
	u32 row = row_of(number);

	return row < HELPERS_LEN ? HELPERS[row].name : NULL;
}

bool vm_helper_can_fail(u32 number)
{
	u32 row = row_of(number);

	return row < HELPERS_LEN && HELPERS[row].can_fail;
}
