# SPDX-License-Identifier: Apache-2.0
"""The machine's instructions do what the kernel's do, and what a program must never do is a trap."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.kernel import bpf
from tests.vm import in_kernel, layouts
from tests.vm.machine import Machine
from tests.vm.reference import (
    ADD,
    ALU64,
    ATOMIC,
    EXIT,
    JMP,
    LDX,
    MEM,
    MOV,
    REGISTER,
    SIZES,
    ST,
    STX,
    Instruction,
    State,
    mixed_into_r0,
    packed,
    program,
)
from tests.vm.structs import Trap
from tests.vm.values import ESTABLISHED, Outcome, Packet, Socket

PROGRAMS, KERNEL_PROGRAMS = 1000, 150


@pytest.fixture(scope="module")
def bare() -> Iterator[Machine]:
    """A machine without hooks: it needs no bcc and no BTF."""
    with Machine(forms=(), offsets=layouts.recorded()["6.12-debian-x86_64"]) as made:
        yield made


def a_seed() -> int:
    """A fresh one. A failure prints it."""
    return random.SystemRandom().getrandbits(32)


@pytest.mark.parametrize("seed", [5, None])
def test_random_programs_compute_what_the_specification_says(bare: Machine, seed: int | None) -> None:
    seed = a_seed() if seed is None else seed
    for number in range(PROGRAMS):
        made = mixed_into_r0(program(random.Random(f"{seed} {number}"), 40))
        state = State()
        state.run(made)
        assert (state.r[0], 0) == bare.raw(packed([*made, EXIT])), f"Random('{seed} {number}')"


def test_random_programs_compute_what_they_compute_in_the_kernel(bare: Machine) -> None:
    in_kernel.need_bpf()
    seed = a_seed()
    with in_kernel.made_map(abi.SHAPES[Map.CONFIG]) as fd:
        for number in range(KERNEL_PROGRAMS):
            made = mixed_into_r0(program(random.Random(f"{seed} {number}"), 40))
            assert in_kernel.run_once(packed(made + result_into_map(fd))) == 1
            assert bare.raw(packed(made + result_into_map(int(Map.CONFIG)))) == (1, 0)
            expected = bpf.map_lookup(fd, bytes(4), 8)
            assert expected == bare.map_lookup(Map.CONFIG, bytes(4)), f"Random('{seed} {number}')"


def call(helper: int) -> Instruction:
    """A call of a helper."""
    return Instruction(JMP | 0x80, imm=helper)


def move(dst: int, src: int) -> Instruction:
    """One register to another."""
    return Instruction(ALU64 | MOV | REGISTER, dst, src)


def number(dst: int, value: int) -> Instruction:
    """A number into a register."""
    return Instruction(ALU64 | MOV, dst, imm=value)


def found_in_config(map_fd: int) -> list[Instruction]:
    """r0: the value of the map that has one."""
    return [
        Instruction(ST | MEM | SIZES[4], 10, off=-76),
        move(2, 10),
        Instruction(ALU64 | ADD, 2, imm=-76),
        Instruction(0x18, 1, 1, imm=map_fd),
        Instruction(0),
        call(1),
    ]


def result_into_map(map_fd: int) -> list[Instruction]:
    """Stores r0 in the map, and returns 1."""
    return [
        Instruction(STX | MEM | SIZES[8], 10, 0, -72),
        *found_in_config(map_fd),
        Instruction(JMP | 0x10, 0, off=2),
        Instruction(LDX | MEM | SIZES[8], 1, 10, -72),
        Instruction(STX | MEM | SIZES[8], 0, 1),
        number(0, 1),
        EXIT,
    ]


WIDE = MEM | SIZES[8]
TRAPS = {
    "an-unknown-opcode": ([Instruction(0xFF), EXIT], Trap.OPCODE),
    "a-signed-division": ([number(0, 6), Instruction(ALU64 | 0x30, 0, off=1, imm=2), EXIT], Trap.OPCODE),
    "another-atomic-operation": ([Instruction(STX | ATOMIC | SIZES[8], 10, 0, -8, imm=0xE1), EXIT], Trap.OPCODE),
    "a-store-to-r10": ([number(10, 0), EXIT], Trap.OPCODE),
    "an-unknown-helper": ([call(9999), EXIT], Trap.HELPER),
    "a-load-from-nowhere": ([number(1, 4096), Instruction(LDX | WIDE, 0, 1), EXIT], Trap.LOAD),
    "a-load-above-the-stack": ([Instruction(LDX | WIDE, 0, 10, -4), EXIT], Trap.LOAD),
    "a-store-below-the-stack": ([Instruction(ST | WIDE, 10, off=-520), EXIT], Trap.STORE),
    "a-load-behind-a-value": ([*found_in_config(0), Instruction(LDX | WIDE, 0, 0, 1), EXIT], Trap.LOAD),
    "a-store-behind-a-value": ([*found_in_config(0), Instruction(ST | WIDE, 0, off=8), EXIT], Trap.STORE),
    "a-jump-out-of-the-program": ([Instruction(JMP, off=7), EXIT], Trap.JUMP),
    "no-exit": ([number(0, 1)], Trap.JUMP),
    "a-loop-without-end": ([Instruction(JMP, off=-1)], Trap.ENDLESS),
    "a-key-from-nowhere": ([number(2, 4096), Instruction(0x18, 1, 1), Instruction(0), call(1), EXIT], Trap.ARGUMENT),
    "a-map-that-is-none": ([move(2, 10), number(1, 0), call(1), EXIT], Trap.ARGUMENT),
    "a-release-of-nothing": ([number(1, 0), call(86), EXIT], Trap.ARGUMENT),
}


@pytest.mark.parametrize(("instructions", "trap"), TRAPS.values(), ids=TRAPS)
def test_what_a_program_must_never_do_is_a_trap(bare: Machine, instructions: list[Instruction], trap: Trap) -> None:
    assert bare.raw(packed(instructions), step_limit=1000)[1] == trap


def test_registers_and_stack_begin_with_junk_and_calls_leave_some(bare: Machine) -> None:
    """So that a program that relies on them does not work by luck."""
    for instructions in ([EXIT], [Instruction(LDX | WIDE, 0, 10, -8), EXIT], [call(14), move(0, 3), EXIT]):
        assert len({bare.raw(packed(instructions)) for _ in range(20)}) > 10


EGRESS = "egress"


@pytest.mark.parametrize(
    ("instructions", "trap"),
    [([number(0, 2), EXIT], "return"), ([number(0, 1), EXIT], None)],
    ids=["a-value-that-is-not-allowed", "one-that-is"],
)
def test_what_a_hook_returns(machine: Machine, instructions: list[Instruction], trap: str | None) -> None:
    assert set(packet_through(machine, instructions).traps) == ({trap} if trap else set())


def look_up(*after: Instruction) -> list[Instruction]:
    """Finds the socket of a connection of zeros, then does something with r0, and returns 1."""
    zeros = [Instruction(ST | WIDE, 10, off=-8 * n - 8) for n in range(2)]
    tuple_at = [move(2, 10), Instruction(ALU64 | ADD, 2, imm=-16), number(3, 12), number(4, -1), number(5, 0)]
    return [*zeros, *tuple_at, call(99), *after, number(0, 1), EXIT]


@pytest.mark.parametrize(
    ("after", "traps"),
    [
        ((move(1, 0), call(86)), set()),
        ((), {"reference"}),
        ((move(6, 0), move(1, 6), call(86), move(1, 6), call(86)), {"reference"}),
    ],
    ids=["released", "never", "twice"],
)
def test_a_socket_that_was_found_is_released_once(
    machine: Machine, after: tuple[Instruction, ...], traps: set[str]
) -> None:
    assert packet_through(machine, look_up(*after)).traps == traps


def packet_through(machine: Machine, instructions: list[Instruction]) -> Outcome:
    """The outcome of a packet, with other instructions in place of the egress hook."""
    machine.set_sockets([Socket(state=ESTABLISHED)])
    machine.set_instructions("plain", EGRESS, packed(instructions))
    try:
        return machine.packet("plain", Packet(bytes(40), socket=0))
    finally:
        machine.set_instructions("plain", EGRESS, machine.instructions("plain", EGRESS))
