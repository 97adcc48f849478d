# SPDX-License-Identifier: Apache-2.0
"""The machine as Python sees it. tests/vm/__init__.py has examples."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_uint32
from typing import NamedTuple

from imds_guard.backends.ebpf import abi, program
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.image import Image, settings_of
from imds_guard.backends.ebpf.program import Defines
from imds_guard.backends.ebpf.render import render
from imds_guard.policy.model import Policy
from tests.vm.library import buffer, library, words
from tests.vm.programs import BARE_FORMS, FORMS, HOOKS, compiled, reads_directly
from tests.vm.replay import Replays
from tests.vm.structs import CALLBACK, AttemptC, CallC, ControlsC, LayoutC, OutcomeC, PacketCaseC, ReplayC
from tests.vm.values import Attempt, Call, Outcome, Packet, Socket, Task, outcome_of

TASK, CRED, GROUP_INFO, USER_NS, PID = range(5)
"""enum task_object: the objects of a task that poke() changes."""

_RAW_SLOT = 63
_TRACE = 8192
_NO_MAP = 0xFFFF
ANY_TIME_NS = 1_000_000_000_000


class Controls(NamedTuple):
    """What goes wrong, or happens, during a run. Calls of helpers, and plain loads, are counted from 1."""

    fail_first: int = 0
    fail_last: int = 0
    """The calls from the first to the last fail, those that can."""
    fail_load: int = 0
    """This plain load of kernel memory gives 0: what the kernel does where such a load faults."""
    before_call: Callable[[int], None] | None = None
    """Runs before a call, with its number: for what happens on another CPU meanwhile. It may change maps."""
    at_call: int = 0
    """Before this call alone; 0: before each."""
    ring_full: bool = False
    time_ns: int = ANY_TIME_NS
    """CLOCK_BOOTTIME in the first of the runs; each further one is a nanosecond later."""
    step_limit: int = 0
    keep_results: bool = False
    """The counters and the report are not emptied before the run."""


NOTHING = Controls()


def failing(first: int, last: int | None = None) -> Controls:
    """The n-th call fails, or those from the first to the last."""
    return Controls(fail_first=first, fail_last=first if last is None else last)


class Coverage(NamedTuple):
    """For each instruction of a hook: how often it was executed, and how often its jump was taken."""

    executed: tuple[int, ...]
    taken: tuple[int, ...]


class Machine:
    """Maps, tasks and the hooks in some forms. Close it, or use it as a context manager.

    ``offsets`` are those of another kernel (layouts.py); by default the running kernel's. Several machines don't know
    each other.
    """

    def __init__(self, forms: Sequence[str] = tuple(FORMS), offsets: Defines | None = None, seed: int = 1) -> None:
        self._library = library()
        self._m = self._library.vm_open(seed)
        self.forms = tuple(forms)
        self._slots = {(form, hook): number for number, (form, hook) in enumerate(_pairs(self.forms))}
        self._callback: object = None
        self._define_maps()
        known = dict(program.kernel_offsets() if offsets is None else offsets)
        wanted = [f"IG_OFF_{struct}_{member}".upper() for struct, member in program.OFFSETS]
        self._library.vm_layout(self._m, LayoutC(*(known[name] for name in wanted)))
        self._original: dict[tuple[str, str], bytes] = {}
        for form in self.forms:
            for hook, code in compiled(form, offsets).items():
                self.set_instructions(form, hook, code.instructions)
                self._original[form, hook] = code.instructions
        self.reset()

    @property
    def has_filters(self) -> bool:
        """False when some form is for policies without filters alone."""
        return not set(self.forms) & set(BARE_FORMS)

    def close(self) -> None:
        """Frees its memory."""
        if self._m:
            self._library.vm_close(self._m)
            self._m = None

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _define_maps(self) -> None:
        for number, shape in abi.SHAPES.items():
            done = self._library.vm_map_define(
                self._m, int(number), int(shape.type), shape.key_size, shape.value_size, shape.max_entries
            )
            assert done == 0, f"maps.c has no kind of map for {number.name}"
        roles = (Map.COUNTERS, Map.REPORT, Map.SHARES, Map.MARKS, Map.EARLIER, Map.FILTER_MARKS)
        self._library.vm_roles(self._m, *map(int, roles))

    def reset(self) -> None:
        """Empties all maps, and forgets all tasks and sockets."""
        self._library.vm_maps_reset(self._m)
        self.set_tasks([Task(0, 0)])

    # --- the policy ---------------------------------------------------------------------------------------------------

    def load(self, policy: Policy, generation: int = 1, serial: int = 7, log_allowed: bool = False) -> Image:
        """Puts a policy in force, by the real renderer, on empty maps. Raises Unsupported as that does."""
        image = render(policy, generation)
        self._library.vm_maps_reset(self._m)
        self.fill(policy, image, serial)
        self.map_update(Map.CONFIG, abi.ARRAY_KEY.pack(0), abi.CONFIG.pack(generation))
        self.map_update(Map.WATCH, abi.ARRAY_KEY.pack(0), abi.WATCH.pack(log_allowed))
        return image

    def fill_generation(self, policy: Policy, generation: int, serial: int) -> None:
        """Writes a generation that is not put in force."""
        self.fill(policy, render(policy, generation), serial)

    def fill(self, policy: Policy, image: Image, serial: int) -> None:
        """Writes the records of a generation, and its settings."""
        for number, items in image.items.items():
            for key, value in items:
                self.map_update(number, key, value)
        record = settings_of(policy).pack(image.digest(), serial)
        self.map_update(Map.SETTINGS, abi.ARRAY_KEY.pack(image.generation), record)

    # --- maps, as bpf(2) does it --------------------------------------------------------------------------------------

    def map_update(self, number: int, key: bytes, value: bytes, flags: int = 0) -> None:
        """Sets one element. Raises OSError."""
        shape = abi.SHAPES[Map(number)]
        assert (len(key), len(value)) == (shape.key_size, shape.value_size), (Map(number).name, len(key), len(value))
        _raise_for(self._library.vm_map_update(self._m, int(number), key, value, flags))

    def map_delete(self, number: int, key: bytes) -> None:
        """Removes one element. Raises FileNotFoundError."""
        _raise_for(self._library.vm_map_delete(self._m, int(number), key))

    def map_lookup(self, number: int, key: bytes) -> bytes | None:
        """One element's value, or None."""
        value = buffer(abi.SHAPES[Map(number)].value_size)
        return bytes(value) if self._library.vm_map_lookup(self._m, int(number), key, value) == 0 else None

    def map_items(self, number: int) -> list[tuple[bytes, bytes]]:
        """All elements of a hash or a trie."""
        shape = abi.SHAPES[Map(number)]
        count = self._library.vm_map_count(self._m, int(number))
        keys, values = buffer(count * shape.key_size), buffer(count * shape.value_size)
        self._library.vm_map_items(self._m, int(number), keys, values)
        return list(zip(_pieces(bytes(keys), shape.key_size), _pieces(bytes(values), shape.value_size)))

    def map_limit(self, number: int, max_entries: int) -> None:
        """How many elements the map may have from now on: a full map is soon made."""
        self._library.vm_map_limit(self._m, int(number), max_entries)

    def reuse_freed(self, reuse: bool) -> None:
        """Whether the memory of a removed element is used again at once, as in hashes since Linux 6.1."""
        self._library.vm_reuse_freed(self._m, reuse)

    @contextmanager
    def rollback(self) -> Iterator[None]:
        """All changes of maps in this block are undone at its end. Blocks don't nest."""
        self._library.vm_journal_begin(self._m)
        try:
            yield
        finally:
            self._library.vm_journal_undo(self._m)

    # --- who and where ------------------------------------------------------------------------------------------------

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """The tasks from now on; a run names one by its number here."""
        self._library.vm_tasks_reset(self._m)
        for number, task in enumerate(tasks):
            gids = words(list(task.groups))
            self._library.vm_task(self._m, number, ctypes.byref(task.to_c()), gids)

    def poke(self, task: int, which: int, offset: int, value: bytes) -> None:
        """Overwrites bytes of one of a task's objects (TASK, CRED, GROUP_INFO, USER_NS, PID)."""
        self._library.vm_task_poke(self._m, task, which, offset, value, len(value))

    def set_sockets(self, sockets: Sequence[Socket]) -> None:
        """The sockets that packet() knows: that of the packet, and those that look-ups find."""
        self._library.vm_sockets_reset(self._m)
        for number, one in enumerate(sockets):
            self._library.vm_socket(self._m, number, ctypes.byref(one.to_c()))

    # --- one run ------------------------------------------------------------------------------------------------------

    def attempt(self, form: str, attempt: Attempt, task: int = 0, controls: Controls = NOTHING) -> Outcome:
        """Runs the hook of a connect or sendmsg."""
        return self._outcome(OutcomeC.from_buffer_copy(self.attempt_bytes(form, attempt, task, controls)))

    def attempt_bytes(self, form: str, attempt: Attempt, task: int = 0, controls: Controls = NOTHING) -> bytes:
        """The same, as the struct outcome that it is in C."""
        self._apply(controls)
        raw = OutcomeC()
        slot = self._slots[form, attempt.hook]
        self._library.vm_attempt(self._m, slot, ctypes.byref(attempt.to_c()), task, ctypes.byref(raw))
        return bytes(raw)

    def packet(self, form: str, packet: Packet, controls: Controls = NOTHING) -> Outcome:
        """Runs the egress hook, with the sockets of set_sockets()."""
        self._apply(controls)
        raw = OutcomeC()
        slot = self._slots[form, abi.EGRESS]
        self._library.vm_packet(self._m, slot, ctypes.byref(packet.to_c()), packet.data, 0, ctypes.byref(raw))
        return self._outcome(raw)

    def packets(self, form: str, cases: bytes, data: bytes, controls: Controls = NOTHING) -> bytes:
        """Many packets, in C: a struct outcome for each struct packet_case. ``data``: the bytes of all packets."""
        self._apply(controls)
        count = len(cases) // ctypes.sizeof(PacketCaseC)
        outcomes = buffer(ctypes.sizeof(OutcomeC) * count)
        self._library.vm_packets(self._m, self._slots[form, abi.EGRESS], cases, count, data, outcomes)
        return bytes(outcomes)

    def cross(self, form: str, attempts: Sequence[Attempt], tasks: int, controls: Controls = NOTHING) -> bytes:
        """Each attempt with each of the first tasks, in C: a struct outcome each, at [attempt * tasks + task]."""
        self._apply(controls)
        given = (AttemptC * len(attempts))(*(attempt.to_c() for attempt in attempts))
        slots = words([self._slots[form, attempt.hook] for attempt in attempts])
        outcomes = buffer(ctypes.sizeof(OutcomeC) * len(attempts) * tasks)
        self._library.vm_cross(self._m, slots, given, len(attempts), tasks, outcomes)
        return bytes(outcomes)

    def replays(self, runs: Sequence[ReplayC], data: bytes = b"", step_limit: int = 0) -> Replays:
        """These runs are recorded as they are now. Their slots are those of slot()."""
        self._apply(Controls(step_limit=step_limit))
        return Replays(self._library, self._m, runs, data)

    def slot(self, form: str, hook: str) -> int:
        """The number that a hook has in C."""
        return self._slots[form, hook]

    def raw(self, instructions: bytes, step_limit: int = 0) -> tuple[int, int]:
        """Runs instructions that are no hook: r0, and the bits of structs.Trap."""
        self._apply(Controls(step_limit=step_limit))
        self._library.vm_program(self._m, _RAW_SLOT, instructions, len(instructions) // 8, False)
        traps = c_uint32()
        result = self._library.vm_raw(self._m, _RAW_SLOT, 0, 0, ctypes.byref(traps))
        return int(result), traps.value

    def _apply(self, controls: Controls) -> None:
        callback = CALLBACK(controls.before_call) if controls.before_call else CALLBACK()
        self._callback = callback  # the library keeps a pointer to it
        self._library.vm_controls(
            self._m,
            ctypes.byref(
                ControlsC(
                    fail_first=controls.fail_first,
                    fail_last=controls.fail_last,
                    fail_load=controls.fail_load,
                    callback_at=controls.at_call,
                    callback=callback,
                    time_ns=controls.time_ns,
                    step_limit=controls.step_limit,
                    ring_full=controls.ring_full,
                    keep_results=controls.keep_results,
                )
            ),
        )

    def _outcome(self, raw: OutcomeC) -> Outcome:
        return outcome_of(raw, self._library.vm_trace(self._m, None, 0), self._library.vm_loads(self._m))

    def trace(self) -> list[Call]:
        """The calls of helpers in the last run (of the last repetition), in their order."""
        room = (CallC * _TRACE)()
        count = min(self._library.vm_trace(self._m, room, _TRACE), _TRACE)
        return [self._call(room[n]) for n in range(count)]

    def _call(self, call: CallC) -> Call:
        name = self._library.vm_helper_name(call.helper)
        number = None if call.map == _NO_MAP else Map(call.map)
        return Call(name.decode(), number, call.instruction, self._library.vm_helper_can_fail(call.helper))

    # --- instructions -------------------------------------------------------------------------------------------------

    def instructions(self, form: str, hook: str) -> bytes:
        """As bcc compiled them, 8 bytes each."""
        return self._original[form, hook]

    def set_instructions(self, form: str, hook: str, instructions: bytes) -> None:
        """Replaces a hook's program. Its coverage begins anew."""
        slot = self._slots[form, hook]
        self._library.vm_program(self._m, slot, instructions, len(instructions) // 8, reads_directly(form))

    @contextmanager
    def patched(self, form: str, hooks: Sequence[str], at: int, instruction: bytes) -> Iterator[None]:
        """One instruction of these hooks is another one in this block."""
        for hook in hooks:
            self._library.vm_patch(self._m, self._slots[form, hook], at, instruction)
        try:
            yield
        finally:
            for hook in hooks:
                before = self._original[form, hook][8 * at : 8 * at + 8]
                self._library.vm_patch(self._m, self._slots[form, hook], at, before)

    def coverage(self, form: str, hook: str) -> Coverage:
        """Since the machine was made, or since clear_coverage()."""
        count = len(self._original[form, hook]) // 8
        executed, taken = (c_uint32 * count)(), (c_uint32 * count)()
        self._library.vm_coverage(self._m, self._slots[form, hook], executed, taken)
        return Coverage(tuple(executed), tuple(taken))

    def clear_coverage(self) -> None:
        """Begins to count anew."""
        for slot in self._slots.values():
            self._library.vm_coverage_clear(self._m, slot)

    @property
    def total_runs(self) -> int:
        """Runs of hooks since the machine was made."""
        return int(self._library.vm_total_runs(self._m))

    @property
    def total_steps(self) -> int:
        """Instructions executed in them."""
        return int(self._library.vm_total_steps(self._m))


def _pairs(forms: Sequence[str]) -> list[tuple[str, str]]:
    return [(form, hook) for form in forms for hook in HOOKS]


def _pieces(whole: bytes, size: int) -> list[bytes]:
    return [whole[at : at + size] for at in range(0, len(whole), size)] if size else []


def _raise_for(result: int) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
