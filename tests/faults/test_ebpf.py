# SPDX-License-Identifier: Apache-2.0
"""The eBPF backend while each of its system calls fails in turn, checked by real connects."""

from __future__ import annotations

import os
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Callable

import pytest

from imds_guard.backends.ebpf import EbpfBackend
from imds_guard.commands import change as changes
from imds_guard.commands import guard as commands
from imds_guard.commands.options import GuardOptions
from imds_guard.policy.model import Identities, Policy
from tests.faults import trials
from tests.faults.callers import Callers
from tests.faults.trials import Before, Trial
from tests.kernel import guards
from tests.kernel.guards import BOTH, IPV4, IPV6, MAPPED, NEW, NEW_POLICY, OLD, OLD_POLICY, PORT, STRANGER

EVERYONE = frozenset({OLD, NEW, BOTH, STRANGER})
PLACES = [(address, PORT) for address in (IPV4, IPV6, MAPPED)]


def _seen(users: AbstractSet[int], read: Policy | None) -> Before:
    return Before((frozenset(users),) * len(PLACES), read)


NOTHING = _seen(EVERYONE, None)
UNDER_OLD = _seen({OLD, BOTH}, OLD_POLICY)
UNDER_NEW = _seen({NEW, BOTH}, NEW_POLICY)


@dataclass
class Stage:
    """A sandbox with a backend and callers."""

    cgroup: str
    backend: EbpfBackend
    callers: Callers

    def look(self) -> Before:
        """The users that are allowed, and the policy that the backend reads."""
        return Before(self.callers.passing(), self.backend.read())

    def restart(self) -> None:
        """Applies the new policy, which must succeed without faults."""
        self.backend.apply(NEW_POLICY)
        assert self.backend.faults() == []

    def stop(self) -> None:
        """Removes the guard. Nothing may be left."""
        self.backend.remove()
        assert guards.traces(self.cgroup) == {"attached": 0, "pins": 0}


@pytest.fixture
def stage() -> Iterator[Stage]:
    if os.geteuid() != 0:
        pytest.skip("attaching programs needs root")
    with guards.guarded_sandbox(guards.FAST) as (sandbox, backend):
        with Callers(sandbox, (OLD, NEW, BOTH, STRANGER), PLACES) as callers:
            backend.apply(OLD_POLICY)  # compiles the programs; compile_functions() caches them
            backend.remove()
            yield Stage(sandbox.cgroup, backend, callers)
            backend.remove()
        assert guards.traces(sandbox.cgroup) == {"attached": 0, "pins": 0}


def test_the_first_start(stage: Stage) -> None:
    """After a failed start either nothing is locked, or the policy is in force."""
    backend = stage.backend

    def repair() -> None:
        stage.stop()
        stage.restart()

    trials.run(Trial(stage.stop, lambda: backend.apply(NEW_POLICY), stage.look, NOTHING, UNDER_NEW, repair, 80))


def test_a_change(stage: Stage) -> None:
    """After a failed change the old or the new policy is in force."""
    backend = stage.backend
    backend.apply(OLD_POLICY)
    trials.run(
        Trial(
            lambda: backend.apply(OLD_POLICY),
            lambda: backend.change(NEW_POLICY),
            stage.look,
            UNDER_OLD,
            UNDER_NEW,
            stage.restart,
            40,
        )
    )
    stage.stop()


def test_stop(stage: Stage) -> None:
    """After a failed stop the policy is in force or nothing is locked. The next stop leaves nothing."""
    backend = stage.backend

    trials.run(Trial(lambda: backend.apply(OLD_POLICY), backend.remove, stage.look, UNDER_OLD, NOTHING, stage.stop, 30))


@pytest.mark.parametrize("verb", ["allow", "revoke"])
def test_allow_and_revoke(stage: Stage, verb: str) -> None:
    """allow and revoke of one user, as commands: with the lock of commands, and with reading what is in force."""
    with_new = _seen({OLD, NEW, BOTH}, guards.policy(OLD, NEW, BOTH))
    before, after = (UNDER_OLD, with_new) if verb == "allow" else (with_new, UNDER_OLD)
    change = changes.allow if verb == "allow" else changes.revoke

    def command() -> object:
        return change(Identities(frozenset({NEW})), None, GuardOptions(cgroup=stage.cgroup), lambda _: None)

    def put(policy: object) -> Callable[[], object]:
        assert isinstance(policy, Policy)
        return lambda: stage.backend.apply(policy)

    trials.run(Trial(put(before.read), command, stage.look, before, after, put(after.read), 60))
    stage.stop()


def test_an_upgrade_of_the_programs(stage: Stage) -> None:
    """A failed upgrade leaves hooks of both versions on the same maps, and the old or the new policy in force."""
    newer = EbpfBackend(stage.cgroup, (*guards.FAST, ("IG_ANOTHER_VERSION", 1)))
    newer.apply(OLD_POLICY)  # compiles the programs

    def repair() -> None:
        newer.apply(NEW_POLICY)
        assert newer.faults() == []

    trials.run(
        Trial(
            lambda: stage.backend.apply(OLD_POLICY),
            lambda: newer.apply(NEW_POLICY),
            stage.look,
            UNDER_OLD,
            UNDER_NEW,
            repair,
            60,
        )
    )
    stage.stop()


def test_a_change_of_layout(stage: Stage) -> None:
    """Hooks move one by one to new maps with the new policy. If one can't, all move back to the old maps."""
    missing: list[str] = []

    def spoil() -> None:
        stage.backend.remove()
        stage.backend.apply(OLD_POLICY)
        os.unlink(missing[0])

    def look() -> Before:
        """The users that are allowed. No policy can be read, since the pin of a map is missing."""
        return Before(stage.callers.passing(), None)

    stage.backend.apply(OLD_POLICY)
    missing.append(os.path.join(guards.folder_of(stage.cgroup).path, "locks"))
    old, new = Before(UNDER_OLD.passing, None), Before(UNDER_NEW.passing, None)
    trials.run(Trial(spoil, lambda: stage.backend.apply(NEW_POLICY), look, old, new, stage.restart, 100))
    assert stage.look() == UNDER_NEW
    stage.stop()


def test_a_start_and_a_stop_as_commands(stage: Stage) -> None:
    """start as a command: with the lock of commands, the choice of a backend, and the check for other guards."""
    place = GuardOptions("ebpf", stage.cgroup)

    def start(policy: Policy) -> object:
        return commands.start(policy, place, lambda _: None)

    def put(policy: Policy) -> Callable[[], object]:
        return lambda: start(policy)

    start(OLD_POLICY)
    try:
        trials.run(Trial(put(OLD_POLICY), put(NEW_POLICY), stage.look, UNDER_OLD, UNDER_NEW, put(NEW_POLICY), 40))
    finally:
        commands.stop(stage.cgroup)
