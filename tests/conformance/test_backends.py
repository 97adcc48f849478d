# SPDX-License-Identifier: Apache-2.0
"""Every row of the table, for real, on every backend."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, Optional

import pytest

from imds_guard.errors import NotPermitted, Unsupported
from imds_guard.kernel.sandbox import Sandbox
from tests.conformance.attempts import CONNECTED
from tests.conformance.cases import CASES
from tests.conformance.conftest import EXPECTED_BACKENDS
from tests.conformance.differences import difference
from tests.conformance.enforcers import ENFORCERS, Enforcer
from tests.conformance.model import Case
from tests.conformance.perform import perform


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_row(
    case: Case, backend_name: str, sandbox: Sandbox, lacking: Dict[str, Optional[str]], tmp_path: Path
) -> None:
    """The kernel judges the row as the table says; the policy reads back; nothing is left afterwards."""
    for need in case.requires:
        if lacking[need] is not None:
            pytest.skip(str(lacking[need]))
    enforcer = ENFORCERS[backend_name](sandbox, str(tmp_path))
    try:
        _apply_or_skip(enforcer, case, backend_name)
        assert _judged(enforcer, sandbox.call(lambda: perform(case))) == _expected(case, backend_name)
        assert enforcer.read() == case.policy
        assert enforcer.faults() == []
    finally:
        enforcer.remove()
    assert enforcer.read() is None
    assert sandbox.call(lambda: perform(case)) == CONNECTED


def _apply_or_skip(enforcer: Enforcer, case: Case, backend_name: str) -> None:
    try:
        enforcer.apply(case.policy)
    except (Unsupported, NotPermitted) as error:
        if backend_name in EXPECTED_BACKENDS:
            raise
        pytest.skip(str(error))


def _judged(enforcer: Enforcer, outcome: str) -> str:
    """``allowed``, ``denied``, or the outcome as it is when it is neither."""
    if outcome == CONNECTED:
        return "allowed"
    return "denied" if outcome in enforcer.refusals else outcome


def _expected(case: Case, backend_name: str) -> str:
    turned = difference(backend_name, case.id) is not None
    return "allowed" if case.allowed != turned else "denied"
