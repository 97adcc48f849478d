# SPDX-License-Identifier: Apache-2.0
"""All broken versions of ``decide()``, by name."""

from __future__ import annotations

from tests.conformance import mutants_filter, mutants_lists, mutants_where, mutants_who
from tests.conformance.mutant import REGISTERED, Mutant

MUTANTS: dict[str, Mutant] = dict(REGISTERED)

__all__ = ["MUTANTS", "mutants_filter", "mutants_lists", "mutants_where", "mutants_who"]
