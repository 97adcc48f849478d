// SPDX-License-Identifier: Apache-2.0
/* Changes of maps that are undone: for runs in the middle of a change, of which many begin from the same state. */
#include "machine.h"
#include "interface.h"
#include <stdlib.h>
#include <string.h>

/* Called before bytes of a map, or of what the machine knows about it, change. */
void journal_bytes(struct machine *m, void *at, u32 len)
{
	struct journal *journal = &m->journal;

	if (!journal->on)
		return;
	if (journal->len == journal->size) {
		journal->size = journal->size * 2 + 256;
		journal->undos = realloc(journal->undos, journal->size * sizeof(*journal->undos));
	}
	if (journal->saved_len + len > journal->saved_size) {
		journal->saved_size = (journal->saved_size + len) * 2;
		journal->saved = realloc(journal->saved, journal->saved_size);
	}
	memcpy(journal->saved + journal->saved_len, at, len);
	journal->undos[journal->len++] = (struct undo){ at, len, journal->saved_len };
	journal->saved_len += len;
}

void vm_journal_begin(struct machine *m)
{
	m->journal.on = true;
	m->journal.len = m->journal.saved_len = 0;
	m->journal.map_memory_used = m->map_memory.used;
}

void vm_journal_undo(struct machine *m)
{
	struct journal *journal = &m->journal;

	while (journal->len) {
		struct undo *undo = &journal->undos[--journal->len];

		memcpy(undo->at, journal->saved + undo->saved_at, undo->len);
	}
	journal->on = false;
	memory_cut(&m->map_memory, journal->map_memory_used);
}
