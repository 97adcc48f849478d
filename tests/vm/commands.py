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
from tests.vm.timeline import EVER, Timeline, Verdicts, flip_of

_CGROUP = 4711


class Commands(Moments):
    """start, change, replacement of the maps, and stop, with one guard. The machines have the maps of one each."""

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
        """start, a change, a change that replaces maps which are too small, and stop. One of them may be killed."""
        r = self.r = Random(f"commands {seed}")
        first = policy(r)
        second, third = _other(r, first), policy(r)
        self._kernel.machine, later, _ = self.machines
        self._kernel.links.clear()
        self.begin(seed, [first, second, third])
        killed = r.choice((None, None, "change", "replacement", "stop"))
        install, started = self._record(lambda: changes.install(self._target, first), first)
        self.replay("start", install, Timeline(self.nothing, (flip_of(install), started)))
        if killed == "change":
            return self._kill(lambda: self._apply(second), second, started, third)
        change, changed = self._record(lambda: self._apply(second), second)
        self.replay("change", change, Timeline(started, (flip_of(change), changed)))
        self._kernel.machine = later
        if killed == "stop":
            return self._kill(self._stop, None, changed, third)
        self._kernel.shrink(Map.MEMBERS)
        if killed == "replacement":
            return self._kill(lambda: self._apply(third), third, changed, first)
        marks = self._kernel.object_of("connect4", Map.MARKS)
        larger, moved = self._record(lambda: self._apply(third), third)
        assert self._kernel.object_of("connect4", Map.MARKS) is marks, "marks are kept, or every connection is cut"
        begin, end = _moves(larger)[0], _moves(larger)[-1]
        self.replay("replacement", larger, Timeline.of([(0, end, changed), (begin, EVER, moved)]))
        return self._end(moved)

    def _end(self, before: Verdicts) -> None:
        stop, stopped = self._record(self._stop, None)
        self.replay("stop", stop, Timeline(before, (flip_of(stop), stopped)))
        assert set(self._kernel.hooks.values()) == {None}

    def _kill(self, command: Callable[[], object], wanted: Policy | None, before: Verdicts, then: Policy) -> None:
        """A command is killed after some operation. The next one makes good what it left."""
        marks = self._kernel.object_of("connect4", Map.MARKS)
        with self.undone():
            self._kernel.kill_after_flip = self.r.random() < 0.6
            most = 7 if self._kernel.kill_after_flip else self.r.choice((5, 20, 60, 150))
            self._kernel.kill_after = self.r.randint(1, most)
            killed = self._kernel.record(command)
            self._kernel.machine = self.machines[-1]
            following = self._kernel.record(lambda: self._apply(then))
            packets = self.packets(strict=then.strict)
        left = self.nothing
        if wanted is not None and killed.on(Map.CONFIG):
            left = self.verdicts(wanted, killed, None)
        if self._kernel.object_of("connect4", Map.MARKS) is not marks:
            self.serials.clear()  # there are no marks from before
        after = self.verdicts(then, following, packets)
        done = len(killed.operations)
        flip = done + flip_of(following)
        last = max(flip, *(done + number for number in _moves(following)), 0)
        waits = [wait for wait in killed.waits if wait < done] + [done + wait for wait in following.waits]
        windows = [(0, last, before), (flip, EVER, after)]
        if killed.on(Map.CONFIG):
            windows.append((flip_of(killed), last, left))
        steps = Steps(killed.operations + following.operations, tuple(waits))
        self.replay("a kill, and a start", steps, Timeline.of(windows))
        self._end(after)

    def _apply(self, wanted: Policy) -> None:
        """As EbpfBackend.apply() does."""
        folder = self._target.folder
        folder.recover()
        if folder.exists():
            changes.change_running(self._target, wanted, keep_version=False)
        else:
            changes.install(self._target, wanted)

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
    return set() if wanted is None else set(abi.needed_hooks(wanted))


def _moves(steps: Steps) -> list[int]:
    """After how many operations a hook runs on other maps, or on none."""
    return [number for number, one in enumerate(steps.operations, 1) if isinstance(one, HookChange)]


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
