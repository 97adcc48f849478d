# SPDX-License-Identifier: Apache-2.0
"""Rows of the table under a strict policy, where the packets of allowed callers must pass the egress hook, too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.decide import Reason
from imds_guard.policy.model import Policy
from tests.conformance.bench import Bench, skip_without, sorted_by_policy
from tests.conformance.cases import CASES
from tests.conformance.differences import expected_verdict
from tests.conformance.enforcers import Ebpf
from tests.conformance.model import Case

MPTCP = [case for case in CASES if case.attempt.form == "mptcp"]
ROWS = [case for case in CASES if case not in MPTCP][::4]
"""Every fourth row. Families take turns in the table, and 3 and 4 have no common divisor, so all families are here."""


class StrictEbpf(Ebpf):
    """The eBPF backend, with every policy made strict."""

    def apply(self, sandbox: Sandbox, policy: Policy) -> None:
        """Enforcer.apply()."""
        super().apply(sandbox, policy._replace(strict=True))

    def held(self, sandbox: Sandbox) -> tuple[Policy | None, list[str]]:
        """Enforcer.held(). A policy that is not strict is a fault."""
        policy, faults = super().held(sandbox)
        if policy is not None and not policy.strict:
            faults = [*faults, "it is not strict"]
        return policy and policy._replace(strict=False), faults


@pytest.fixture(scope="module")
def bench(as_root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Strict policies, in a sandbox that consecutive rows share."""
    with StrictEbpf(tmp_path_factory.mktemp("strict")) as enforcer:
        one = Bench("ebpf", enforcer)
        yield one
        one.close()


@pytest.mark.parametrize("case", sorted_by_policy(ROWS), ids=lambda case: case.id)
def test_row(case: Case, bench: Bench, lacking: dict[str, str | None]) -> None:
    """Under a strict policy a row has the same outcome for the same reason, and no packet is dropped."""
    skip_without(case, lacking)
    with bench.under(case.policy) as sandbox:
        assert bench.judged(sandbox, case) == expected_verdict(case, "ebpf")
        assert bench.enforcer.reasons() == {case.expected} - {Reason.NOT_LOCKED}


@pytest.mark.parametrize("case", sorted_by_policy(MPTCP), ids=lambda case: case.id)
def test_mptcp_is_let_through_or_denied_at_once(case: Case, bench: Bench, lacking: dict[str, str | None]) -> None:
    """An MPTCP connect never hangs under a strict policy.

    Where the hook sees the socket that sends the packets, it marks that socket. Where the hook sees the MPTCP socket
    above it, its packets could not be distinguished from others, so the connect gets EPERM.
    """
    skip_without(case, lacking)
    with bench.under(case.policy) as sandbox:
        verdict, reasons = bench.judged(sandbox, case), bench.enforcer.reasons()
        if case.expected.permits and verdict == "denied":
            assert reasons == {Reason.UNAPPROVED_SOCKET}
        else:
            assert (verdict, reasons) == (expected_verdict(case, "ebpf"), {case.expected} - {Reason.NOT_LOCKED})
