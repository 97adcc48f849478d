# SPDX-License-Identifier: Apache-2.0
"""A row from beginning to end: prepare what it boots, pack the job, boot, judge, keep what came out."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Callable

from vagrant.matrix import guest, installed, job, kernel, userland, verdict, wheel
from vagrant.matrix.table import BACKENDS, USUAL, Archive, Row
from vagrant.matrix.verdict import Verdict

USUAL_TESTS = tuple(f"vagrant/guest/{name}.py" for name in ("test_1_installed", "test_2_table", "test_9_stop"))
"""For each backend in this order."""
_LEGACY_CGROUPS = "systemd.unified_cgroup_hierarchy=0 systemd.legacy_systemd_cgroup_controller=yes"
"""systemd then mounts cgroup v1 alone (systemd(1))."""


@dataclass(frozen=True)
class Plan:
    """What all rows of a run share."""

    archive: Archive
    tree: Path
    wheel: Path
    results: Path
    accel: str = "tcg"
    tests: Sequence[str] = ()
    """In place of what the rows say."""
    shares: Mapping[str, str] = field(default_factory=dict)
    """Row -> its share of the conformance table, as the guest's IMDS_GUARD_SHARE says it; what is not here runs all."""


_ALL = " ".join(f"{backend}=0/1" for backend in sorted(BACKENDS))


def shares(rows: Sequence[Row], every: int | None = None) -> dict[str, str]:
    """Every row one of ``every`` policies of the table; by default as many as there are rows with that backend.

    So all rows together run all of it on each backend, and a row alone runs the same as among the others.
    """
    words: dict[str, list[str]] = {row.name: [] for row in rows}
    for backend in sorted(BACKENDS):
        having = [row for row in rows if backend in row.expect and USUAL in row.tests]
        of = every or len(having)
        for place, row in enumerate(having):
            words[row.name].append(f"{backend}={place % of}/{of}")
    return {name: " ".join(one) for name, one in words.items()}


def machine(archive: Archive, row: Row, accel: str = "tcg") -> guest.Guest:
    """What a row boots, from the cache or made now; this is the part that needs the network."""
    words = [row.cmdline, *([_LEGACY_CGROUPS] if "legacy-cgroups" in row.setup else [])]
    return guest.Guest(
        kernel.fetch(archive, row.kernel), userland.fetch(archive, row.userland),
        " ".join(filter(None, words)), row.memory_mib, accel, row.systemd, row.cpus,
    )  # fmt: skip


def run(plan: Plan, row: Row, progress: Callable[[str], None]) -> Verdict:
    """The verdict on one row; its console, output, JUnit reports and verdict stay in ``plan.results``."""
    folder = plan.results / row.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    progress("preparing")
    booted = machine(plan.archive, row, plan.accel)
    tarball = folder / "job.tar"
    tools = wheel.test_tools(row.userland.tools, row.userland.python)
    pack(plan, row, tarball, installed.fetch(booted.userland, plan.wheel, tools))
    progress(f"booting {booted.kernel.release}")
    counter = _Counter(progress)
    outcome = guest.boot(booted, tarball, folder, row.deadline_s, counter.take)
    tarball.unlink()
    found = _verdict(row, booted.kernel.release, outcome, folder)
    (folder / "verdict.json").write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    return found


def _verdict(row: Row, release: str, outcome: guest.Outcome, folder: Path) -> Verdict:
    if outcome.status is None:
        return verdict.lost(row, outcome.seconds, outcome.lost)
    return verdict.judge(row, outcome.status, folder / "results", release, outcome.seconds)


def pack(plan: Plan, row: Row, tarball: Path, prepared: Mapping[str, Path] | None = None) -> None:
    """Writes the job of a row: the wheel, the tests, and the tools that they need.

    ``prepared`` is what installed.fetch() gives, for guests whose userland is at hand; others install the wheel.
    """
    files = {
        f"{plan.wheel.name}": plan.wheel,
        "suite/tests": plan.tree / "tests",
        "suite/vagrant/__init__.py": plan.tree / "vagrant" / "__init__.py",
        "suite/vagrant/guest": plan.tree / "vagrant" / "guest",
    }
    job.write(
        tarball,
        job.command(["sh", "suite/vagrant/guest/suite", *(plan.tests or _tests(row))], "."),
        files,
        {**_environment(row), "IMDS_GUARD_SHARE": plan.shares.get(row.name, _ALL)},
        prepared or {"tools": wheel.test_tools(row.userland.tools, row.userland.python)},
    )


def _tests(row: Row) -> list[str]:
    # Where no backend works there is nothing that could be tried on one.
    usual = USUAL_TESTS if row.expect & BACKENDS else USUAL_TESTS[:1]
    return [path for word in row.tests for path in (usual if word == USUAL else (word,))]


def _environment(row: Row) -> dict[str, str]:
    return {
        "IMDS_GUARD_ROW": row.name,
        "IMDS_GUARD_EXPECT": row.expectation_words,
        "IMDS_GUARD_SETUP": " ".join(sorted(row.setup)),
        "IMDS_GUARD_KERNEL": row.kernel.series,
        "IMDS_GUARD_BCC": "" if "without-bcc" in row.setup else row.userland.bcc,
    }


class _Counter:
    """Reads pytest's verbose lines as they come and reports every ten seconds how far it is."""

    EVERY_S = 10.0

    def __init__(self, progress: Callable[[str], None]) -> None:
        self._progress = progress
        self._rest = b""
        self._counts: dict[bytes, int] = {b"PASSED": 0, b"FAILED": 0, b"ERROR": 0, b"SKIPPED": 0}
        self._percent = ""
        self._told: float | None = None

    def take(self, output: bytes) -> None:
        """The next piece of output."""
        *lines, self._rest = (self._rest + output).split(b"\n")
        for line in lines:
            for word in self._counts:
                self._counts[word] += line.count(b" " + word)
            if line.rstrip().endswith(b"%]"):
                self._percent = line[line.rindex(b"[") + 1 : line.rindex(b"]")].decode().strip()
        now = time.monotonic()
        if self._percent and (self._told is None or now - self._told >= self.EVERY_S):
            self._told = now
            bad = self._counts[b"FAILED"] + self._counts[b"ERROR"]
            self._progress(f"{self._percent}, {self._counts[b'PASSED']} passed, {bad} failed")
