# SPDX-License-Identifier: Apache-2.0
"""Every row of the table, as real connects, on every backend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from imds_guard.policy.decide import Reason
from tests.conformance.attempts import CONNECTED
from tests.conformance.bench import Bench, apply_or_skip, judged, serve_table, skip_without, sorted_by_policy
from tests.conformance.cases import CASES
from tests.conformance.differences import expected_verdict
from tests.conformance.enforcers import ENFORCERS, Enforcer
from tests.conformance.model import Case
from tests.conformance.perform import perform


@pytest.fixture(scope="module")
def bench(backend_name: str, enforcer: Enforcer) -> Iterator[Bench]:
    """The backend, with a sandbox that consecutive rows share."""
    one = Bench(backend_name, enforcer)
    yield one
    one.close()


@pytest.mark.parametrize("case", sorted_by_policy(CASES), ids=lambda case: case.id)
def test_row(case: Case, bench: Bench, lacking: dict[str, str | None]) -> None:
    """The kernel judges the row as the table says, for the reason that the table says. The policy reads back."""
    check_row(case, bench, lacking)


def check_row(case: Case, bench: Bench, lacking: dict[str, str | None]) -> None:
    """Asserts the verdict and the reason of one row. Skips the row when this kernel lacks a feature."""
    skip_without(case, lacking)
    with bench.under(case.policy) as sandbox:
        assert bench.judged(sandbox, case) == expected_verdict(case, bench.backend_name)
        assert bench.enforcer.reasons() in (None, {case.expected} - {Reason.NOT_LOCKED})


# Each of them is denied. Each policy is of a different kind.
_DENIED = [
    case
    for case in CASES
    if case.id
    in (
        "uid-not-listed/ipv4",
        "uid-not-listed/ipv6",
        "group-below-all-of-64/mapped",
        "denied-supplementary-gid/ipv4",
        "three-deep-middle-port-outer-user/ipv6",
        "unspecified-bound-to-locked/ipv4",
        "udp-sendto-denied/ipv4",
    )
]


@pytest.mark.parametrize("case", _DENIED, ids=lambda case: case.id)
def test_remove(case: Case, backend_name: str, tmp_path: Path) -> None:
    """After remove() a denied caller connects and no policy reads back. A second remove() is harmless."""
    with ENFORCERS[backend_name](tmp_path) as enforcer, enforcer.sandbox() as sandbox:
        apply_or_skip(enforcer, serve_table(sandbox), case.policy, backend_name)
        assert judged(enforcer, sandbox.call(lambda: perform(case))) == "denied"
        enforcer.remove(sandbox)
        assert enforcer.held(sandbox) == (None, [])
        assert sandbox.call(lambda: perform(case)) == CONNECTED
        enforcer.remove(sandbox)
        assert enforcer.held(sandbox) == (None, [])
