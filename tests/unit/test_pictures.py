# SPDX-License-Identifier: Apache-2.0
"""The pictures of docs/pictures agree with their sources; docs/pictures/make writes them."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.tools import need

PICTURES = Path(__file__).resolve().parents[2] / "docs" / "pictures"
SOURCES = sorted(PICTURES.glob("*.dot"))
MAKE = runpy.run_path(str(PICTURES / "make"), run_name="make")
SVG = "{http://www.w3.org/2000/svg}"

each_picture = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def texts(svg: str) -> list[str]:
    """What a reader sees, and the names of nodes and edges; without coordinates, which differ between versions."""
    root = ElementTree.fromstring(svg.encode())
    return sorted((node.text or "").strip() for tag in ("text", "title") for node in root.iter(f"{SVG}{tag}"))


def labels(source: str) -> set[str]:
    """The lines of every label in a .dot file."""
    return {line.strip() for label in re.findall(r'label="([^"]*)"', source) for line in label.split("\\n")}


def test_there_are_pictures() -> None:
    assert {path.stem for path in SOURCES} >= {"connect", "generation"}
    assert {path.stem for path in SOURCES} == {path.stem for path in PICTURES.glob("*.svg")}


@each_picture
def test_a_picture_was_made_from_its_source(source: Path) -> None:
    svg = source.with_suffix(".svg").read_text(encoding="utf-8")
    assert MAKE["source_mark"](source.read_text(encoding="utf-8")) in svg
    assert labels(source.read_text(encoding="utf-8")) <= set(texts(svg))


@each_picture
def test_graphviz_draws_the_same_again(source: Path) -> None:
    need("dot")
    assert texts(MAKE["draw"](source)) == texts(source.with_suffix(".svg").read_text(encoding="utf-8"))


def test_every_picture_is_shown_on_a_page() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in PICTURES.parent.glob("*.md"))
    assert [path.stem for path in SOURCES if f"](pictures/{path.stem}.svg)" not in pages] == []


def test_the_picture_of_the_layers_is_the_table_of_test_layers() -> None:
    """Else: docs/pictures/make."""
    assert (PICTURES / "layers.dot").read_text(encoding="utf-8") == MAKE["layers_dot"]()
