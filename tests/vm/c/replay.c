// SPDX-License-Identifier: Apache-2.0
/*
 * Runs that are recorded, and repeated with another instruction in the program: is the outcome still the same? Only
 * runs that execute the instruction can differ.
 */
#include "machine.h"
#include "interface.h"
#include <string.h>

static void run_one(struct machine *m, const struct replay *one, const u8 *bytes, struct outcome *outcome)
{
	const struct packet_case *packet = &one->packet;
	u32 n;

	m->controls.fail_first = one->fail_first;
	m->controls.fail_last = one->fail_last;
	m->controls.fail_load = one->fail_load;
	m->controls.ring_full = one->ring_full;
	if (!one->is_packet) {
		vm_attempt(m, one->slot, &one->attempt, one->task, outcome);
		return;
	}
	vm_sockets_reset(m);
	for (n = 0; n < packet->sockets_len; n++)
		vm_socket(m, n, &packet->sockets[n]);
	vm_packet(m, one->slot, &packet->packet, bytes + packet->bytes_at, 0, outcome);
}

/* The outcome of each run, and for each run and instruction a bit: was it executed? */
void vm_replay_record(struct machine *m, const struct replay *runs, u32 len, const u8 *bytes, struct outcome *outcomes,
		      u32 (*covered)[COVERED_WORDS])
{
	u32 n, i;

	for (n = 0; n < len; n++) {
		const struct program *program = &m->programs[runs[n].slot];

		memset(program->executed, 0, program->len * 4);
		run_one(m, &runs[n], bytes, &outcomes[n]);
		memset(covered[n], 0, sizeof(covered[n]));
		for (i = 0; i < program->len && i < COVERED_WORDS * 32; i++)
			if (program->executed[i])
				covered[n][i / 32] |= 1u << i % 32;
	}
}

/* The first run, from a number on, that executed an instruction and has another outcome now; len when there is none. */
u32 vm_replay_differs(struct machine *m, const struct replay *runs, u32 len, const u8 *bytes,
		      const struct outcome *outcomes, const u32 (*covered)[COVERED_WORDS], u32 at, u32 from,
		      struct outcome *got)
{
	u32 n;

	for (n = from; n < len; n++) {
		if (!(covered[n][at / 32] >> at % 32 & 1))
			continue;
		run_one(m, &runs[n], bytes, got);
		if (memcmp(got, &outcomes[n], sizeof(*got)))
			return n;
	}
	return len;
}
