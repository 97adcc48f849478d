# SPDX-License-Identifier: Apache-2.0
"""The command line of the matrix."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from threading import Lock

from vagrant.matrix import (
    accel,
    cache,
    guest,
    job,
    report,
    suite,
    support,
    table,
    verdict,
    wheel,
)
from vagrant.matrix.errors import MatrixError
from vagrant.matrix.table import Matrix, Row

COMMANDS = ("run", "exec", "table")


def main(argv: list[str]) -> int:
    """Exit status: 0 all as expected, 1 a row failed, 2 usage, 3 a guest was lost or could not be prepared."""
    if argv[:1] not in ([name] for name in (*COMMANDS, "-h", "--help")):
        argv = ["run", *argv]
    options = _parser().parse_args(argv)
    try:
        status = int(options.act(options))
        sys.stdout.flush()
        return status
    except MatrixError as error:
        sys.stderr.write(f"matrix: {error}\n")
        return 3
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # | head: nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./run matrix", description="runs the tests on real kernels, in QEMU, without a network"
    )
    commands = parser.add_subparsers(required=True)
    _add_run(commands.add_parser("run", help="run rows (the default command)"))
    _add_exec(commands.add_parser("exec", help="run one command in the guest of a row, in a copy of the working tree"))
    shown = commands.add_parser("table", help="print the support table of the recorded results")
    shown.add_argument(
        "--write", type=Path, metavar="FILE", help="write it between the markers of docs/platforms.md or README.md"
    )
    shown.set_defaults(act=_table)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "rows", nargs="*", metavar="ROW",
        help="rows of kernels.toml; containers: all rows of the container-runtime suite "
        "(default: all but those with default = false)",
    )  # fmt: skip
    parser.add_argument("--all", action="store_true", help="the default rows, also without this option")
    parser.add_argument("--list", action="store_true", help="list the rows and exit")
    parser.add_argument("--json", action="store_true", help="with --list: as JSON")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N",
        help="guests at the same time (each needs a core and 0.8 GB; default: one for each core)",
    )  # fmt: skip
    parser.add_argument(
        "--accel",
        choices=("auto", "tcg", "kvm"),
        default="auto",
        help="for guests of this machine's architecture; auto: KVM if a kernel boots under it (others are emulated)",
    )
    parser.add_argument("--record", action="store_true", help="record the results for the support table")
    parser.add_argument("--tree", type=Path, default=job.TREE, help="the tree to test, if not this one")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="folder for logs and reports")
    parser.add_argument(
        "--test",
        action="append",
        metavar="FILE",
        help="run this file, like tests/kernel/x.py, in place of the tests of the row",
    )
    parser.add_argument(
        "--every", type=int, metavar="N",
        help="each row runs every Nth policy of the conformance table (default: all rows together run all)",
    )  # fmt: skip
    parser.set_defaults(act=_run)


def _add_exec(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("row", help="a row, or KERNEL+USERLAND, like 6.12-arm64+debian-12")
    parser.add_argument("--systemd", action="store_true", help="make systemd PID 1; /job/reboot reboots")
    parser.add_argument(
        "--add", type=Path, action="append", default=[], metavar="FILE", help="copy it into the guest, as /job/NAME"
    )
    parser.add_argument("--cmdline", default="", help="more arguments for the kernel")
    parser.add_argument("--deadline", type=float, default=900, metavar="SECONDS")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="folder for console.log and results/")
    parser.add_argument("command", nargs="+")
    parser.set_defaults(act=_execute)


def _run(options: argparse.Namespace) -> int:
    matrix = table.load()
    if options.list:
        return _list(matrix, options.json)
    rows = matrix.select(options.rows)
    results: Path = (options.results or cache.root() / "results").absolute()
    plan = suite.Plan(
        matrix.archive, options.tree.absolute(), wheel.build(options.tree), results,
        accel.choose(matrix, options.accel), tuple(options.test or ()), suite.shares(matrix.rows, options.every),
    )  # fmt: skip
    found = _run_rows(plan, rows, options.jobs, matrix if options.record else None)
    whole = set(rows) >= {row for row in matrix.all_rows if row.default}
    return _conclude(found, results, whole=whole)


def _run_rows(plan: suite.Plan, rows: Sequence[Row], jobs: int, record: Matrix | None) -> list[verdict.Verdict]:
    progress, writing = report.Progress(), Lock()

    def one(row: Row) -> verdict.Verdict:
        try:
            found = suite.run(plan, row, lambda text: progress.say(f"{row.name}: {text}"))
        except MatrixError as error:
            found = verdict.lost(row, 0, f"it could not be prepared: {error}")
        progress.verdict(found, plan.results / row.name)
        if record is not None:
            with writing:
                support.record(record, [found])
        return found

    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        found = {judged.row: judged for judged in pool.map(one, support.longest_first(rows))}
    return [found[row.name] for row in rows]


def _conclude(found: Sequence[verdict.Verdict], results: Path, *, whole: bool) -> int:
    path = report.write_junit(found, results)
    counts = ", ".join(
        f"{sum(one.state == state for one in found)} {state}"
        for state in (verdict.PASSED, verdict.FAILED, verdict.LOST)
    )
    unrun = verdict.never_run(results / one.row / "results" for one in found) if whole else []
    for name in unrun:
        sys.stderr.write(f"matrix: no row of the matrix can run {name}\n")
    sys.stderr.write(f"matrix: {counts}; reports in {path}\n")
    if any(one.state == verdict.FAILED for one in found) or unrun:
        return 1
    return 3 if any(one.state == verdict.LOST for one in found) else 0


def _list(matrix: Matrix, as_json: bool) -> int:
    if as_json:
        json.dump([asdict(row) for row in matrix.all_rows], sys.stdout, default=sorted, indent=1)
        return 0
    for row in matrix.all_rows:
        kernel = f"Linux {row.kernel.series:5} {row.kernel.architecture.name}"
        print(f"{row.name:24} {kernel} {row.userland.name}  {row.expectation_text:22} {row.why}")
    return 0


def _table(options: argparse.Namespace) -> int:
    matrix = table.load()
    if options.write:
        support.write_table(matrix, options.write)
    else:
        sys.stdout.write(support.table(matrix, support.read_record()))
    return 0


def _execute(options: argparse.Namespace) -> int:
    matrix = table.load()
    row = matrix.row(options.row)
    with tempfile.TemporaryDirectory(prefix="imds-guard-matrix-") as scratch:
        folder = options.keep.absolute() if options.keep else Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(scratch) / "job.tar"
        tools = wheel.test_tools(row.userland.tools, row.userland.python)
        files = {**job.tree(), "tools": tools, **{path.name: path for path in options.add}}
        job.write(work, job.command(options.command, "tree"), files, {"IMDS_GUARD_ROW": row.name})
        found = suite.machine(matrix.archive, row)
        booted = replace(
            found, cmdline=f"{found.cmdline} {options.cmdline}".strip(), systemd=options.systemd or found.systemd
        )
        return _end(guest.boot(booted, work, folder, options.deadline, _show), folder)


def _show(output: bytes) -> None:
    sys.stdout.buffer.write(output)
    sys.stdout.buffer.flush()


def _end(outcome: guest.Outcome, folder: Path) -> int:
    if outcome.status is None:
        sys.stderr.write(
            f"{guest.console_tail(folder)}\nmatrix: the guest was lost after {outcome.seconds:.0f} s: {outcome.lost}\n"
        )
        return 3
    sys.stderr.write(f"matrix: exit status {outcome.status} after {outcome.seconds:.0f} s\n")
    return outcome.status
