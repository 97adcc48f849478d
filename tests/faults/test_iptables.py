# SPDX-License-Identifier: Apache-2.0
"""The iptables backend while each of its programs and files fails in turn, checked by real connects."""

from __future__ import annotations

import os
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import pytest

from imds_guard.backends.iptables import IptablesBackend
from imds_guard.kernel.run import run
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.filters import Filter
from imds_guard.policy.model import Identities, Policy, make_policy
from tests.faults import trials
from tests.faults.callers import Callers
from tests.faults.trials import Before, Trial
from tests.kernel.guards import BOTH, IPV4, IPV6, NEW, NEW_POLICY, OLD, OLD_POLICY, PORT, STRANGER
from tests.kernel.rules_in_a_sandbox import KINDS, one_legacy_at_a_time
from tests.tools import need

EVERYONE = frozenset({OLD, NEW, BOTH, STRANGER})
PLACES = [(address, PORT) for address in (IPV4, IPV6)]
_TIMEOUT_S = 3600


def _seen(users: AbstractSet[int], read: Policy | None) -> Before:
    return Before((frozenset(users),) * len(PLACES), read)


NOTHING = _seen(EVERYONE, None)
UNDER_OLD = _seen({OLD, BOTH}, OLD_POLICY)
UNDER_NEW = _seen({NEW, BOTH}, NEW_POLICY)


FILTERED_POLICY = make_policy(
    NEW_POLICY.locks,
    filters=[Filter("one", (NEW_POLICY.locks[0].name,), Identities(frozenset((STRANGER,))), port=PORT)],
)
"""Nobody listens as the filter, so its caller is denied."""
UNDER_FILTERED = _seen({NEW, BOTH}, FILTERED_POLICY)


@dataclass
class Stage:
    """A sandbox with a backend and callers. All methods but ``inside`` must be called in the sandbox."""

    sandbox: Sandbox
    backend: IptablesBackend
    callers: Callers

    def inside(self, trial: Trial) -> None:
        """Runs a trial in the sandbox."""
        self.sandbox.call(lambda: trials.run(trial), timeout_s=_TIMEOUT_S)

    def look(self) -> Before:
        """The users that are allowed, and the policy that the backend reads from the rules."""
        return Before(self.callers.passing(), self.backend.read())

    def put(self, policy: Policy) -> Callable[[], object]:
        """A function that applies a policy, which must succeed without faults."""

        def put() -> None:
            self.backend.apply(policy)
            assert self.backend.faults() == []

        return put

    def stop(self) -> None:
        """Removes the guard. No rule of either family and no state file may be left."""
        self.backend.remove()
        for command in self.backend.commands.values():
            assert "IMDS" not in run([f"{command}-save"]).stdout
        assert "imds" not in run(["nft", "list", "tables"]).stdout
        assert self.backend.state_file.read() == ""
        assert os.listdir(self.backend.state_file.folder) == []


@pytest.fixture(params=sorted(KINDS))
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    kind: str = request.param
    if os.geteuid() != 0:
        pytest.skip("making network namespaces needs root")
    need(KINDS[kind][0])
    with one_legacy_at_a_time(kind), Sandbox((IPV4, IPV6)) as sandbox:
        sandbox.serve((IPV4, IPV6), (PORT,))
        with Callers(sandbox, sorted(EVERYONE), PLACES) as callers:
            backend = IptablesBackend(KINDS[kind], state_folder=str(tmp_path))
            backend.check(None)  # probes once, in its own namespace, for all commands below
            yield Stage(sandbox, backend, callers)


def test_the_first_start(stage: Stage) -> None:
    """After a failed start either nothing is locked, or the policy is in force in both families."""

    def repair() -> None:
        stage.stop()
        stage.put(NEW_POLICY)()

    stage.inside(Trial(stage.stop, lambda: stage.backend.apply(NEW_POLICY), stage.look, NOTHING, UNDER_NEW, repair, 8))


def test_a_change(stage: Stage) -> None:
    """After a failed change the old or the new policy is in force in both families."""
    put = stage.put
    stage.inside(
        Trial(
            put(OLD_POLICY),
            lambda: stage.backend.apply(NEW_POLICY),
            stage.look,
            UNDER_OLD,
            UNDER_NEW,
            put(NEW_POLICY),
            8,
        )
    )


def test_a_change_to_filters(stage: Stage) -> None:
    """Three tables and one file more. After a failed change the old or the new policy is in force."""
    put, apply = stage.put, lambda: stage.backend.apply(FILTERED_POLICY)
    stage.inside(Trial(put(OLD_POLICY), apply, stage.look, UNDER_OLD, UNDER_FILTERED, put(FILTERED_POLICY), 8))


def test_stop_with_filters(stage: Stage) -> None:
    """As test_stop()."""
    put, remove = stage.put(FILTERED_POLICY), stage.backend.remove
    stage.inside(Trial(put, remove, stage.look, UNDER_FILTERED, NOTHING, stage.stop, 6))


def test_stop(stage: Stage) -> None:
    """After a failed stop the policy is in force or nothing is locked. If only one family is open, stop says so."""
    trial = Trial(stage.put(OLD_POLICY), stage.backend.remove, stage.look, UNDER_OLD, NOTHING, stage.stop, 6)
    stage.inside(trial)


def test_a_rule_that_only_counts(stage: Stage) -> None:
    """A rule without match or target (``iptables -A OUTPUT``) is printed as the chain alone, and is no error."""

    def inside() -> None:
        for command in stage.backend.commands.values():
            assert run([command, "-A", "OUTPUT"]).status == 0
        stage.put(OLD_POLICY)()
        assert stage.look() == UNDER_OLD
        stage.stop()
        for command in stage.backend.commands.values():
            assert "-A OUTPUT" in run([f"{command}-save", "-t", "filter"]).stdout.splitlines()

    stage.sandbox.call(inside, timeout_s=_TIMEOUT_S)
