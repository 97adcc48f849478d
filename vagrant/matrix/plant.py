# SPDX-License-Identifier: Apache-2.0
"""Plants each known fault in a copy of the tree and checks that its row of the matrix fails."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vagrant.matrix import accel, cache, job, report, suite, table, wheel
from vagrant.matrix.errors import MatrixError
from vagrant.matrix.faults import FAULTS, Fault
from vagrant.matrix.table import Matrix
from vagrant.matrix.verdict import FAILED, LOST, Verdict

CAUGHT, SLIPPED_THROUGH = "caught", "SLIPPED THROUGH"


def main(argv: list[str]) -> int:
    """Exit status: 0 every fault was caught, 1 one slipped through, 2 usage, 3 a guest was lost."""
    options = _parser().parse_args(argv)
    try:
        chosen = _chosen(options.faults)
        matrix = table.load()
        found = _run_all(matrix, chosen, options)
    except MatrixError as error:
        sys.stderr.write(f"plant-faults: {error}\n")
        return 3
    return _print(found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vagrant/plant-faults", description=__doc__)
    parser.add_argument("faults", nargs="*", metavar="WORD", help="faults with this word in their name (default: all)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="guests at once")
    parser.add_argument("--tree", type=Path, default=job.TREE, help="the tree to copy, if not this one")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="folder for logs and reports")
    return parser


def _chosen(words: Sequence[str]) -> list[Fault]:
    found = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    if not found:
        raise MatrixError(
            f"no fault has {' or '.join(words)} in its name; there are: {'; '.join(f.name for f in FAULTS)}"
        )
    return found


def plant(fault: Fault, tree: Path) -> None:
    """Puts the fault into ``tree``. Raises MatrixError unless the text occurs exactly once."""
    path = tree / fault.file
    text = path.read_text(encoding="utf-8")
    times = text.count(fault.old)
    if times != 1:
        raise MatrixError(
            f"{fault.name}: {fault.old!r} occurs {times} times in {fault.file}, not once: correct faults.py"
        )
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")


def _run_all(matrix: Matrix, faults: Sequence[Fault], options: argparse.Namespace) -> list[tuple[Fault, Verdict]]:
    results = (options.results or cache.root() / "faults").absolute()
    progress, accelerator = report.Progress(), accel.choose(matrix, "auto")

    def one(fault: Fault) -> tuple[Fault, Verdict]:
        with tempfile.TemporaryDirectory(prefix="imds-guard-fault-") as scratch:
            tree = Path(scratch, "tree")
            _copy(options.tree, tree)
            plant(fault, tree)
            plan = suite.Plan(
                matrix.archive, tree, wheel.build(tree), results / _folder_name(fault), accelerator, fault.tests
            )
            found = suite.run(plan, matrix.row(fault.row), lambda text: progress.say(f"{fault.name}: {text}"))
        progress.say(f"{fault.name}: {outcome(fault, found)} by {fault.row}, {found.seconds:.0f} s")
        return fault, found

    for fault in faults:  # check all of them before the first guest is booted
        _check_on_a_copy(fault, options.tree)
    with ThreadPoolExecutor(max_workers=max(1, options.jobs)) as pool:
        return list(pool.map(one, faults))


def outcome(fault: Fault, found: Verdict) -> str:
    """A fault is caught when the row failed for the reason in ``says``; a row that failed otherwise proves nothing."""
    if found.state == LOST:
        return LOST
    right = any(re.search(fault.says, complaint) for complaint in found.complaints)
    return CAUGHT if found.state == FAILED and right else SLIPPED_THROUGH


def _print(found: Sequence[tuple[Fault, Verdict]]) -> int:
    outcomes = [outcome(fault, one) for fault, one in found]
    for (fault, one), word in zip(found, outcomes):
        said = next((text for text in one.complaints if re.search(fault.says, text)), "; ".join(one.complaints))
        print(f"{word:15} {fault.name}\n{'':15} {fault.row} (Linux {one.release or '?'}): {said[:300] or 'all passed'}")
    print(f"{outcomes.count(CAUGHT)} of {len(outcomes)} faults were caught")
    if SLIPPED_THROUGH in outcomes:
        return 1
    return 3 if LOST in outcomes else 0


def _check_on_a_copy(fault: Fault, tree: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="imds-guard-fault-") as scratch:
        copy = Path(scratch, fault.file)
        copy.parent.mkdir(parents=True)
        shutil.copy2(tree / fault.file, copy)
        plant(fault, Path(scratch))


def _copy(tree: Path, target: Path) -> None:
    target.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy2(tree / name, target)
    for name in ("src", "bpf", "tests", "vagrant"):
        shutil.copytree(tree / name, target / name, ignore=shutil.ignore_patterns("__pycache__", ".*cache"))


def _folder_name(fault: Fault) -> str:
    return re.sub(r"[^a-z0-9]+", "-", fault.name.lower())
