# SPDX-License-Identifier: Apache-2.0
"""``decide()`` agrees with every row of the table. Every mutant of it fails at least one row."""

from __future__ import annotations

from typing import Callable

import pytest

from imds_guard.policy.decide import Decision, decide
from tests.conformance.cases import MODEL_CASES
from tests.conformance.model import Case, model_caller, model_destination, model_filter_listens, model_source
from tests.conformance.mutants import MUTANTS


@pytest.mark.parametrize("case", MODEL_CASES, ids=lambda case: case.id)
def test_decide(case: Case) -> None:
    """The specification gives the row's expected verdict and reason."""
    decision = decide(
        case.policy,
        model_caller(case),
        model_destination(case),
        model_source(case),
        filter_listens=model_filter_listens(case),
    )
    assert (decision.reason.label, decision.allowed) == (case.expected.label, case.allowed)
    assert decision.filter == case.filter


@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_the_table_catches(name: str, record_property: Callable[[str, object], None]) -> None:
    """A mutant of decide() fails at least one row. The report lists those rows."""
    mutant = MUTANTS[name]
    killers = [case.id for case in MODEL_CASES if not _as_expected(case, mutant(case))]
    record_property("killed by", killers)
    assert killers, f"no row fails for the mutant {name!r} ({mutant.__doc__})"


def _as_expected(case: Case, decision: Decision) -> bool:
    return (decision.reason, decision.allowed, decision.filter) == (case.expected, case.allowed, case.filter)
