# SPDX-License-Identifier: Apache-2.0
"""The table of container runtimes in docs/platforms.md: what each caller should see, and what it saw in the guests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vagrant.matrix.errors import MatrixError
from vagrant.matrix.table import BACKENDS, Matrix, Row, read_toml

PATH = Path(__file__).resolve().parent.parent / "guest" / "containers" / "cells.toml"
CALLERS = ("root", "allowed", "stranger")
WORDS = frozenset({"-", "connected", "EPERM", "ECONNREFUSED"})
_TITLES = (
    "runtime",
    "mode",
    *(f"{backend}: {caller}" for backend in ("eBPF", "iptables") for caller in CALLERS),
    "seen on",
)


class Cells(NamedTuple):
    """A runtime and a mode. ``expected`` has a word for each of CALLERS, by backend."""

    runtime: str
    mode: str
    expected: Mapping[str, Sequence[str]]
    userlands: tuple[str, ...]
    """Releases that have this mode. Empty: all."""


def load(path: Path = PATH) -> list[Cells]:
    """Reads cells.toml. Raises MatrixError that names the wrong cell."""
    return [_cells(body) for body in read_toml(path)["cell"]]


def _cells(body: Mapping[str, Any]) -> Cells:
    what = f"cell {body.get('runtime')}/{body.get('mode')}"
    unknown = set(body) - {"runtime", "mode", "containers", "name", "nameless", "userlands", "why", *BACKENDS}
    missing = {"runtime", "mode", "why", *BACKENDS} - set(body)
    if unknown or missing:
        raise MatrixError(f"{what}: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}")
    for backend in BACKENDS:
        if len(body[backend]) != len(CALLERS) or not set(body[backend]) <= WORDS:
            raise MatrixError(f"{what}: {backend} = {body[backend]}; for each of {CALLERS} one of {sorted(WORDS)}")
    expected = {backend: body[backend] for backend in sorted(BACKENDS)}
    return Cells(body["runtime"], body["mode"], expected, tuple(body.get("userlands", ())))


def read_seen(results: Path) -> dict[str, str]:
    """BACKEND/RUNTIME/MODE -> the outcomes that a guest wrote to its results, one word each; empty in other guests."""
    path = results / "cells.json"
    if not path.exists():
        return {}
    return {place: " ".join(words) for place, words in json.loads(path.read_text(encoding="ascii")).items()}


def table(matrix: Matrix, known: Mapping[str, Mapping[str, Any]]) -> str:
    """The table in Markdown, without the markers. ``known`` are the recorded results of the rows."""
    lines = [_line(_TITLES), _line(["---"] * len(_TITLES))]
    return "\n".join([*lines, *(_line(_row(cells, matrix, known)) for cells in load())]) + "\n"


def _row(cells: Cells, matrix: Matrix, known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    where: list[str] = []
    seen: dict[str, set[tuple[str, ...]]] = {}
    for row in (one for one in matrix.containers if cells.runtime in one.runtimes):
        found = known.get(row.name, {}).get("cells", {})
        outcomes = {backend: found.get(f"{backend}/{cells.runtime}/{cells.mode}") for backend in BACKENDS}
        if all(outcomes.values()):
            where.append(_place(row))
            for backend, words in outcomes.items():
                seen.setdefault(backend, set()).add(tuple(words.split(" ")))
    shown = [_shown(cells.expected[backend], seen.get(backend, ())) for backend in sorted(BACKENDS)]
    return [cells.runtime, cells.mode, *(word for words in shown for word in words), ", ".join(where) or "not run"]


def _place(row: Row) -> str:
    release = row.userland.name.rpartition("debian-")[2]
    return f"Debian {release}" + (" (hybrid)" if "hybrid-cgroups" in row.setup else "")


def _shown(expected: Sequence[str], seen: Iterable[Sequence[str]]) -> list[str]:
    """A word for each caller; where a guest saw another one, both."""
    shown = []
    for number, word in enumerate(expected):
        others = sorted({words[number] for words in seen} - {word})
        shown.append(f"{' or '.join(others)}, EXPECTED {word}" if others else word)
    return shown


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
