/* SPDX-License-Identifier: Apache-2.0 */
/* What Python calls: tests/vm/library.py declares the same. Each function is described where it is defined. */
#ifndef INTERFACE_H
#define INTERFACE_H

#include "machine.h"

/* run.c */
struct machine *vm_open(u64 seed);
void vm_close(struct machine *m);
void vm_roles(struct machine *m, s32 counters, s32 report, s32 shares, s32 marks, s32 earlier, s32 filter_marks);
void vm_program(struct machine *m, u32 slot, const struct bpf_insn *instructions, u32 len, bool direct);
void vm_patch(struct machine *m, u32 slot, u32 at, const struct bpf_insn *instruction);
void vm_coverage(struct machine *m, u32 slot, u32 *executed, u32 *taken);
void vm_coverage_clear(struct machine *m, u32 slot);
void vm_controls(struct machine *m, const struct controls *controls);
void vm_attempt(struct machine *m, u32 slot, const struct attempt *attempt, u32 task, struct outcome *outcome);
void vm_packet(struct machine *m, u32 slot, const struct packet *packet, const u8 *bytes, u32 task,
	       struct outcome *outcome);
void vm_packets(struct machine *m, u32 slot, const struct packet_case *cases, u32 len, const u8 *bytes,
		struct outcome *outcomes);
void vm_cross(struct machine *m, const u32 *slots, const struct attempt *attempts, u32 attempts_len, u32 tasks,
	      struct outcome *outcomes);
u32 vm_trace(struct machine *m, struct call *calls, u32 room);
u32 vm_loads(struct machine *m);
u64 vm_total_runs(struct machine *m);
u64 vm_total_steps(struct machine *m);
u64 vm_raw(struct machine *m, u32 slot, u64 r1, u64 r2, u32 *traps);
void vm_sizes(u32 *sizes);

/* replay.c */
void vm_replay_record(struct machine *m, const struct replay *runs, u32 len, const u8 *bytes, struct outcome *outcomes,
		      u32 (*covered)[COVERED_WORDS]);
u32 vm_replay_differs(struct machine *m, const struct replay *runs, u32 len, const u8 *bytes,
		      const struct outcome *outcomes, const u32 (*covered)[COVERED_WORDS], u32 at, u32 from,
		      struct outcome *got);

/* maps.c */
int vm_map_define(struct machine *m, u32 number, u32 type, u32 key_size, u32 value_size, u32 max_entries);
void vm_map_limit(struct machine *m, u32 number, u32 max_entries);
void vm_maps_reset(struct machine *m);
int vm_map_update(struct machine *m, u32 number, const u8 *key, const u8 *value, u64 flags);
int vm_map_delete(struct machine *m, u32 number, const u8 *key);
int vm_map_lookup(struct machine *m, u32 number, const u8 *key, u8 *value);
u32 vm_map_count(struct machine *m, u32 number);
void vm_map_items(struct machine *m, u32 number, u8 *keys, u8 *values);
void vm_map_clear(struct machine *m, u32 number);
void vm_reuse_freed(struct machine *m, bool reuse);

/* journal.c */
void vm_journal_begin(struct machine *m);
void vm_journal_undo(struct machine *m);

/* kernel.c */
void vm_layout(struct machine *m, const struct layout *layout);
void vm_tasks_reset(struct machine *m);
void vm_task(struct machine *m, u32 n, const struct task_facts *facts, const u32 *groups);
void vm_task_poke(struct machine *m, u32 n, u32 object, u32 offset, const u8 *bytes, u32 len);
void vm_socket(struct machine *m, u32 n, const struct socket_facts *facts);
void vm_sockets_reset(struct machine *m);
bool vm_stored(struct machine *m, s32 map, u32 n, u8 *value);

/* helpers.c */
const char *vm_helper_name(u32 number);
bool vm_helper_can_fail(u32 number);

#endif
