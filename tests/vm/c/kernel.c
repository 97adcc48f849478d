// SPDX-License-Identifier: Apache-2.0
/* The kernel around a program: tasks and their credentials, sockets, the contexts of the hooks. */
#include "machine.h"
#include "interface.h"
#include <stdlib.h>
#include <string.h>

#define MAY_ACCESS_SOCKET MAY_READ

/* --- tasks ----------------------------------------------------------------------------------------------------------- */

static void put(u8 *object, s32 offset, const void *value, u32 len)
{
	memcpy(object + offset, value, len);
}

static u8 *kernel_object(struct machine *m, s32 end)
{
	u8 *at = memory_new(&m->kernel_memory, (u64)end, KERNEL);

	fill_with_junk(m, at, (u64)end);
	return at;
}

static s32 last(s32 a, s32 b)
{
	return a > b ? a : b;
}

/* Task number n, as the running kernel, or the one whose offsets were recorded, lays it out. The rest is junk. */
void vm_task(struct machine *m, u32 n, const struct task_facts *facts, const u32 *groups)
{
	const struct layout *at = &m->layout;
	struct task *task = &m->tasks[n];
	u8 **object = task->objects;

	task->facts = *facts;
	object[OBJECT_TASK] = kernel_object(m, last(last(at->task_cred, at->task_thread_pid), at->task_flags) + 8);
	object[OBJECT_CRED] = kernel_object(
		m, last(last(at->cred_group_info, at->cred_user_ns), last(at->cred_fsuid, at->cred_fsgid)) + 8);
	object[OBJECT_GROUP_INFO] = kernel_object(m, at->group_info_gid + 4 * (s32)facts->groups);
	object[OBJECT_USER_NS] = kernel_object(m, last(at->user_ns_level, at->user_ns_owner) + 4);
	object[OBJECT_PID] = kernel_object(m, at->pid_level + 4);

	put(object[OBJECT_TASK], at->task_cred, &object[OBJECT_CRED], 8);
	put(object[OBJECT_TASK], at->task_thread_pid, &object[OBJECT_PID], 8);
	put(object[OBJECT_TASK], at->task_flags, &facts->flags, 4);
	put(object[OBJECT_CRED], at->cred_fsuid, &facts->fsuid, 4);
	put(object[OBJECT_CRED], at->cred_fsgid, &facts->fsgid, 4);
	put(object[OBJECT_CRED], at->cred_group_info, &object[OBJECT_GROUP_INFO], 8);
	put(object[OBJECT_CRED], at->cred_user_ns, &object[OBJECT_USER_NS], 8);
	put(object[OBJECT_GROUP_INFO], at->group_info_ngroups, &facts->claimed_groups, 4);
	put(object[OBJECT_GROUP_INFO], at->group_info_gid, groups, 4 * facts->groups);
	put(object[OBJECT_USER_NS], at->user_ns_level, &facts->user_ns_level, 4);
	put(object[OBJECT_USER_NS], at->user_ns_owner, &facts->user_ns_owner, 4);
	put(object[OBJECT_PID], at->pid_level, &facts->pid_level, 4);
}

/* Overwrites bytes of a task's object (enum task_object). */
void vm_task_poke(struct machine *m, u32 n, u32 object, u32 offset, const u8 *bytes, u32 len)
{
	memcpy(m->tasks[n].objects[object] + offset, bytes, len);
}

void vm_layout(struct machine *m, const struct layout *layout)
{
	m->layout = *layout;
}

/* Forgets all tasks. The contexts and the sockets are the first objects, and stay. */
void vm_tasks_reset(struct machine *m)
{
	memory_cut(&m->kernel_memory, 0);
	m->sock_addr = memory_new(&m->kernel_memory, sizeof(*m->sock_addr), MAY_READ | MAY_WRITE);
	m->skb = memory_new(&m->kernel_memory, sizeof(*m->skb), MAY_READ);
	for (u32 n = 0; n < SOCKETS; n++) {
		m->sockets[n].view = memory_new(&m->kernel_memory, sizeof(*m->sockets[n].view), MAY_READ);
		m->sockets[n].tcp_view = memory_new(&m->kernel_memory, sizeof(*m->sockets[n].tcp_view), MAY_READ);
		for (u32 map = 0; map < MAPS; map++)
			if (m->maps[map].kind && map_is_storage(&m->maps[map]))
				m->maps[map].storage[n] =
					memory_new(&m->kernel_memory, m->maps[map].value_size, MAY_READ | MAY_WRITE);
	}
}

/* --- sockets --------------------------------------------------------------------------------------------------------- */

static void set_storage(struct machine *m, s32 number, u32 n, bool stored, const u8 *value)
{
	struct map *map = number >= 0 ? &m->maps[number] : NULL;

	if (!map)
		return;
	map->stored[n] = stored;
	memcpy(map->storage[n], value, map->value_size);
}

void vm_socket(struct machine *m, u32 n, const struct socket_facts *facts)
{
	struct bpf_sock *view = m->sockets[n].view;
	struct bpf_tcp_sock *tcp_view = m->sockets[n].tcp_view;

	m->sockets[n].facts = *facts;
	if (m->sockets_len <= n)
		m->sockets_len = n + 1;
	fill_with_junk(m, view, sizeof(*view));
	view->bound_dev_if = facts->device;
	view->family = facts->family;
	view->state = facts->state;
	view->type = facts->type;
	view->protocol = facts->protocol;
	view->src_ip4 = facts->local[0];
	memcpy(view->src_ip6, facts->local, sizeof(view->src_ip6));
	fill_with_junk(m, tcp_view, sizeof(*tcp_view));
	tcp_view->snd_una = facts->snd_una;
	tcp_view->bytes_acked = facts->bytes_acked;
	set_storage(m, m->roles.marks, n, facts->marked, facts->mark);
	set_storage(m, m->roles.earlier, n, facts->marked_earlier, facts->earlier);
	set_storage(m, m->roles.filter_marks, n, facts->filter_marked, (const u8 *)facts->filter_mark);
}

/* Forgets the sockets: nothing is found. */
void vm_sockets_reset(struct machine *m)
{
	m->sockets_len = 0;
}

/* What is in the socket's storage of this map; false when it has none. */
bool vm_stored(struct machine *m, s32 number, u32 n, u8 *value)
{
	const struct map *map = &m->maps[number];

	memcpy(value, map->storage[n], map->value_size);
	return map->stored[n];
}

/* The number of a socket that a program has a pointer to, or -1. */
s32 socket_number(const struct machine *m, u64 address)
{
	u32 n;

	for (n = 0; n < m->sockets_len; n++)
		if ((u64)m->sockets[n].view == address)
			return (s32)n;
	return -1;
}

static bool is_any(const u32 *address)
{
	return !(address[0] | address[1] | address[2] | address[3]);
}

/*
 * The socket that receives a packet with this tuple, or -1: a connection first, then a listener on the address, then
 * one on every address. Source: __inet_lookup() in include/net/inet_hashtables.h.
 */
s32 find_socket(const struct machine *m, const struct bpf_sock_tuple *tuple, u32 tuple_len)
{
	bool ipv4 = tuple_len == sizeof(tuple->ipv4);
	u32 from[4] = { 0 }, to[4] = { 0 };
	u16 from_port = ipv4 ? tuple->ipv4.sport : tuple->ipv6.sport;
	u16 to_port = ipv4 ? tuple->ipv4.dport : tuple->ipv6.dport;
	s32 best = -1, best_score = 0;

	memcpy(from, ipv4 ? (const void *)&tuple->ipv4.saddr : tuple->ipv6.saddr, ipv4 ? 4 : 16);
	memcpy(to, ipv4 ? (const void *)&tuple->ipv4.daddr : tuple->ipv6.daddr, ipv4 ? 4 : 16);
	for (u32 n = 0; n < m->sockets_len; n++) {
		const struct socket_facts *facts = &m->sockets[n].facts;
		s32 score = 0;

		if (facts->local_port != to_port || facts->family != (ipv4 ? 2u : 10u))
			continue;
		if (facts->state == BPF_TCP_LISTEN)
			score = is_any(facts->local) ? 1 : !memcmp(facts->local, to, 16) ? 2 : 0;
		else if (facts->remote_port == from_port && !memcmp(facts->local, to, 16) &&
			 !memcmp(facts->remote, from, 16))
			score = 3;
		if (score > best_score) {
			best_score = score;
			best = (s32)n;
		}
	}
	return best;
}

/* --- contexts -------------------------------------------------------------------------------------------------------- */

void build_sockets(struct machine *m, const struct attempt *attempt)
{
	u32 n;

	m->sockets_len = 0;
	vm_socket(m, 0, &attempt->socket);
	for (n = 0; n < attempt->others_len; n++)
		vm_socket(m, n + 1, &attempt->others[n]);
}

/* A call of socket 0. Fields that a hook of the other family or kind must not read are junk. */
void build_attempt(struct machine *m, const struct attempt *attempt)
{
	struct bpf_sock_addr *context = m->sock_addr;

	fill_with_junk(m, context, sizeof(*context));
	context->user_family = attempt->family;
	context->user_port = attempt->port;
	context->protocol = attempt->protocol;
	context->sk = m->sockets[0].view;
	if (attempt->is_ipv4)
		context->user_ip4 = attempt->to[0];
	else
		memcpy(context->user_ip6, attempt->to, sizeof(context->user_ip6));
	if (attempt->is_message && attempt->is_ipv4)
		context->msg_src_ip4 = attempt->message_source[0];
	else if (attempt->is_message)
		memcpy(context->msg_src_ip6, attempt->message_source, sizeof(context->msg_src_ip6));
	m->context = *context;
}

/* Where the call leads, if the program has changed that. It may change nothing else of the context. */
void read_destination(struct machine *m, const struct attempt *attempt, struct outcome *outcome)
{
	struct bpf_sock_addr before = m->context, after = *m->sock_addr;

	if (!memcmp(&before, &after, sizeof(after)))
		return;
	outcome->port = after.user_port;
	memcpy(outcome->to, attempt->is_ipv4 ? &after.user_ip4 : after.user_ip6, attempt->is_ipv4 ? 4 : 16);
	before.user_port = after.user_port;
	memcpy(attempt->is_ipv4 ? &before.user_ip4 : before.user_ip6, outcome->to, attempt->is_ipv4 ? 4 : 16);
	if (attempt->is_message || memcmp(&before, &after, sizeof(after)))
		outcome->traps |= TRAP_STORE;
}

void build_packet(struct machine *m, const struct packet *packet, const u8 *bytes)
{
	struct __sk_buff *skb = m->skb;

	fill_with_junk(m, skb, sizeof(*skb));
	skb->protocol = packet->protocol;
	skb->ifindex = packet->ifindex;
	skb->len = packet->len;
	skb->sk = packet->socket >= 0 ? m->sockets[packet->socket].view : NULL;
	m->run.packet = packet;
	m->run.packet_bytes = bytes;
}
