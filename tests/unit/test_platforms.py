# SPDX-License-Identifier: Apache-2.0
"""The table of distributions in docs/platforms.md: every cell has a source, and "tried" means the support table."""

from __future__ import annotations

import re

import pytest

from tests.unit.test_readme import ROOT, TEXTS, anchors, rows_of

PAGE = "docs/platforms.md"
TEXT = TEXTS[ROOT / PAGE]
ROWS = {row[0]: row[1:] for row in rows_of(PAGE, "distributions")}
COLUMNS = ("kernel", "BTF", "cgroup2", "bcc", "iptables", "Python")
SOURCES = dict(re.findall(r"^\[([^]]+)\]: (\S+)$", TEXT, re.MULTILINE))
"""The links of the page that are defined in lines of their own: name -> where it leads."""


def support() -> dict[str, list[dict[str, str]]]:
    """The rows of the support table by distribution."""
    found: dict[str, list[dict[str, str]]] = {}
    for kernel, _, userland, python, bcc, *_ in rows_of(PAGE, "support-table"):
        found.setdefault(userland, []).append({"kernel": kernel, "Python": python, "bcc": bcc})
    return found


@pytest.mark.parametrize("distribution", ROWS)
def test_every_cell_has_a_source_or_is_empty(distribution: str) -> None:
    _, *cells = ROWS[distribution]
    assert len(cells) == len(COLUMNS)
    for column, cell in zip(COLUMNS, cells):
        named = re.findall(r"\[[^]]+\]\[([^]]+)\]", cell)
        assert bool(named) == bool(cell), f"{column}: {cell}"
        assert set(named) <= set(SOURCES), f"{column}: {cell}"
        without_links = re.sub(r"\[[^]]+\]\[[^]]+\]", "", cell)
        assert re.fullmatch(r"[,; ]*", without_links), f"{column}: a statement without a link: {without_links}"


def test_a_source_is_a_page_that_can_be_looked_up() -> None:
    wrong = [url for url in SOURCES.values() if not url.startswith("https://") and url.lstrip("#") not in anchors(TEXT)]
    assert wrong == []


def test_every_source_is_used() -> None:
    assert {name for name in SOURCES if f"][{name}]" not in TEXT} == set()


@pytest.mark.parametrize("distribution", ROWS)
def test_tried_means_a_row_of_the_support_table(distribution: str) -> None:
    assert ROWS[distribution][0] == ("tried" if distribution in support() else "not tried")
    if distribution not in support():
        assert "[table]" not in "".join(ROWS[distribution])


@pytest.mark.parametrize("distribution", sorted(support()))
def test_versions_agree_with_the_support_table(distribution: str) -> None:
    cells = dict(zip(COLUMNS, ROWS[distribution][1:]))
    for column in ("Python", "bcc"):
        seen = {row[column] for row in support()[distribution]} - {"none"}
        assert seen == set(re.findall(r"\[([0-9.]+)", cells[column]))
