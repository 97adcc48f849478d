# SPDX-License-Identifier: Apache-2.0
"""The support table of the README, from kernels.toml and the results of the last whole run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vagrant.matrix import cache
from vagrant.matrix.errors import MatrixError
from vagrant.matrix.table import BACKENDS, USUAL, Matrix, Row
from vagrant.matrix.verdict import LOST, Verdict

RECORD = Path(__file__).resolve().parent.parent / "results.json"
README = RECORD.parent.parent / "README.md"
BEGIN, END = "<!-- support-table -->", "<!-- /support-table -->"
_TITLES = ("kernel", "userland", "Python", "bcc", "eBPF", "iptables", "what is special", "result")


def meaning(row: Row) -> str:
    """A hash of all that a row says: a result that was recorded for another meaning is not this row's."""
    said = {key: value for key, value in asdict(row).items() if key not in ("why", "deadline_s", "skips")}
    return cache.digest(json.loads(json.dumps(said, default=sorted)))


def record(matrix: Matrix, verdicts: Iterable[Verdict], path: Path = RECORD) -> None:
    """Writes what each row came to, for the table; rows that were not run keep what they had."""
    with cache.locked("record"):
        _record(matrix, verdicts, path)


def _record(matrix: Matrix, verdicts: Iterable[Verdict], path: Path) -> None:
    known = read_record(path)
    for found in verdicts:
        known[found.row] = {
            "meaning": meaning(matrix.row(found.row)), "state": found.state, "release": found.release,
            "works": list(found.works), "passed": found.passed, "skipped": sum(found.skips.values()),
            "seconds": round(found.seconds),
        }  # fmt: skip
    ordered = {row.name: known[row.name] for row in matrix.rows if row.name in known}
    path.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    if path == RECORD:
        write_table(matrix, README)


def write_table(matrix: Matrix, readme: Path) -> None:
    """Puts the table of what is recorded between the markers of a README."""
    text = readme.read_text(encoding="utf-8")
    wanted = put_into(text, table(matrix, read_record()))
    if wanted != text:
        readme.write_text(wanted, encoding="utf-8")


def read_record(path: Path = RECORD) -> dict[str, dict[str, Any]]:
    """Row name -> what was recorded; empty when nothing was."""
    if not path.exists():
        return {}
    known: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return known


def longest_first(rows: Iterable[Row], path: Path = RECORD) -> list[Row]:
    """Rows by how long they took last; one that never ran is the first: what is long and comes last runs alone."""
    known = read_record(path)
    return sorted(rows, key=lambda row: -known.get(row.name, {}).get("seconds", math.inf))


def stale(matrix: Matrix, known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The rows without a result, or with one of a row that meant something else."""
    return [row.name for row in matrix.rows if known.get(row.name, {}).get("meaning") != meaning(row)]


def table(matrix: Matrix, known: Mapping[str, Mapping[str, Any]]) -> str:
    """The table in Markdown, without the markers."""
    lines = [_line(_TITLES), _line(["---"] * len(_TITLES))]
    lines += [_line(_cells(row, known.get(row.name, {}))) for row in matrix.rows]
    return "\n".join(lines) + "\n"


def put_into(text: str, rendered: str) -> str:
    """A README's text with the table between its markers. Raises MatrixError when there are none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise MatrixError(f"the README has no {BEGIN} ... {END} to put the table between")
    return f"{before}{BEGIN}\n{rendered}{END}{after}"


def _cells(row: Row, known: Mapping[str, Any]) -> list[str]:
    named = sorted(row.setup) if USUAL in row.tests else [row.name]
    special = ", ".join([*named, *([f"`{row.cmdline}`"] if row.cmdline else [])])
    return [
        str(known.get("release") or row.kernel.series).replace("-cloud-amd64", ""),
        row.userland.name.replace("debian-", "Debian "), row.userland.python,
        "none" if "without-bcc" in row.setup else row.userland.bcc,
        *(_backend(row, known, backend) for backend in sorted(BACKENDS)),
        special, _result(row, known),
    ]  # fmt: skip


def _backend(row: Row, known: Mapping[str, Any], backend: str) -> str:
    if known.get("meaning") != meaning(row) or known["state"] == LOST:
        return "not tried"
    if backend in known["works"]:
        return "yes"
    if backend in row.expect:
        return "FAILS"
    return "no, as expected" if USUAL in row.tests else ""


def _result(row: Row, known: Mapping[str, Any]) -> str:
    if known.get("meaning") != meaning(row):
        return "not run"
    return f"{known['state']}: {known['passed']} tests, {known['seconds']} s"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
