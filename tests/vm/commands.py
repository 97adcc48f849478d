# SPDX-License-Identifier: Apache-2.0
"""Whole commands of the backend on two machines: hooks are attached, moved to other maps, and detached meanwhile."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from random import Random
from typing import Callable
from unittest import mock

from imds_guard.backends.ebpf import abi, backend, changes, program
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.changes import Target
from imds_guard.backends.ebpf.folder import Folder
from imds_guard.kernel.cgroup import Cgroup
from imds_guard.policy.model import Policy
from tests.vm.changes import policy, successor
from tests.vm.command_calls import CommandCalls, HookChange
from tests.vm.machine import Machine
from tests.vm.map_calls import Steps
from tests.vm.moments import Moments
from tests.vm.timeline import Timeline, Verdicts, flip_of

_CGROUP = 4711


class Commands(Moments):
    """start, change, replacement of the maps, and stop, with one guard. The second machine has the later maps."""

    test = "tests/vm/test_commands.py"

    def __init__(self, machines: Sequence[Machine], calls: CommandCalls, target: Target) -> None:
        super().__init__(machines, calls)
        self._kernel, self._target = calls, target

    def machine_of(self, hook: str) -> Machine | None:
        """Moments.machine_of()."""
        return self._kernel.hooks[hook]

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Moments.undone(): of both machines, and where the hooks are."""
        before = dict(self._kernel.hooks)
        with ExitStack() as stack:
            for machine in self.machines:
                stack.enter_context(machine.rollback())
            yield
        self._kernel.hooks.update(before)

    def commands(self, seed: str) -> None:
        """start, a change, a change that replaces maps which are too small, and stop."""
        r = self.r = Random(f"commands {seed}")
        first = policy(r)
        second, third = _other(r, first), policy(r)
        self._kernel.machine = self.machines[0]
        self.begin(seed, [first, second, third])
        install, started = self._record(lambda: changes.install(self._target, first), first)
        self.replay("start", install, Timeline(self.nothing, (flip_of(install), started)))
        change, changed = self._change(second)
        self.replay("change", change, Timeline(started, (flip_of(change), changed)))
        self._kernel.machine = self.machines[1]
        self._kernel.shrink(Map.MEMBERS)
        marks = self._kernel.object_of("connect4", Map.MARKS)
        larger, moved = self._change(third)
        assert self._kernel.object_of("connect4", Map.MARKS) is marks, "marks are kept, or every connection is cut"
        self.replay("replacement", larger, _while_hooks_move(larger, changed, moved))
        stop, stopped = self._record(self._stop, None)
        self.replay("stop", stop, Timeline(moved, (flip_of(stop), stopped)))
        assert set(self._kernel.hooks.values()) == {None}

    def _change(self, wanted: Policy) -> tuple[Steps, Verdicts]:
        return self._record(lambda: changes.change_running(self._target, wanted, keep_version=False), wanted)

    def _stop(self) -> None:
        backend.open_the_lock(self._target.folder)
        self._target.folder.remove()

    def _record(self, command: Callable[[], object], wanted: Policy | None) -> tuple[Steps, Verdicts]:
        with self.undone():
            steps = self._kernel.record(command)
            assert {hook for hook, machine in self._kernel.hooks.items() if machine} == _needed(wanted)
            packets = self.packets(strict=wanted is not None and wanted.strict)
        return steps, self.nothing if wanted is None else self.verdicts(wanted, steps, packets)


def _other(r: Random, before: Policy) -> Policy:
    """Another policy: nothing happens where a policy is in force already. Often one hook more or less is needed."""
    if r.random() < 0.4:
        return before._replace(strict=not before.strict)
    return next(one for one in iter(lambda: successor(r, before), None) if one != before)


def _needed(wanted: Policy | None) -> set[str]:
    return set() if wanted is None else set(abi.needed_hooks(wanted.strict))


def _while_hooks_move(steps: Steps, before: Verdicts, after: Verdicts) -> Timeline:
    """Hook after hook goes over to the new maps: until the last one did, a run is judged by either policy."""
    moves = [number for number, one in enumerate(steps.operations, 1) if isinstance(one, HookChange)]
    return Timeline(before, (moves[-1], after), overlap=moves[-1] - moves[0])


@contextmanager
def commands(machines: Sequence[Machine]) -> Iterator[Commands]:
    """The commands for two machines. What stands for bpffs is a temporary folder; hooks are compiled once."""
    once = functools.cache(program.compile_hooks)
    compiled = mock.patch.object(program, "compile_hooks", lambda names, defines: once(tuple(names), defines))
    with tempfile.TemporaryDirectory() as bpffs, compiled:
        calls = CommandCalls(machines[0], _CGROUP, bpffs)
        cgroup = Cgroup(os.open(bpffs, os.O_RDONLY), _CGROUP, "/a/cgroup")
        with cgroup, calls.in_place():
            yield Commands(machines, calls, Target(cgroup, Folder(bpffs, "imds_guard"), ()))
