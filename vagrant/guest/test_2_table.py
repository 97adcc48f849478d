# SPDX-License-Identifier: Apache-2.0
"""This row's share of the conformance table, at the root of cgroup2, under what the installed command has started.

tests/conformance/test_backends.py gives each policy a new sandbox. An emulated processor takes two seconds for one, so
here a backend keeps one sandbox for all policies. Every row of the matrix takes its share of the policies, so that the
rows together run them all on each backend. The cases, the code that performs them and the expectations are the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Callable

import pytest

from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.decide import Reason
from tests.conformance.bench import Bench, by_policy, skip_without
from tests.conformance.cases import CASES
from tests.conformance.cases_filter import ON_EVERY_KERNEL
from tests.conformance.differences import expected_verdict
from tests.conformance.enforcers import Enforcer, Iptables
from tests.conformance.model import Case, Setting
from tests.conformance.probes import PROBES
from vagrant.guest.at_root import AtRoot

ENFORCERS: dict[str, Callable[[Path], Enforcer]] = {"ebpf": AtRoot, "iptables": Iptables}
MANY_GROUPS = 1024
AT_ONCE = 18


def portions() -> list[list[Case]]:
    """Lists of cases that share a policy, in the order in which the policies first appear.

    A policy of many cases has several lists, so that no row gets all of them.
    """
    return [cases[at : at + AT_ONCE] for cases in by_policy(CASES) for at in range(0, len(cases), AT_ONCE)]


def depends_on_the_kernel(case: Case) -> bool:
    """Kinds of task, ways to connect and lengths of group lists that kernels may treat in different ways."""
    kind = case.who.setting not in (Setting.PROCESS, Setting.CHILD) or len(case.who.groups) >= MANY_GROUPS
    return kind or bool(case.requires)


def sample(backend: str, place: int, of: int) -> list[Case]:
    """Policies ``place``, ``place + of``, ...; for eBPF also what depends on the kernel in one of six policies.

    Nearly every kernel has two rows or more. The fallback judges packets, whoever made them and how. Connects that are
    redirected to a filter depend on the kernel most of all.
    """
    chosen = []
    for number, cases in enumerate(portions()):
        if number % of == place:
            chosen += cases
        elif backend == "ebpf":
            some = number % 6 == place % 6
            chosen += [c for c in cases if c in ON_EVERY_KERNEL or (some and depends_on_the_kernel(c))]
    return chosen


def shares() -> list[tuple[str, Case]]:
    """IMDS_GUARD_SHARE is "BACKEND=PLACE/OF ..."."""
    found = []
    for word in os.environ["IMDS_GUARD_SHARE"].split():
        backend, _, share = word.partition("=")
        place, _, of = share.partition("/")
        found += [(backend, case) for case in sample(backend, int(place), int(of))]
    return found


@pytest.fixture(scope="session")
def bench(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The backend that runs, and a sandbox with listeners for all cases."""
    with ExitStack() as stack:
        enforcer = stack.enter_context(ENFORCERS[backend](tmp_path_factory.mktemp(backend)))
        one = Bench(backend, enforcer, one_sandbox=True)
        stack.callback(one.close)
        yield one


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
    skip_without(case, lacking)
    with bench.under(case.policy) as sandbox:
        assert bench.judged(sandbox, case) == expected_verdict(case, bench.backend_name)
        assert bench.enforcer.reasons() in (None, {case.expected} - {Reason.NOT_LOCKED})
