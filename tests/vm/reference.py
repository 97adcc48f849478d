# SPDX-License-Identifier: Apache-2.0
"""Random instructions without calls, and what they compute: written from instruction-set.rst, apart from the C code."""

from __future__ import annotations

import operator
import struct
from random import Random
from typing import Callable, NamedTuple

LDX, ST, STX, ALU, JMP, JMP32, ALU64 = 1, 2, 3, 4, 5, 6, 7
ADD, SUB, MUL, DIV, OR, AND, LSH, RSH, NEG, MOD, XOR, MOV, ARSH, END = (number << 4 for number in range(14))
IMMEDIATE, REGISTER = 0, 8
MEM, ATOMIC = 0x60, 0xC0
SIZES = {4: 0x00, 2: 0x08, 1: 0x10, 8: 0x18}
STACK = 64
"""Bytes of the stack that programs use, below r10."""
REGISTERS = 10

_MASK = (1 << 64) - 1
_VALUES = (0, 1, 2, 7, 31, 32, 33, 63, 64, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, -1, -2, -0x80000000)


class Instruction(NamedTuple):
    """struct bpf_insn."""

    code: int
    dst: int = 0
    src: int = 0
    off: int = 0
    imm: int = 0

    def pack(self) -> bytes:
        """8 bytes."""
        return struct.pack("=BBhi", self.code, self.src << 4 | self.dst, self.off, self.imm)


EXIT = Instruction(JMP | 0x90)


def constant(register: int, value: int) -> list[Instruction]:
    """ld_imm64, two slots long."""
    low, high = struct.unpack("=ii", struct.pack("=Q", value & _MASK))
    return [Instruction(0x18, register, imm=low), Instruction(0, imm=high)]


# --- what instructions compute ----------------------------------------------------------------------------------------


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def _shifts(bits: int) -> dict[int, Callable[[int, int], int]]:
    return {
        LSH: lambda a, b: a << b % bits,
        RSH: lambda a, b: a >> b % bits,
        ARSH: lambda a, b: _signed(a, bits) >> b % bits,
    }


_COMPUTE: dict[int, Callable[[int, int], int]] = {
    **{
        ADD: operator.add,
        SUB: operator.sub,
        MUL: operator.mul,
        OR: operator.or_,
        AND: operator.and_,
        XOR: operator.xor,
    },
    DIV: lambda a, b: a // b if b else 0,
    MOD: lambda a, b: a % b if b else a,
    NEG: lambda a, _: -a,
    MOV: lambda _, b: b,
}

_CONDITIONS: dict[int, Callable[[int, int], bool]] = {
    **{
        0x10: operator.eq,
        0x20: operator.gt,
        0x30: operator.ge,
        0x50: operator.ne,
        0xA0: operator.lt,
        0xB0: operator.le,
    },
    0x40: lambda a, b: bool(a & b),
}
_SIGNED_CONDITIONS: dict[int, Callable[[int, int], bool]] = {
    **{0x60: operator.gt, 0x70: operator.ge, 0xC0: operator.lt, 0xD0: operator.le}
}


class State:
    """Registers r0 to r9, and the bytes of the stack."""

    def __init__(self) -> None:
        self.r = [0] * REGISTERS
        self.stack = bytearray(STACK)

    def run(self, instructions: list[Instruction]) -> None:
        """Executes instructions up to the end of the list. Constants are two slots long."""
        at = 0
        while at < len(instructions):
            one = instructions[at]
            if one.code == 0x18:
                low, high = one.imm & 0xFFFFFFFF, instructions[at + 1].imm & 0xFFFFFFFF
                self.r[one.dst] = high << 32 | low
                at += 2
            elif one.code & 7 in (JMP, JMP32):
                at += 1 + (one.off if self._taken(one) else 0)
            else:
                self._execute(one)
                at += 1

    def _operand(self, one: Instruction) -> int:
        return self.r[one.src] if one.code & REGISTER else one.imm & _MASK

    def _taken(self, one: Instruction) -> bool:
        bits = 64 if one.code & 7 == JMP else 32
        a, b = (value & (1 << bits) - 1 for value in (self.r[one.dst], self._operand(one)))
        if one.code & 0xF0 in _SIGNED_CONDITIONS:
            return _SIGNED_CONDITIONS[one.code & 0xF0](_signed(a, bits), _signed(b, bits))
        return _CONDITIONS[one.code & 0xF0](a, b)

    def _execute(self, one: Instruction) -> None:
        kind = one.code & 7
        if kind in (ALU, ALU64) and one.code & 0xF0 == END:
            self.r[one.dst] = self._swapped(one)
        elif kind in (ALU, ALU64):
            bits = 64 if kind == ALU64 else 32
            mask = (1 << bits) - 1
            compute = _COMPUTE.get(one.code & 0xF0) or _shifts(bits)[one.code & 0xF0]
            self.r[one.dst] = compute(self.r[one.dst] & mask, self._operand(one) & mask) & mask
        else:
            self._access(one)

    def _swapped(self, one: Instruction) -> int:
        cut = (self.r[one.dst] & (1 << one.imm) - 1).to_bytes(one.imm // 8, "little")
        return int.from_bytes(cut, "big" if one.code & REGISTER else "little")

    def _access(self, one: Instruction) -> None:
        size = next(size for size, bits in SIZES.items() if bits == one.code & 0x18)
        at = STACK + one.off
        before = int.from_bytes(self.stack[at : at + size], "little")
        if one.code & 7 == LDX:
            self.r[one.dst] = before
            return
        value = one.imm if one.code & 7 == ST else self.r[one.src]
        if one.code & 0xE0 == ATOMIC:
            value += before
        self.stack[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")


# --- random programs --------------------------------------------------------------------------------------------------


def program(r: Random, length: int) -> list[Instruction]:
    """Every register and every byte of the stack gets a value, then random instructions follow."""
    begin: list[Instruction] = []
    for register in range(REGISTERS):
        begin += constant(register, r.choice((r.getrandbits(64), r.choice(_VALUES), r.getrandbits(32) << 32)))
    begin += [Instruction(STX | MEM | SIZES[8], 10, r.randrange(REGISTERS), -8 * n - 8) for n in range(STACK // 8)]
    return begin + [_random(r, length - n - 1) for n in range(length)]


def _random(r: Random, left: int) -> Instruction:
    dst, src, kind = r.randrange(REGISTERS), r.randrange(REGISTERS), r.random()
    if kind < 0.25 and left:
        condition = r.choice((*_CONDITIONS, *_SIGNED_CONDITIONS))
        source = r.choice((IMMEDIATE, REGISTER))
        jump = Instruction(r.choice((JMP, JMP32)) | condition | source, dst, off=r.randint(0, min(4, left)))
        return jump._replace(src=src) if source else jump._replace(imm=r.choice(_VALUES))
    if kind < 0.45:
        return _random_access(r, dst, src)
    if kind < 0.52:
        return Instruction(ALU | END | r.choice((0, 8)), dst, imm=r.choice((16, 32, 64)))
    return _random_arithmetic(r, dst, src)


def _random_access(r: Random, dst: int, src: int) -> Instruction:
    size = r.choice((1, 2, 4, 8))
    off = -size * r.randint(1, STACK // size)
    kind = r.choice((LDX, ST, STX, STX))
    if kind == LDX:
        return Instruction(LDX | MEM | SIZES[size], dst, 10, off)
    if kind == ST:
        return Instruction(ST | MEM | SIZES[size], 10, 0, off, r.choice(_VALUES))
    mode = ATOMIC if size >= 4 and r.random() < 0.3 else MEM
    return Instruction(STX | mode | SIZES[size], 10, src, off)


def _random_arithmetic(r: Random, dst: int, src: int) -> Instruction:
    width = r.choice((ALU, ALU64))
    operation = r.choice((*_COMPUTE, LSH, RSH, ARSH))
    if operation == NEG:
        return Instruction(width | NEG, dst)
    if r.random() < 0.5:
        return Instruction(width | operation | REGISTER, dst, src)
    immediate = r.choice(_VALUES)
    if operation in (LSH, RSH, ARSH):
        immediate = r.randrange(64 if width == ALU64 else 32)  # the verifier refuses others
    elif operation in (DIV, MOD) and immediate == 0:
        immediate = 3  # this, too
    return Instruction(width | operation, dst, imm=immediate)


_FACTOR = 0x01000193  # FNV's prime


def mixed_into_r0(instructions: list[Instruction]) -> list[Instruction]:
    """Then r0 depends on every register and every byte of the stack."""
    more = list(instructions)
    for number in range(1, REGISTERS):
        more += [Instruction(ALU64 | MUL, 0, imm=_FACTOR), Instruction(ALU64 | XOR | REGISTER, 0, number)]
    for number in range(STACK // 8):
        more += [Instruction(LDX | MEM | SIZES[8], 1, 10, -8 * number - 8), Instruction(ALU64 | MUL, 0, imm=_FACTOR)]
        more.append(Instruction(ALU64 | XOR | REGISTER, 0, 1))
    return more


def packed(instructions: list[Instruction]) -> bytes:
    """All instructions, 8 bytes each."""
    return b"".join(one.pack() for one in instructions)
