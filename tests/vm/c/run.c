// SPDX-License-Identifier: Apache-2.0
/* One run of a hook from beginning to end, and many: every destination with every caller. */
#include "machine.h"
#include "interface.h"
#include <stdlib.h>
#include <string.h>

#define MEMORY (1ull << 28)
#define STEP_LIMIT 50000000

struct machine *vm_open(u64 seed)
{
	struct machine *m = calloc(1, sizeof(*m));

	if (!m)
		abort();
	m->junk = seed | 1;
	m->controls.step_limit = STEP_LIMIT;
	m->roles = (struct roles){ -1, -1, -1, -1, -1, -1 };
	memory_open(&m->map_memory, MEMORY);
	memory_open(&m->kernel_memory, MEMORY);
	return m;
}

void vm_roles(struct machine *m, s32 counters, s32 report, s32 shares, s32 marks, s32 earlier, s32 filter_marks)
{
	m->roles = (struct roles){ counters, report, shares, marks, earlier, filter_marks };
}

void vm_program(struct machine *m, u32 slot, const struct bpf_insn *instructions, u32 len, bool direct)
{
	struct program *program = &m->programs[slot];

	free(program->instructions);
	free(program->executed);
	free(program->taken);
	*program = (struct program){ .instructions = malloc(len * sizeof(*instructions)),
				     .len = len,
				     .direct = direct,
				     .executed = calloc(len, 4),
				     .taken = calloc(len, 4) };
	memcpy(program->instructions, instructions, len * sizeof(*instructions));
}

void vm_patch(struct machine *m, u32 slot, u32 at, const struct bpf_insn *instruction)
{
	m->programs[slot].instructions[at] = *instruction;
}

void vm_coverage(struct machine *m, u32 slot, u32 *executed, u32 *taken)
{
	memcpy(executed, m->programs[slot].executed, m->programs[slot].len * 4);
	memcpy(taken, m->programs[slot].taken, m->programs[slot].len * 4);
}

void vm_coverage_clear(struct machine *m, u32 slot)
{
	memset(m->programs[slot].executed, 0, m->programs[slot].len * 4);
	memset(m->programs[slot].taken, 0, m->programs[slot].len * 4);
}

/* --- one run ----------------------------------------------------------------------------------------------------------- */

static void begin(struct machine *m, const struct program *program, const struct task *task)
{
	struct run *run = &m->run;

	run->traps = run->calls = run->loads = run->depth = run->events = run->event_len = 0;
	run->steps = 0;
	run->packet = NULL;
	memset(run->references, 0, sizeof(run->references));
	run->program = program;
	run->task = task;
}

static u64 finish(struct machine *m, u64 returned)
{
	u32 n;

	if (returned > 1) /* what cgroup programs may return on every kernel */
		trap(m, TRAP_RETURN);
	for (n = 0; n < SOCKETS; n++)
		if (m->run.references[n])
			trap(m, TRAP_REFERENCE);
	m->total_runs++;
	m->total_steps += m->run.steps;
	return returned;
}

static void clear_results(struct machine *m)
{
	if (m->controls.keep_results)
		return;
	if (m->roles.counters >= 0)
		map_clear(m, &m->maps[m->roles.counters]);
	if (m->roles.report >= 0)
		map_clear(m, &m->maps[m->roles.report]);
	if (m->roles.shares >= 0)
		map_clear(m, &m->maps[m->roles.shares]);
}

static void read_counts(const struct map *counters, u8 *counts)
{
	u32 len = counters->max_entries * counters->value_size / 8, n;

	for (n = 0; n < len && n < COUNTS; n++) {
		u64 value = read_little(counters->array + 8 * n, 8);

		counts[n] = value > 255 ? 255 : (u8)value;
	}
}

static void read_row(const struct map *report, struct outcome *outcome)
{
	u32 n;

	outcome->rows = report->count;
	for (n = report->low; n <= report->high; n++) {
		if (!report->buckets[n])
			continue;
		memcpy(outcome->row_key, report->buckets[n]->key, report->key_size);
		memcpy(outcome->row, report->buckets[n]->value, report->value_size);
		return;
	}
}

static void read_results(struct machine *m, struct outcome *outcome)
{
	memcpy(outcome->event, m->run.event, m->run.event_len);
	if (m->roles.counters >= 0)
		read_counts(&m->maps[m->roles.counters], outcome->counts);
	if (m->roles.report >= 0)
		read_row(&m->maps[m->roles.report], outcome);
	if (m->roles.marks >= 0 && m->sockets_len)
		outcome->marked = vm_stored(m, m->roles.marks, 0, outcome->mark);
	if (m->roles.earlier >= 0 && m->sockets_len)
		outcome->marked_earlier = vm_stored(m, m->roles.earlier, 0, outcome->earlier);
}

/* A connect or sendmsg. The counters and the report are empty before it. */
void vm_attempt(struct machine *m, u32 slot, const struct attempt *attempt, u32 task, struct outcome *outcome)
{
	u32 n;

	memset(outcome, 0, sizeof(*outcome));
	clear_results(m);
	build_sockets(m, attempt);
	m->run.time_ns = m->controls.time_ns;
	for (n = 0; n < attempt->repeat; n++) {
		build_attempt(m, attempt);
		begin(m, &m->programs[slot], &m->tasks[task]);
		outcome->returned = finish(m, execute(m, 0, (u64)m->sock_addr, 0));
		outcome->traps |= m->run.traps;
		outcome->events += m->run.events;
		m->run.time_ns++;
	}
	read_destination(m, attempt, outcome);
	read_results(m, outcome);
}

/* A packet at egress. The sockets are those of vm_socket(). Egress knows no task; the one given stands for any. */
void vm_packet(struct machine *m, u32 slot, const struct packet *packet, const u8 *bytes, u32 task,
	       struct outcome *outcome)
{
	memset(outcome, 0, sizeof(*outcome));
	clear_results(m);
	begin(m, &m->programs[slot], &m->tasks[task]);
	build_packet(m, packet, bytes);
	m->run.time_ns = m->controls.time_ns;
	outcome->returned = finish(m, execute(m, 0, (u64)m->skb, 0));
	outcome->traps = m->run.traps;
	outcome->events = m->run.events;
	read_results(m, outcome);
}

/* Each packet with its own sockets. */
void vm_packets(struct machine *m, u32 slot, const struct packet_case *cases, u32 len, const u8 *bytes,
		struct outcome *outcomes)
{
	u32 n, s;

	for (n = 0; n < len; n++) {
		vm_sockets_reset(m);
		for (s = 0; s < cases[n].sockets_len; s++)
			vm_socket(m, s, &cases[n].sockets[s]);
		vm_packet(m, slot, &cases[n].packet, bytes + cases[n].bytes_at, 0, &outcomes[n]);
	}
}

/* Each attempt with each of the first tasks; at attempt a and task t the outcome is [a * tasks + t]. */
void vm_cross(struct machine *m, const u32 *slots, const struct attempt *attempts, u32 attempts_len, u32 tasks,
	      struct outcome *outcomes)
{
	u32 a, t;

	for (a = 0; a < attempts_len; a++)
		for (t = 0; t < tasks; t++)
			vm_attempt(m, slots[a], &attempts[a], t, &outcomes[a * tasks + t]);
}

void vm_controls(struct machine *m, const struct controls *controls)
{
	m->controls = *controls;
	if (!m->controls.step_limit)
		m->controls.step_limit = STEP_LIMIT;
}

/* Calls of helpers in the last run; the first ones are copied. */
u32 vm_trace(struct machine *m, struct call *calls, u32 room)
{
	u32 len = m->run.calls < TRACE ? m->run.calls : TRACE;

	memcpy(calls, m->run.trace, (len < room ? len : room) * sizeof(*calls));
	return m->run.calls;
}

/* Plain loads of kernel memory in the last run. */
u32 vm_loads(struct machine *m)
{
	return m->run.loads;
}

u64 vm_total_runs(struct machine *m)
{
	return m->total_runs;
}

u64 vm_total_steps(struct machine *m)
{
	return m->total_steps;
}

/* Runs instructions that are no hook: r1 and r2 are numbers, the result is r0. */
u64 vm_raw(struct machine *m, u32 slot, u64 r1, u64 r2, u32 *traps)
{
	u64 result;

	begin(m, &m->programs[slot], &m->tasks[0]);
	result = execute(m, 0, r1, r2);
	*traps = m->run.traps;
	return result;
}

/* Sizes of the structs that structs.py has, too. */
void vm_sizes(u32 *sizes)
{
	const u32 all[] = { sizeof(struct task_facts), sizeof(struct socket_facts), sizeof(struct attempt),
			    sizeof(struct packet),     sizeof(struct controls),	    sizeof(struct outcome),
			    sizeof(struct call),       sizeof(struct layout),	    sizeof(struct packet_case),
			    sizeof(struct replay) };

	memcpy(sizes, all, sizeof(all));
}

void vm_close(struct machine *m)
{
	u32 n;

	for (n = 0; n < PROGRAMS; n++) {
		free(m->programs[n].instructions);
		free(m->programs[n].executed);
		free(m->programs[n].taken);
	}
	for (n = 0; n < MAPS; n++)
		free(m->maps[n].buckets);
	free(m->journal.undos);
	free(m->journal.saved);
	memory_close(&m->map_memory);
	memory_close(&m->kernel_memory);
	free(m);
}
