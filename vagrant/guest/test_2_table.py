# SPDX-License-Identifier: Apache-2.0
"""This row's share of the conformance table, at the root of cgroup2, under what the installed command has started.

tests/conformance/test_backends.py gives each case a sandbox of its own. An emulated processor takes two seconds for
that, and three more for a policy of the fallback: here a backend keeps one sandbox, and a policy is applied and read
back once for all cases that are about it. Every row of the matrix takes its share of the policies, so that the rows
together run them all on each backend. The cases, how they are brought about and what is expected are the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Callable

import pytest

from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.model import Policy, Reason
from tests.conformance.attempts import CONNECTED
from tests.conformance.cases import CASES
from tests.conformance.conftest import ready
from tests.conformance.differences import difference
from tests.conformance.enforcers import Enforcer, Iptables
from tests.conformance.model import Case, Setting
from tests.conformance.perform import perform
from tests.conformance.probes import PROBES
from vagrant.guest.at_root import AtRoot

ENFORCERS: dict[str, Callable[[Path], Enforcer]] = {"ebpf": AtRoot, "iptables": Iptables}
MANY_GROUPS = 1024
AT_ONCE = 18


def by_policy() -> list[list[Case]]:
    """The cases, those with the same policy together, in the order in which the policies first appear.

    A policy that most cases are about is there several times, so that no row has all of them.
    """
    together: dict[Policy, list[Case]] = {}
    for case in CASES:
        together.setdefault(case.policy, []).append(case)
    return [cases[at : at + AT_ONCE] for cases in together.values() for at in range(0, len(cases), AT_ONCE)]


def depends_on_the_kernel(case: Case) -> bool:
    """Kinds of task, ways to connect and lengths of group lists that kernels may treat in different ways."""
    kind = case.who.setting not in (Setting.PROCESS, Setting.CHILD) or len(case.who.groups) >= MANY_GROUPS
    return kind or bool(case.requires)


def sample(backend: str, place: int, of: int) -> list[Case]:
    """Policies ``place``, ``place + of``, ...; for eBPF also what depends on the kernel in one of six policies.

    Nearly every kernel has two rows or more. The fallback judges packets, whoever made them and how.
    """
    chosen = []
    for number, cases in enumerate(by_policy()):
        if number % of == place:
            chosen += cases
        elif backend == "ebpf" and number % 6 == place % 6:
            chosen += [case for case in cases if depends_on_the_kernel(case)]
    return chosen


def shares() -> list[tuple[str, Case]]:
    """IMDS_GUARD_SHARE is "BACKEND=PLACE/OF ..."."""
    found = []
    for word in os.environ["IMDS_GUARD_SHARE"].split():
        backend, _, share = word.partition("=")
        place, _, of = share.partition("/")
        found += [(backend, case) for case in sample(backend, int(place), int(of))]
    return found


class Bench:
    """One backend, its sandbox, and the policy that is in force there."""

    def __init__(self, name: str, enforcer: Enforcer, sandbox: Sandbox) -> None:
        self.name = name
        self.enforcer = enforcer
        self.sandbox = sandbox
        self._policy: Policy | None = None

    def lay_out(self, policy: Policy) -> None:
        """Puts a policy in force and reads it back, unless it was the last one."""
        if policy != self._policy:
            self._policy = None
            self.enforcer.apply(self.sandbox, policy)
            assert self.enforcer.held(self.sandbox) == (policy, [])
            self._policy = policy

    def judged(self, case: Case) -> str:
        """How the kernel judges a case: allowed, denied, or an outcome that is neither."""
        outcome = self.sandbox.call(lambda: perform(case))
        if outcome == CONNECTED:
            return "allowed"
        return "denied" if outcome in self.enforcer.refusals else outcome


@pytest.fixture(scope="session")
def bench(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The backend that runs, and a sandbox with listeners for all cases."""
    with ExitStack() as stack:
        enforcer = stack.enter_context(ENFORCERS[backend](tmp_path_factory.mktemp(backend)))
        sandbox = stack.enter_context(enforcer.sandbox())
        yield Bench(backend, enforcer, ready(sandbox))


@pytest.fixture(scope="session")
def lacking() -> dict[str, str | None]:
    """For each thing that a case may require: None, or the sentence that says why this kernel has it not."""
    with Sandbox() as fresh:
        return {name: fresh.call(probe) for name, probe in PROBES.items()}


@pytest.mark.parametrize(
    ("backend", "case"),
    shares(),
    ids=lambda value: value.id if isinstance(value, Case) else value,
    indirect=["backend"],
)
def test_row(case: Case, bench: Bench, lacking: dict[str, str | None]) -> None:
    """The kernel judges the case as the table says, for the reason that it says."""
    for need in case.requires:
        if lacking[need] is not None:
            pytest.skip(str(lacking[need]))
    bench.lay_out(case.policy)
    turned = difference(bench.name, case.id) is not None
    judged, reasons = bench.judged(case), bench.enforcer.reasons()
    assert judged == ("allowed" if case.allowed != turned else "denied")
    assert reasons in (None, {case.expected} - {Reason.NOT_LOCKED})
