// SPDX-License-Identifier: Apache-2.0
/*
 * Runs instructions as Documentation/bpf/standardization/instruction-set.rst has them. A little-endian machine.
 * Registers and the stack begin with junk, and a call leaves junk in r1 to r5, so that nothing works by luck.
 */
#include "machine.h"
#include <string.h>

#ifndef BPF_ATOMIC /* the headers of Linux 5.10 have its older name alone */
#define BPF_ATOMIC 0xc0
#endif
#define FUNCTION_HANDLE \
	0x46554e0000000000ull /* what a program has in a register for a function: this + where it begins */

void trap(struct machine *m, enum trap which)
{
	m->run.traps |= which;
}

static u32 width_of(u8 code)
{
	switch (code & 0x18) {
	case BPF_B:
		return 1;
	case BPF_H:
		return 2;
	case BPF_W:
		return 4;
	}
	return 8;
}

static u64 load(struct machine *m, u64 address, u32 len)
{
	if (program_may(m, address, len, MAY_READ))
		return read_little((void *)address, len);
	if (!memory_allows(&m->kernel_memory, address, len, KERNEL)) {
		/* The kernel gives 0 where it handles the fault of such a load (BPF_PROBE_MEM). */
		trap(m, m->run.program->direct ? TRAP_KERNEL_READ : TRAP_LOAD);
		m->run.loads += m->run.program->direct;
		return 0;
	}
	if (!m->run.program->direct)
		trap(m, TRAP_KERNEL_LOAD);
	if (++m->run.loads == m->controls.fail_load)
		return 0;
	return read_little((void *)address, len);
}

static void store(struct machine *m, u64 address, u32 len, u64 value)
{
	if (!program_may(m, address, len, MAY_WRITE)) {
		trap(m, TRAP_STORE);
		return;
	}
	if (m->journal.on && memory_allows(&m->map_memory, address, len, MAY_WRITE))
		journal_bytes(m, (void *)address, len);
	memcpy((void *)address, &value, len);
}

/* BPF_ALU and BPF_ALU64. False for an operation that the machine does not know. */
static bool compute(struct bpf_insn i, u64 *to, u64 by)
{
	bool wide = BPF_CLASS(i.code) == BPF_ALU64;
	u32 bits = wide ? 63 : 31;
	u64 a = wide ? *to : (u32)*to, b = wide ? by : (u32)by, result;

	if (i.off)
		return false; /* signed division and signed moves, which bcc does not make */
	switch (BPF_OP(i.code)) {
	case BPF_ADD:
		result = a + b;
		break;
	case BPF_SUB:
		result = a - b;
		break;
	case BPF_MUL:
		result = a * b;
		break;
	case BPF_DIV:
		result = b ? a / b : 0;
		break;
	case BPF_MOD:
		result = b ? a % b : a;
		break;
	case BPF_OR:
		result = a | b;
		break;
	case BPF_AND:
		result = a & b;
		break;
	case BPF_XOR:
		result = a ^ b;
		break;
	case BPF_LSH:
		result = a << (b & bits);
		break;
	case BPF_RSH:
		result = a >> (b & bits);
		break;
	case BPF_ARSH:
		result = wide ? (u64)((s64)a >> (b & bits)) : (u64)((s32)a >> (b & bits));
		break;
	case BPF_NEG:
		result = -a;
		break;
	case BPF_MOV:
		result = b;
		break;
	default:
		return false;
	}
	*to = wide ? result : (u32)result;
	return true;
}

/* BPF_END: to little or to big endian, cut to 16, 32 or 64 bits. */
static bool swap_bytes(struct bpf_insn i, u64 *to)
{
	bool big = BPF_SRC(i.code) == BPF_TO_BE;

	if (BPF_CLASS(i.code) != BPF_ALU)
		return false;
	switch (i.imm) {
	case 16:
		*to = big ? __builtin_bswap16((u16)*to) : (u16)*to;
		return true;
	case 32:
		*to = big ? __builtin_bswap32((u32)*to) : (u32)*to;
		return true;
	case 64:
		*to = big ? __builtin_bswap64(*to) : *to;
		return true;
	}
	return false;
}

/* Whether a conditional jump is taken: 1 or 0, -1 for a condition that the machine does not know. */
static int compare(struct bpf_insn i, u64 a, u64 b)
{
	bool wide = BPF_CLASS(i.code) == BPF_JMP;
	s64 signed_a = wide ? (s64)a : (s32)a, signed_b = wide ? (s64)b : (s32)b;

	if (!wide) {
		a = (u32)a;
		b = (u32)b;
	}
	switch (BPF_OP(i.code)) {
	case BPF_JEQ:
		return a == b;
	case BPF_JNE:
		return a != b;
	case BPF_JGT:
		return a > b;
	case BPF_JGE:
		return a >= b;
	case BPF_JLT:
		return a < b;
	case BPF_JLE:
		return a <= b;
	case BPF_JSET:
		return (a & b) != 0;
	case BPF_JSGT:
		return signed_a > signed_b;
	case BPF_JSGE:
		return signed_a >= signed_b;
	case BPF_JSLT:
		return signed_a < signed_b;
	case BPF_JSLE:
		return signed_a <= signed_b;
	}
	return -1;
}

/* ld_imm64, two slots long. */
static bool load_constant(const struct bpf_insn *i, u32 at, u64 *to)
{
	switch (i->src_reg) {
	case 0:
		*to = (u32)i[0].imm | (u64)(u32)i[1].imm << 32;
		return true;
	case BPF_PSEUDO_MAP_FD:
		*to = MAP_HANDLE + (u32)i->imm;
		return true;
	case 4: /* BPF_PSEUDO_FUNC: the distance from the next instruction */
		*to = FUNCTION_HANDLE + (u64)(at + 1 + i->imm);
		return true;
	}
	return false;
}

/* BPF_STX and BPF_ST. The one atomic operation is the addition without a result (BPF_XADD). */
static bool store_instruction(struct machine *m, struct bpf_insn i, u64 address, u64 source)
{
	u32 len = width_of(i.code);

	if (BPF_CLASS(i.code) == BPF_ST)
		source = (u64)(s64)i.imm;
	if (BPF_MODE(i.code) == BPF_ATOMIC && BPF_CLASS(i.code) == BPF_STX && i.imm == BPF_ADD && len >= 4)
		source += load(m, address, len);
	else if (BPF_MODE(i.code) != BPF_MEM)
		return false;
	store(m, address, len, source);
	return true;
}

/* Steps of one kind. Each returns the next instruction; a trap ends the run. */
static u32 jump(struct machine *m, struct bpf_insn i, u32 at, u64 a, u64 b)
{
	int taken = BPF_OP(i.code) == BPF_JA && BPF_CLASS(i.code) == BPF_JMP ? 1 : compare(i, a, b);

	if (taken < 0)
		trap(m, TRAP_OPCODE);
	if (taken != 1)
		return at + 1;
	m->run.program->taken[at]++;
	return at + 1 + (u32)i.off;
}

/* r0 to r10; r10 is read-only. */
static bool has_registers(struct bpf_insn i)
{
	bool writes = BPF_CLASS(i.code) == BPF_ALU || BPF_CLASS(i.code) == BPF_ALU64 || BPF_CLASS(i.code) == BPF_LDX ||
		      BPF_CLASS(i.code) == BPF_LD;

	return i.src_reg <= 10 && i.dst_reg <= (writes ? 9 : 10);
}

static void start_frame(struct machine *m, u64 *r, u64 r1, u64 r2)
{
	u8 *frame = m->frames + m->run.depth * FRAME_STRIDE;
	u32 n;

	for (n = 0; n < 10; n++)
		r[n] = junk(m);
	memset(frame, (int)(junk(m) & 0xff), FRAME_BYTES);
	r[1] = r1;
	r[2] = r2;
	r[10] = (u64)(frame + FRAME_BYTES);
}

/* Runs the function that begins at an instruction until it returns; the result is r0. */
u64 execute(struct machine *m, u32 start, u64 r1, u64 r2)
{
	const struct program *program = m->run.program;
	u64 r[11];
	u32 at = start, n;
	bool known;

	start_frame(m, r, r1, r2);
	while (!m->run.traps || m->run.traps == TRAP_KERNEL_READ) {
		struct bpf_insn i;
		u64 source;

		if (at >= program->len) {
			trap(m, TRAP_JUMP);
			break;
		}
		if (++m->run.steps > m->controls.step_limit) {
			trap(m, TRAP_ENDLESS);
			break;
		}
		i = program->instructions[at];
		program->executed[at]++;
		if (!has_registers(i)) {
			trap(m, TRAP_OPCODE);
			break;
		}
		source = BPF_SRC(i.code) == BPF_X ? r[i.src_reg] : (u64)(s64)i.imm;
		known = true;
		switch (BPF_CLASS(i.code)) {
		case BPF_ALU:
		case BPF_ALU64:
			known = BPF_OP(i.code) == BPF_END ? swap_bytes(i, &r[i.dst_reg]) :
							    compute(i, &r[i.dst_reg], source);
			at++;
			break;
		case BPF_LDX:
			known = BPF_MODE(i.code) == BPF_MEM;
			if (known)
				r[i.dst_reg] = load(m, r[i.src_reg] + (u64)(s64)i.off, width_of(i.code));
			at++;
			break;
		case BPF_ST:
		case BPF_STX:
			known = store_instruction(m, i, r[i.dst_reg] + (u64)(s64)i.off, r[i.src_reg]);
			at++;
			break;
		case BPF_LD:
			known = i.code == (BPF_LD | BPF_IMM | BPF_DW) && at + 1 < program->len &&
				load_constant(&program->instructions[at], at, &r[i.dst_reg]);
			at += 2;
			break;
		default: /* BPF_JMP, BPF_JMP32 */
			if (i.code == (BPF_JMP | BPF_EXIT))
				return r[0];
			if (i.code == (BPF_JMP | BPF_CALL)) {
				known = i.src_reg == 0; /* a function of bpf(2)'s own: not of another program */
				if (known)
					r[0] = call_helper(m, (u32)i.imm, r, at);
				for (n = 1; n <= 5; n++)
					r[n] = junk(m);
				at++;
				break;
			}
			at = jump(m, i, at, r[i.dst_reg], source);
		}
		if (!known)
			trap(m, TRAP_OPCODE);
	}
	return 0;
}
