# SPDX-License-Identifier: Apache-2.0
"""Makes the support tables from kernels.toml and the recorded results.

docs/platforms.md has a line for each row of the matrix; the README has a line for each kernel.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vagrant.matrix import cache, cells
from vagrant.matrix.errors import MatrixError
from vagrant.matrix.table import BACKENDS, USUAL, Matrix, Row
from vagrant.matrix.verdict import LOST, PASSED, Verdict

RECORD = Path(__file__).resolve().parent.parent / "results.json"
_TREE = RECORD.parent.parent
DOCUMENTS = (_TREE / "docs" / "platforms.md", _TREE / "README.md")
"""The files that hold a generated table."""
_TITLES = ("kernel", "architecture", "userland", "Python", "bcc", "eBPF", "iptables", "what is special", "result")
_KERNEL_TITLES = ("kernel", "architectures", "eBPF", "iptables", "tried with")


_NO_PART_OF_THE_MEANING = frozenset({"why", "deadline_s", "skips", "default"})


def meaning(row: Row) -> str:
    """A hash of the row without why, deadline and skips. A recorded result counts only for the same hash."""
    values = {key: value for key, value in asdict(row).items() if key not in _NO_PART_OF_THE_MEANING}
    if not row.runtimes:
        del values["runtimes"]
    return cache.digest(json.loads(json.dumps(values, default=sorted)))


def record(matrix: Matrix, verdicts: Iterable[Verdict], path: Path = RECORD) -> None:
    """Records the results of rows for the table. Rows that were not run keep their results."""
    with cache.locked("record"):
        _record(matrix, verdicts, path)


def _record(matrix: Matrix, verdicts: Iterable[Verdict], path: Path) -> None:
    known = read_record(path)
    for found in verdicts:
        known[found.row] = {
            "meaning": meaning(matrix.row(found.row)), "state": found.state, "release": found.release,
            "works": list(found.works), "passed": found.passed, "skipped": sum(found.skips.values()),
            "seconds": round(found.seconds), **({"cells": dict(found.cells)} if found.cells else {}),
        }  # fmt: skip
    ordered = {row.name: known[row.name] for row in matrix.all_rows if row.name in known}
    path.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    if path == RECORD:
        for document in DOCUMENTS:
            write_table(matrix, document)


def write_table(matrix: Matrix, document: Path) -> None:
    """Writes the tables between the markers of a document, from the recorded results."""
    text = document.read_text(encoding="utf-8")
    wanted = put_into(text, matrix, read_record())
    if wanted != text:
        document.write_text(wanted, encoding="utf-8")


def read_record(path: Path = RECORD) -> dict[str, dict[str, Any]]:
    """Row name -> the recorded result; empty before the first record."""
    if not path.exists():
        return {}
    known: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return known


def longest_first(rows: Iterable[Row], path: Path = RECORD) -> list[Row]:
    """Rows by the time of their last run, longest first, new rows before all: a long row at the end would run alone."""
    known = read_record(path)
    return sorted(rows, key=lambda row: -known.get(row.name, {}).get("seconds", math.inf))


def stale(matrix: Matrix, known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The rows without a result for their present meaning."""
    return [row.name for row in matrix.all_rows if known.get(row.name, {}).get("meaning") != meaning(row)]


def table(matrix: Matrix, known: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of rows in Markdown, without the markers."""
    lines = [_line(_TITLES), _line(["---"] * len(_TITLES))]
    lines += [_line(_cells(row, known.get(row.name, {}))) for row in matrix.rows]
    return "\n".join(lines) + "\n"


def table_of_kernels(matrix: Matrix, known: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of kernels in Markdown, without the markers."""
    lines = [_line(_KERNEL_TITLES), _line(["---"] * len(_KERNEL_TITLES))]
    for series in dict.fromkeys(kernel.series for kernel in matrix.kernels.values()):
        rows = [row for row in matrix.rows if row.kernel.series == series]
        architectures = sorted({row.kernel.architecture.name for row in rows})
        userlands = sorted({row.userland.name.replace("debian-", "Debian ") for row in rows})
        backends = (_backend_on(rows, known, backend) for backend in sorted(BACKENDS))
        lines.append(_line([f"Linux {series}", ", ".join(architectures), *backends, ", ".join(userlands)]))
    return "\n".join(lines) + "\n"


_TABLES = {"support-table": table, "support-by-kernel": table_of_kernels, "containers-table": cells.table}
"""Marker in a document -> the function that makes the table there."""


def put_into(text: str, matrix: Matrix, known: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of a document with new tables. Raises MatrixError when it has no markers for any table."""
    found = [name for name in _TABLES if f"<!-- {name} -->" in text and f"<!-- /{name} -->" in text]
    if not found:
        names = " or ".join(f"<!-- {name} --> ... <!-- /{name} -->" for name in _TABLES)
        raise MatrixError(f"writing the support table: the file has no markers for it: {names}")
    for name in found:
        before, begin, rest = text.partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        text = f"{before}{begin}\n{_TABLES[name](matrix, known)}{end}{after}"
    return text


def _cells(row: Row, known: Mapping[str, Any]) -> list[str]:
    named = sorted(row.setup) if USUAL in row.tests else [row.name]
    special = ", ".join([*named, *([f"`{row.cmdline}`"] if row.cmdline else [])])
    return [
        str(known.get("release") or row.kernel.series).replace(f"-{row.kernel.flavour}", ""),
        row.kernel.architecture.name, row.userland.name.replace("debian-", "Debian "), row.userland.python,
        "none" if "without-bcc" in row.setup else row.userland.bcc,
        *(_backend(row, known, backend) for backend in sorted(BACKENDS)),
        special, _result(row, known),
    ]  # fmt: skip


def _backend(row: Row, known: Mapping[str, Any], backend: str) -> str:
    if known.get("meaning") != meaning(row) or known["state"] == LOST:
        return "not tried"
    if backend in known["works"]:
        return "yes"
    if known["state"] == PASSED and not known["works"] and USUAL not in row.tests:
        return ""  # no test of the row says by which backend
    if backend in row.expect:
        return "FAILS"
    return "no, as expected" if USUAL in row.tests else ""


def _backend_on(rows: Iterable[Row], known: Mapping[str, Mapping[str, Any]], backend: str) -> str:
    """The worst result of the rows of a kernel that expect the backend, and how many were not run as they are now."""
    found = [_backend(row, known.get(row.name, {}), backend) for row in rows if backend in row.expect]
    words = [word for word in found if word]
    if not words or "FAILS" in words:
        return "FAILS" if words else "no row"
    missing = words.count("not tried")
    if missing == len(words):
        return "not tried"
    return f"yes; {missing} of {len(words)} rows not run again" if missing else "yes"


def _result(row: Row, known: Mapping[str, Any]) -> str:
    if known.get("meaning") != meaning(row):
        return "not run"
    return f"{known['state']}: {known['passed']} tests, {known['seconds']} s"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
