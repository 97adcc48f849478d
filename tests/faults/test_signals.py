# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM before each system call of a command: old or new policy, one sentence, status 130 or 143.

tests/kernel/test_kill.py does the same with SIGKILL. Each command runs main() in a forked child, which inherits the
compiled programs.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from imds_guard.cli import main
from imds_guard.kernel import children
from imds_guard.policy.model import Policy
from tests.faults import injector, trials
from tests.faults.callers import Callers
from tests.faults.injector import Fault
from tests.kernel import guards
from tests.kernel.guards import BOTH, IPV4, IPV6, MAPPED, NEW, NEW_POLICY, OLD, OLD_POLICY, PORT, STRANGER

PLACES = [(address, PORT) for address in (IPV4, IPV6, MAPPED)]
UNDER_OLD, UNDER_NEW = frozenset({OLD, BOTH}), frozenset({NEW, BOTH})
EVERYONE = frozenset({OLD, NEW, BOTH, STRANGER})
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
SAMPLES = 12


@dataclass
class Stage:
    """A guard, commands for its cgroup, and callers."""

    cgroup: str
    callers: Callers

    def arguments(self, command: str, *more: str) -> list[str]:
        """The arguments of a command for this cgroup."""
        return [command, "--cgroup", self.cgroup, *more]

    def start(self, policy: Policy) -> list[str]:
        """The arguments of the start command for a policy."""
        users = sorted(policy.locks[0].allow.users)
        who = [argument for user in users for argument in ("--user", str(user))]
        return self.arguments("start", *who, "--ip", f"{IPV4}:80,tcp", "--ip", f"[{IPV6}]:80,tcp")

    def run(self, arguments: list[str], fault: Fault) -> tuple[int, str, int]:
        """The exit status of a command in a child, its stderr, and the number of calls that it made."""
        errors, theirs = os.pipe()
        counts, count = os.pipe()

        def inside() -> None:
            sys.stdout, sys.stderr = open(os.devnull, "w"), open(theirs, "w", buffering=1)  # noqa: SIM115
            fault.owner = os.getpid()
            # A shell starts background processes with SIGINT ignored, and their children inherit that.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                with injector.planted(fault):
                    main(arguments)
            finally:
                os.write(count, str(len(fault.calls)).encode())

        pid = children.fork(inside, _exit_as_asked)
        os.close(theirs)
        os.close(count)
        with os.fdopen(errors, encoding="utf-8") as said, os.fdopen(counts) as made:
            text, calls = said.read(), int(made.read() or "0")
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text, calls


def _exit_as_asked(error: BaseException) -> None:
    assert isinstance(error, SystemExit), error
    os._exit(int(error.code or 0))


@pytest.fixture
def stage() -> Iterator[Stage]:
    if os.geteuid() != 0:
        pytest.skip("attaching programs needs root")
    with guards.guarded_sandbox() as (sandbox, backend), Callers(sandbox, sorted(EVERYONE), PLACES) as callers:
        backend.apply(OLD_POLICY)  # compiles the programs for all children
        yield Stage(sandbox.cgroup, callers)


@pytest.mark.parametrize("which", sorted(STATUS))
@pytest.mark.parametrize("command", ["start", "allow", "stop"])
def test_a_signal_in_front_of_a_call(stage: Stage, command: str, which: signal.Signals) -> None:
    """The old or the new policy is in force as a whole. The command says so and exits with 128 + the signal number."""
    arguments, new = {
        "start": (stage.start(NEW_POLICY), UNDER_NEW),
        "allow": (stage.arguments("allow", "--user", str(NEW)), UNDER_OLD | {NEW}),
        "stop": (stage.arguments("stop"), EVERYONE),
    }[command]
    again, under = stage.start(OLD_POLICY), UNDER_OLD
    status, said, calls = stage.run(arguments, Fault())
    assert (status, stage.callers.passing()) == (0, (new,) * 3), said
    assert calls > 40
    step = 1 if trials.FULL else max(1, calls // SAMPLES)
    for number in range(1, calls + 1, step):
        assert stage.run(again, Fault())[0] == 0
        assert stage.callers.passing() == (under,) * 3
        status, said, made = stage.run(arguments, Fault(first=number, instead=lambda: os.kill(os.getpid(), which)))
        if made < number:  # a shorter run: calls that list all programs of the machine depend on other tests
            assert number > calls // 2
            break
        lines = [line for line in said.splitlines() if line and not line.startswith("warning: ")]
        assert (status, len(lines)) == (STATUS[which], 1), (number, said)
        assert lines[0].startswith(f"imds-guard: interrupted by {which.name}: "), lines
        seen = stage.callers.passing()
        assert all(there in (under, new) for there in seen), (number, seen)
    assert stage.run(stage.arguments("stop"), Fault())[0] == 0
    assert guards.traces(stage.cgroup) == {"attached": 0, "pins": 0}
