# SPDX-License-Identifier: Apache-2.0
"""The table in docs/security.md is up to date, and every row of it has a test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.adversary import needs
from tests.adversary.catalogue import CATALOGUE, DOCUMENT, replaced
from tests.adversary.model import Attack, Guard, Verdict
from tests.adversary.test_attacks import RUNS

TESTS = Path(__file__).resolve().parents[1]


def test_the_document_has_the_current_table() -> None:
    """If not, run python3 -m tests.adversary.catalogue --write."""
    text = DOCUMENT.read_text(encoding="utf-8")
    assert replaced(text) == text


def test_ids_are_unique() -> None:
    assert len({attack.id for attack in CATALOGUE}) == len(CATALOGUE)


@pytest.mark.parametrize("attack", CATALOGUE, ids=lambda attack: attack.id)
def test_a_row_has_a_test(attack: Attack) -> None:
    """A row has ways that test_attacks.py runs, or names another file that has tests."""
    if attack.test == Attack.test:
        assert {way for _, at, way in RUNS if at is attack} == set(attack.ways) != set()
    else:
        tree = ast.parse((TESTS / attack.test).read_text(encoding="utf-8"))
        assert any(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in tree.body)
        assert not attack.ways


@pytest.mark.parametrize("attack", CATALOGUE, ids=lambda attack: attack.id)
def test_a_row_can_fail(attack: Attack) -> None:
    """An attack that is blocked in one run succeeds in another."""
    outcomes = set(attack.verdict.through.values())
    assert outcomes == ({True} if attack.verdict is Verdict.OPEN else {True, False})
    assert attack.verdict.through[Guard.STRICT] is (attack.verdict is Verdict.OPEN)


@pytest.mark.parametrize("attack", CATALOGUE, ids=lambda attack: attack.id)
def test_every_need_of_a_way_has_a_probe(attack: Attack) -> None:
    assert {need for way in attack.ways.values() for need in way.needs} <= set(needs.PROBES)


@pytest.mark.parametrize("attack", CATALOGUE, ids=lambda attack: attack.id)
def test_a_row_fits_into_a_table(attack: Attack) -> None:
    assert re.fullmatch(r"[a-z0-9-]+", attack.id)
    assert attack.why.endswith(".")
    assert not re.search(r"[|\n]", attack.title + attack.why)
