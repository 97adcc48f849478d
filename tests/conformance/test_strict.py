# SPDX-License-Identifier: Apache-2.0
"""Rows of the table under a strict policy: who is let through has to be let through by the packets' hook, too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.model import Policy, Reason
from tests.conformance.attempts import CONNECTED
from tests.conformance.cases import CASES
from tests.conformance.conftest import apply_or_skip, ready
from tests.conformance.enforcers import Ebpf
from tests.conformance.model import Case
from tests.conformance.perform import perform

MPTCP = [case for case in CASES if case.attempt.form == "mptcp"]
ROWS = [case for case in CASES if case not in MPTCP][::4]
"""Every fourth: 4 shares no divisor with the three address families that take turns in the table."""


class StrictEbpf(Ebpf):
    """The same programs, every policy made strict."""

    def apply(self, sandbox: Sandbox, policy: Policy) -> None:
        """Enforcer.apply()."""
        super().apply(sandbox, policy._replace(strict=True))

    def held(self, sandbox: Sandbox) -> tuple[Policy | None, list[str]]:
        """Enforcer.held(), which has to be strict."""
        policy, faults = super().held(sandbox)
        if policy is not None and not policy.strict:
            faults = [*faults, "it is not strict"]
        return policy and policy._replace(strict=False), faults


@pytest.fixture(scope="module")
def strict(as_root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StrictEbpf]:
    enforcer = StrictEbpf(tmp_path_factory.mktemp("strict"))
    with enforcer:
        yield enforcer


@pytest.fixture
def strict_sandbox(strict: StrictEbpf) -> Iterator[Sandbox]:
    with strict.sandbox() as fresh:
        yield ready(fresh)


def skip_without(case: Case, lacking: dict[str, str | None]) -> None:
    for need in case.requires:
        if lacking[need] is not None:
            pytest.skip(str(lacking[need]))


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.id)
def test_row(case: Case, strict: StrictEbpf, strict_sandbox: Sandbox, lacking: dict[str, str | None]) -> None:
    """Strict changes nothing for connects: the same rows, the same outcomes, the same reasons, nothing dropped."""
    skip_without(case, lacking)
    apply_or_skip(strict, strict_sandbox, case.policy, "ebpf")
    outcome = strict_sandbox.call(lambda: perform(case))
    assert outcome == (CONNECTED if case.allowed else "EPERM")
    assert strict.reasons() == {case.expected} - {Reason.NOT_LOCKED}
    assert strict.held(strict_sandbox) == (case.policy, [])


@pytest.mark.parametrize("case", MPTCP, ids=lambda case: case.id)
def test_mptcp_is_let_through_or_denied_at_once(
    case: Case, strict: StrictEbpf, strict_sandbox: Sandbox, lacking: dict[str, str | None]
) -> None:
    """Where the hook sees the socket that sends the packets, it is marked. Where it sees the one above it, whose
    packets nobody could tell from others, the connect is EPERM, and does not hang.
    """
    skip_without(case, lacking)
    apply_or_skip(strict, strict_sandbox, case.policy, "ebpf")
    outcome = strict_sandbox.call(lambda: perform(case))
    judged = {case.expected} - {Reason.NOT_LOCKED}
    if case.expected.permits and outcome != CONNECTED:
        assert (outcome, strict.reasons()) == ("EPERM", {Reason.UNAPPROVED_SOCKET})
    else:
        assert (outcome == CONNECTED, strict.reasons()) == (case.allowed, judged)
