# SPDX-License-Identifier: Apache-2.0
"""The conformance table: what is expected of ``decide()`` and of every backend, written by hand."""

from __future__ import annotations

from tests.conformance import cases_filter, cases_how, cases_where, cases_who
from tests.conformance.model import Case, unique

CASES: tuple[Case, ...] = unique([*cases_who.CASES, *cases_where.CASES, *cases_how.CASES, *cases_filter.CASES])

MODEL_CASES: tuple[Case, ...] = unique([*CASES, *cases_who.KERNEL_THREADS])
"""CASES, and rows that only decide() can be asked about: no test can make a kernel thread connect."""
