# SPDX-License-Identifier: Apache-2.0
"""``read(apply(p)) == p`` for any valid policy: the policy read back from the kernel is the whole policy applied."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings

from imds_guard.backends import Backend
from imds_guard.backends.iptables import IptablesBackend
from imds_guard.errors import Unsupported
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.model import Policy
from tests import strategies
from tests.kernel import guards

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making namespaces and attaching programs needs root")

EXAMPLES = 300 if os.environ.get("IMDS_GUARD_FULL") else 15
some = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)


def _check(backend: Backend, policy: Policy) -> None:
    assume(policy.locks)
    try:
        backend.check(policy)
        backend.apply(policy)
    except Unsupported:  # too large, or iptables can't express it
        assume(False)
    assert backend.read() == policy
    assert backend.faults() == []


def test_ebpf() -> None:
    """Each policy replaces the one before."""
    with guards.guarded_sandbox(guards.FAST) as (_, backend):

        @some
        @given(strategies.policies(also_strict=True))
        def one(policy: Policy) -> None:
            _check(backend, policy)

        one()


def test_iptables(tmp_path: Path) -> None:
    """Each policy replaces the one before, in a network namespace."""

    def inside() -> None:
        backend = IptablesBackend(state_folder=str(tmp_path))

        @some
        @given(strategies.policies())
        def one(policy: Policy) -> None:
            _check(backend, policy)

        one()
        backend.remove()

    with Sandbox() as sandbox:
        sandbox.call(inside, timeout_s=3600)
