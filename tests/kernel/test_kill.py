# SPDX-License-Identifier: Apache-2.0
"""kill -9 at each step of each command leaves the old or the new policy in force, and the next command repairs.

A step is a bpf(2) call, or a change to the tree of pins. The command runs in a forked child that kills itself before
its n-th step, for n from 1 until the command reaches its end.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from typing import Callable

import pytest

from imds_guard.backends.ebpf import EbpfBackend
from imds_guard.kernel import bpf
from imds_guard.kernel.bpf import syscall
from imds_guard.kernel.sandbox import Sandbox
from tests.kernel import guards
from tests.kernel.guards import BOTH, NEW, NEW_POLICY, OLD, OLD_POLICY, STRANGER

EVERYONE = frozenset({OLD, NEW, BOTH, STRANGER})
UNDER_OLD, UNDER_NEW = frozenset({OLD, BOTH}), frozenset({NEW, BOTH})

_TREE_EVENTS = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir"})
_MOST_STEPS = 500


@pytest.fixture
def guarded() -> Iterator[tuple[Sandbox, EbpfBackend]]:
    if os.geteuid() != 0:
        pytest.skip("attaching programs needs root")
    with guards.guarded_sandbox(guards.FAST) as pair:
        yield pair


def _killed_at(step: int, command: Callable[[], object]) -> bool:
    """Runs a command in a child that kills itself before that step; False when the command ended earlier."""
    pid = os.fork()
    if pid == 0:
        try:
            _die_at(step)
            command()
        except BaseException as error:  # noqa: BLE001  (the child has no other way to tell)
            os.write(2, f"step {step}: {error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"the command failed at step {step}"
    return os.WIFSIGNALED(status)


def _die_at(step: int) -> None:
    left = [step]

    def count() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    door = syscall.invoke

    def counting_door(command: int, attr: bytes) -> tuple[int, int, bytes]:
        count()
        return door(command, attr)

    syscall.invoke = counting_door
    sys.addaudithook(lambda event, _: count() if event in _TREE_EVENTS else None)


def _kill_at_each_step(
    prepare: Callable[[], object], command: Callable[[], object], look: Callable[[int], None]
) -> int:
    """Kills the command before each step in turn; returns the number of steps."""
    for step in range(1, _MOST_STEPS):
        prepare()
        if not _killed_at(step, command):
            return step - 1
        look(step)
    raise AssertionError(f"the command has more than {_MOST_STEPS} steps")


def _expect(sandbox: Sandbox, step: int, *whole: frozenset[int]) -> None:
    seen = guards.passing(sandbox)
    assert seen in whole, f"killed before step {step}: {set(seen)} connect"


def test_kill_during_a_change_of_policy(guarded: tuple[Sandbox, EbpfBackend]) -> None:
    """The old or the new policy holds at every step, and the next change works."""
    sandbox, backend = guarded

    def look(step: int) -> None:
        _expect(sandbox, step, UNDER_OLD, UNDER_NEW)
        backend.apply(NEW_POLICY)
        assert (backend.read(), backend.faults()) == (NEW_POLICY, [])
        _expect(sandbox, step, UNDER_NEW)

    steps = _kill_at_each_step(lambda: backend.apply(OLD_POLICY), lambda: backend.change(NEW_POLICY), look)
    assert steps > 30


def test_kill_during_start(guarded: tuple[Sandbox, EbpfBackend]) -> None:
    """Nothing or the policy holds; then start works, and stop leaves nothing."""
    sandbox, backend = guarded
    backend.apply(OLD_POLICY)  # so that each child has the compiled program

    def look(step: int) -> None:
        _expect(sandbox, step, EVERYONE, UNDER_OLD)
        if step % 2:
            backend.apply(OLD_POLICY)
            assert (backend.read(), backend.faults()) == (OLD_POLICY, [])
            _expect(sandbox, step, UNDER_OLD)
        backend.remove()
        assert guards.traces(sandbox.cgroup) == {"attached": 0, "pins": 0}

    steps = _kill_at_each_step(backend.remove, lambda: backend.apply(OLD_POLICY), look)
    assert steps > 50


def test_kill_during_stop(guarded: tuple[Sandbox, EbpfBackend]) -> None:
    """The policy or nothing holds; then stop completes."""
    sandbox, backend = guarded

    def look(step: int) -> None:
        _expect(sandbox, step, EVERYONE, UNDER_OLD)
        backend.remove()
        assert guards.traces(sandbox.cgroup) == {"attached": 0, "pins": 0}
        _expect(sandbox, step, EVERYONE)

    steps = _kill_at_each_step(lambda: backend.apply(OLD_POLICY), backend.remove, look)
    assert steps > 20


def test_kill_during_an_upgrade(guarded: tuple[Sandbox, EbpfBackend]) -> None:
    """New and old hooks use the same maps: the policy holds at every step, and so does a changed one."""
    sandbox, backend = guarded
    other = EbpfBackend(sandbox.cgroup, defines=(*guards.FAST, ("IG_ANOTHER_VERSION", 1)))
    other.apply(OLD_POLICY)

    def look(step: int) -> None:
        _expect(sandbox, step, UNDER_OLD, UNDER_NEW)
        if step % 4:
            return
        other.apply(NEW_POLICY)
        assert (other.read(), other.faults()) == (NEW_POLICY, [])

    steps = _kill_at_each_step(lambda: backend.apply(OLD_POLICY), lambda: other.apply(NEW_POLICY), look)
    assert steps > 50


def test_kill_during_a_change_of_layout(guarded: tuple[Sandbox, EbpfBackend]) -> None:
    """The hooks move to new maps one by one; the policy holds at every step."""
    from imds_guard.backends.ebpf import abi
    from imds_guard.backends.ebpf.abi import Map

    sandbox, backend = guarded
    shape = abi.SHAPES[Map.LOCKS]

    def install_old_layout() -> None:
        backend.remove()
        abi.SHAPES[Map.LOCKS] = bpf.MapShape(shape.type, shape.key_size, shape.value_size, 64, shape.flags)
        try:
            backend.apply(OLD_POLICY)
        finally:
            abi.SHAPES[Map.LOCKS] = shape

    def look(step: int) -> None:
        if step % 4:
            return
        _expect(sandbox, step, UNDER_OLD)
        backend.apply(OLD_POLICY)
        assert (backend.read(), backend.faults()) == (OLD_POLICY, [])
        _expect(sandbox, step, UNDER_OLD)

    steps = _kill_at_each_step(install_old_layout, lambda: backend.apply(OLD_POLICY), look)
    assert steps > 50
