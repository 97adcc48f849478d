# SPDX-License-Identifier: Apache-2.0
"""The eBPF backend, with each of its calls to the system failing in turn, as real connects see it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Callable, FrozenSet, Iterator, Optional

import pytest

from imds_guard import actions
from imds_guard.backends.ebpf import EbpfBackend, abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.kernel import bpf
from imds_guard.policy import Identities, Policy
from tests.faults import trials
from tests.faults.callers import Callers
from tests.faults.trials import Before, Trial
from tests.kernel import guards
from tests.kernel.guards import BOTH, IPV4, IPV6, MAPPED, NEW, NEW_POLICY, OLD, OLD_POLICY, PORT, STRANGER

EVERYONE = frozenset({OLD, NEW, BOTH, STRANGER})
NOTHING = Before(EVERYONE, None)
UNDER_OLD = Before(frozenset({OLD, BOTH}), OLD_POLICY)
UNDER_NEW = Before(frozenset({NEW, BOTH}), NEW_POLICY)


@dataclass
class Stage:
    """A sandbox with a backend, and callers in it."""

    cgroup: str
    backend: EbpfBackend
    callers: Callers

    def look(self) -> Before:
        """Who gets through, and what the backend reads."""
        return Before(self.callers.passing(), self.backend.read())

    def restart(self) -> None:
        """The next command, and whether it leaves nothing when it is stopped."""
        self.backend.apply(NEW_POLICY)
        assert self.backend.faults() == []

    def stop(self) -> None:
        """Stops it; nothing is left."""
        self.backend.remove()
        assert guards.traces(self.cgroup) == {"attached": 0, "pins": 0}


@pytest.fixture
def stage() -> Iterator[Stage]:
    if os.geteuid() != 0:
        pytest.skip("attaching programs needs root")
    places = [(address, PORT) for address in (IPV4, IPV6, MAPPED)]
    with guards.guarded_sandbox(guards.FAST) as (sandbox, backend):
        with Callers(sandbox, (OLD, NEW, BOTH, STRANGER), places) as callers:
            backend.apply(OLD_POLICY)  # so that the programs are compiled: compile_functions() keeps them
            backend.remove()
            yield Stage(sandbox.cgroup, backend, callers)
            backend.remove()
        assert guards.traces(sandbox.cgroup) == {"attached": 0, "pins": 0}


def test_the_first_start(stage: Stage) -> None:
    """Nothing is locked, or the policy is in force; nothing else."""
    backend = stage.backend

    def repair() -> None:
        stage.stop()
        stage.restart()

    trials.run(Trial(stage.stop, lambda: backend.apply(NEW_POLICY), stage.look, NOTHING, UNDER_NEW, repair, 80))


def test_a_change(stage: Stage) -> None:
    """Old or new."""
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
