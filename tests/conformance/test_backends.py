# SPDX-License-Identifier: Apache-2.0
"""Every row of the table, for real, on every backend."""

from __future__ import annotations

from pathlib import Path

import pytest

from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.model import Reason
from tests.conformance.attempts import CONNECTED
from tests.conformance.cases import CASES
from tests.conformance.conftest import apply_or_skip, ready
from tests.conformance.differences import difference
from tests.conformance.enforcers import ENFORCERS, Enforcer
from tests.conformance.model import Case
from tests.conformance.perform import perform


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_row(
    case: Case, backend_name: str, enforcer: Enforcer, sandbox: Sandbox, lacking: dict[str, str | None]
) -> None:
    """The kernel judges the row as the table says, for the reason that it says, and the policy reads back."""
    check_row(case, backend_name, enforcer, sandbox, lacking)


def check_row(
    case: Case, backend_name: str, enforcer: Enforcer, sandbox: Sandbox, lacking: dict[str, str | None]
) -> None:
    """Skips what this kernel can't bring about."""
    for need in case.requires:
        if lacking[need] is not None:
            pytest.skip(str(lacking[need]))
    apply_or_skip(enforcer, sandbox, case.policy, backend_name)
    outcome = sandbox.call(lambda: perform(case))
    assert _judged(enforcer, outcome) == _expected(case, backend_name)
    assert enforcer.reasons() in (None, {case.expected} - {Reason.NOT_LOCKED})
    assert enforcer.held(sandbox) == (case.policy, [])


# Each of them is denied, and each policy is of another kind.
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
    """What was denied connects after remove(), nothing reads back, and a second remove() is harmless."""
    with ENFORCERS[backend_name](tmp_path) as enforcer, enforcer.sandbox() as sandbox:
        apply_or_skip(enforcer, ready(sandbox), case.policy, backend_name)
        assert _judged(enforcer, sandbox.call(lambda: perform(case))) == "denied"
        enforcer.remove(sandbox)
        assert enforcer.held(sandbox) == (None, [])
        assert sandbox.call(lambda: perform(case)) == CONNECTED
        enforcer.remove(sandbox)
        assert enforcer.held(sandbox) == (None, [])


def _judged(enforcer: Enforcer, outcome: str) -> str:
    """``allowed``, ``denied``, or the outcome as it is when it is neither."""
    if outcome == CONNECTED:
        return "allowed"
    return "denied" if outcome in enforcer.refusals else outcome


def _expected(case: Case, backend_name: str) -> str:
    turned = difference(backend_name, case.id) is not None
    return "allowed" if case.allowed != turned else "denied"
