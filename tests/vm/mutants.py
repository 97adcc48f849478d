# SPDX-License-Identifier: Apache-2.0
"""One-instruction mutants of a program: conditions, jumps, numbers, offsets, registers and sizes that are wrong.

Two things are left alone because the compiler made them and no value shows them: the size of a register that is put
on the stack for a while, and the pair of shifts by 32 that clears the upper half of a register.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

_INSTRUCTION = struct.Struct("=BBhi")
_LD_IMM64, _CALL, _EXIT, _JA = 0x18, 0x85, 0x95, 0x05
_LDX, _ST, _STX, _ALU, _JMP, _JMP32, _ALU64 = 1, 2, 3, 4, 5, 6, 7
_REGISTER = 8
MOVE = 0xB0
_MAX_IMMEDIATE = 2**31 - 1

_OPPOSITE = {0x10: 0x50, 0x50: 0x10, 0x20: 0xB0, 0xB0: 0x20, 0x30: 0xA0, 0xA0: 0x30, 0x60: 0xD0, 0xD0: 0x60}
_OPPOSITE.update({0x70: 0xC0, 0xC0: 0x70})
_EDGE = {0x20: 0x30, 0x30: 0x20, 0xA0: 0xB0, 0xB0: 0xA0, 0x60: 0x70, 0x70: 0x60, 0xC0: 0xD0, 0xD0: 0xC0}
"""Conditions that differ where both values are equal."""
_OTHER_OPERATION = {0x00: 0x10, 0x10: 0x00, 0x20: 0x00, 0x40: 0x50, 0x50: 0x40, 0x60: 0x70, 0x70: 0x60, 0xA0: 0x40}
_NARROWER = {0x18: 0x00, 0x00: 0x08, 0x08: 0x10, 0x10: 0x08}
_WIDER = {0x10: 0x08, 0x08: 0x00, 0x00: 0x18, 0x18: 0x00}
"""8, 4, 2, 1 bytes are 0x18, 0x00, 0x08, 0x10. A store of one byte is one of two, a load of eight one of four."""


class Mutant(NamedTuple):
    """Another instruction in place of one."""

    at: int
    kind: str
    instruction: bytes


class Decoded(NamedTuple):
    """struct bpf_insn."""

    code: int
    dst: int
    src: int
    off: int
    imm: int

    def pack(self) -> bytes:
        """8 bytes."""
        return _INSTRUCTION.pack(self.code, self.src << 4 | self.dst, self.off, self.imm)


_NOTHING = Decoded(_JA, 0, 0, 0, 0)


def decoded(instructions: bytes) -> Iterator[tuple[int, Decoded]]:
    """Each instruction with its number. A constant of 64 bits takes two places and is one instruction."""
    at = 0
    while at < len(instructions) // 8:
        code, registers, off, imm = _INSTRUCTION.unpack_from(instructions, 8 * at)
        yield at, Decoded(code, registers & 15, registers >> 4, off, imm)
        at += 2 if code == _LD_IMM64 else 1


def is_condition(one: Decoded) -> bool:
    """Whether it is a conditional jump."""
    return one.code & 7 in (_JMP, _JMP32) and one.code not in (_JA, _CALL, _EXIT)


def is_operation(one: Decoded) -> bool:
    """Whether it computes something in a register."""
    return one.code & 7 in (_ALU, _ALU64)


def mutants(instructions: bytes) -> Iterator[Mutant]:
    """All mutants of a program, in its order."""
    for at, one in decoded(instructions):
        for kind, other in _mutants_of(one):
            if other != one:
                yield Mutant(at, kind, other.pack())


def _mutants_of(one: Decoded) -> Iterator[tuple[str, Decoded]]:
    kind = one.code & 7
    if one.code == _LD_IMM64:
        yield "removed", _NOTHING._replace(off=1)
        yield "another number", one._replace(imm=_next(one.imm))
    elif one.code == _EXIT:
        return
    elif one.code == _CALL:
        yield "removed", _NOTHING
        yield "gives 0", Decoded(0xB7, 0, 0, 0, 0)
    elif one.code == _JA:
        yield "removed", _NOTHING
        yield "jumps further", one._replace(off=one.off + 1)
    elif is_condition(one):
        yield from _of_condition(one)
    elif kind in (_ALU, _ALU64):
        yield from _of_operation(one)
    else:
        yield from _of_access(one, kind)


def _of_condition(one: Decoded) -> Iterator[tuple[str, Decoded]]:
    operation = one.code & 0xF0
    yield "never jumps", _NOTHING
    yield "always jumps", _NOTHING._replace(off=one.off)
    yield "jumps further", one._replace(off=one.off + 1)
    if operation in _OPPOSITE:
        yield "opposite condition", one._replace(code=one.code & 15 | _OPPOSITE[operation])
    if operation in _EDGE:
        yield "condition at the edge", one._replace(code=one.code & 15 | _EDGE[operation])
    if one.code & _REGISTER:
        yield "another register", one._replace(src=(one.src + 1) % 10)
    else:
        yield "another number", one._replace(imm=_next(one.imm))
    yield "another register", one._replace(dst=(one.dst + 1) % 10)


def _of_operation(one: Decoded) -> Iterator[tuple[str, Decoded]]:
    operation = one.code & 0xF0
    if operation in (0x60, 0x70) and not one.code & _REGISTER and one.imm == 32:
        return
    yield "removed", _NOTHING
    if operation in _OTHER_OPERATION:
        yield "another operation", one._replace(code=one.code & 15 | _OTHER_OPERATION[operation])
    if operation == 0xD0:  # the order of bytes
        return
    if one.code & _REGISTER:
        yield "another register", one._replace(src=(one.src + 1) % 10)
    elif operation == MOVE:  # often a truth value
        yield "another number", one._replace(imm=int(not one.imm))
    else:
        yield "another number", one._replace(imm=_next(one.imm))
    if operation != MOVE:  # to move elsewhere is to remove it
        yield "another register", one._replace(dst=(one.dst + 1) % 10)


def _of_access(one: Decoded, kind: int) -> Iterator[tuple[str, Decoded]]:
    size = {0x18: 8, 0x00: 4, 0x08: 2, 0x10: 1}[one.code & 0x18]
    yield "removed", _NOTHING
    yield "another offset", one._replace(off=one.off + size)
    on_stack = (one.src if kind == _LDX else one.dst) == 10
    if one.code & 0xE0 == 0x60 and not (on_stack and size == 8):
        other = _WIDER if kind == _LDX else _NARROWER
        yield "another size", one._replace(code=one.code & ~0x18 | other[one.code & 0x18])
    if kind == _LDX:
        yield "gives 0", Decoded(0xB7, one.dst, 0, 0, 0)
        yield "another register", one._replace(dst=(one.dst + 1) % 10)
        return
    if kind == _ST:
        yield "another number", one._replace(imm=_next(one.imm))
    if kind == _STX:
        yield "another register", one._replace(src=(one.src + 1) % 10)


def _next(number: int) -> int:
    return number + 1 if number < _MAX_IMMEDIATE else number - 1
