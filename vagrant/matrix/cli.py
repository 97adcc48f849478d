# SPDX-License-Identifier: Apache-2.0
"""The command line of the matrix."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import List, Optional

from vagrant.matrix import guest, job, kernel, table, userland
from vagrant.matrix.errors import MatrixError


def main(argv: List[str]) -> int:
    """Exit status: 0 all as expected, 1 a row failed, 2 usage, 3 a guest was lost or could not be prepared."""
    options = _parser().parse_args(argv)
    try:
        return int(options.act(options))
    except MatrixError as error:
        sys.stderr.write(f"matrix: {error}\n")
        return 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vagrant/run.py", description=__doc__)
    commands = parser.add_subparsers(required=True)
    execute = commands.add_parser("exec", help="run one command in a row's guest, in a copy of the working tree")
    execute.add_argument("row", help="a row, or KERNEL+USERLAND, like 7.3+debian-11")
    execute.add_argument("--cmdline", default="", help="more words for the kernel's command line")
    execute.add_argument("--deadline", type=float, default=900, metavar="SECONDS")
    execute.add_argument("--keep", type=Path, metavar="FOLDER", help="where console.log and results/ go")
    execute.add_argument("command", nargs="+")
    execute.set_defaults(act=_execute)
    return parser


def _execute(options: argparse.Namespace) -> int:
    matrix = table.load()
    row = matrix.row(options.row)
    with tempfile.TemporaryDirectory(prefix="imds-guard-matrix-") as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        work = folder / "job.tar"
        job.write(work, job.command(options.command, "tree"), job.tree(), {"IMDS_GUARD_ROW": row.name})
        booted = guest.Guest(
            kernel.fetch(matrix.archive, row.kernel), userland.fetch(matrix.archive, row.userland),
            f"{row.cmdline} {options.cmdline}".strip(), row.memory_mib,
        )  # fmt: skip
        outcome = guest.boot(booted, work, folder, options.deadline, _show)
        return _end(outcome, folder)


def _show(output: bytes) -> None:
    sys.stdout.buffer.write(output)
    sys.stdout.buffer.flush()


def _end(outcome: guest.Outcome, folder: Path) -> int:
    if outcome.status is None:
        sys.stderr.write(f"{guest.console_tail(folder)}\nmatrix: the guest was lost after {outcome.seconds:.0f} s: {outcome.lost}\n")
        return 3
    sys.stderr.write(f"matrix: exit status {outcome.status} after {outcome.seconds:.0f} s\n")
    return outcome.status


