// SPDX-License-Identifier: Apache-2.0
/*
 * Memory whose bounds are known, for all that a program can reach: values of maps, contexts, sockets, objects of the
 * kernel. A shadow byte for each 8 bytes has the rights and the length, and between two objects there is a gap.
 */
#include "machine.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define GAP 32

/* xorshift64: what a program must not rely on is filled with it. */
u64 junk(struct machine *m)
{
	m->junk ^= m->junk << 13;
	m->junk ^= m->junk >> 7;
	m->junk ^= m->junk << 17;
	return m->junk;
}

void fill_with_junk(struct machine *m, void *at, u64 len)
{
	u8 *to = at;
	u64 value;

	for (; len >= 8; len -= 8, to += 8) {
		value = junk(m);
		memcpy(to, &value, 8);
	}
	value = junk(m);
	memcpy(to, &value, len);
}

static void *reserve(u64 size)
{
	void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (at == MAP_FAILED) {
		perror("the machine's memory");
		abort();
	}
	return at;
}

void memory_open(struct memory *memory, u64 size)
{
	memory->at = reserve(size);
	memory->shadow = reserve(size / 8);
	memory->size = size;
	memory->used = GAP;
}

void memory_close(struct memory *memory)
{
	munmap(memory->at, memory->size);
	munmap(memory->shadow, memory->size / 8);
}

/* A new object of zeros. */
void *memory_new(struct memory *memory, u64 len, u32 rights)
{
	u64 begin = memory->used, whole = (len + 7) / 8;
	u8 *shadow = memory->shadow + begin / 8;

	if (begin + whole * 8 + GAP > memory->size) {
		fputs("the machine's memory is full\n", stderr);
		abort();
	}
	memset(memory->at + begin, 0, whole * 8);
	memset(shadow, (int)(rights | 8), whole);
	if (len % 8)
		shadow[whole - 1] = (u8)(rights | len % 8);
	memset(shadow + whole, 0, GAP / 8);
	memory->used = begin + whole * 8 + GAP;
	return memory->at + begin;
}

/* Forgets all objects but those of the first bytes. */
void memory_cut(struct memory *memory, u64 used)
{
	if (used < GAP)
		used = GAP;
	memset(memory->shadow + used / 8, 0, (memory->used - used) / 8);
	memory->used = used;
}

bool memory_allows(const struct memory *memory, u64 address, u64 len, u32 rights)
{
	u64 from = address - (u64)memory->at, at, end;

	if (from >= memory->used || len > memory->used - from)
		return false;
	for (at = from, end = from + len; at < end;) {
		u8 shadow = memory->shadow[at / 8];
		u64 next = (at | 7) + 1, valid = (at & ~7ull) + (shadow & 15);

		if ((shadow & rights) != rights || (end < next ? end : next) > valid)
			return false;
		at = next;
	}
	return true;
}

static bool on_stack(const struct machine *m, u64 address, u64 len)
{
	u64 from = address - (u64)m->frames;

	return from < (m->run.depth + 1) * FRAME_STRIDE && from % FRAME_STRIDE + len <= FRAME_BYTES;
}

/* Whether the program itself may load from here, or store here. Objects of the kernel: MAY_READ excludes them. */
bool program_may(const struct machine *m, u64 address, u64 len, u32 rights)
{
	return on_stack(m, address, len) || memory_allows(&m->map_memory, address, len, rights) ||
	       memory_allows(&m->kernel_memory, address, len, rights);
}

u64 read_little(const void *from, u32 len)
{
	u64 value = 0;

	memcpy(&value, from, len);
	return value;
}
