# SPDX-License-Identifier: Apache-2.0
"""Runs a row: prepares the kernel and the userland, packs the job, boots the guest, judges and keeps the results."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Callable

from vagrant.matrix import guest, installed, job, kernel, userland, verdict, wheel
from vagrant.matrix.architecture import ARCHITECTURES, POINTER_AUTHENTICATION, native
from vagrant.matrix.table import BACKENDS, CONTAINERS, USUAL, Archive, Row
from vagrant.matrix.verdict import Verdict

USUAL_TESTS = tuple(f"vagrant/guest/{name}.py" for name in ("test_1_installed", "test_2_table", "test_9_stop"))
"""The usual tests of a row, which run for each backend in this order."""
LEGACY_CGROUPS = "systemd.unified_cgroup_hierarchy=0 systemd.legacy_systemd_cgroup_controller=yes"
"""Kernel arguments with which systemd mounts cgroup v1 alone (systemd(1))."""
HYBRID_CGROUPS = "systemd.unified_cgroup_hierarchy=0 systemd.legacy_systemd_cgroup_controller=no"
"""Kernel arguments with which systemd mounts cgroup v1 for the controllers, and cgroup2 for its own units."""


@dataclass(frozen=True)
class Plan:
    """What all rows of a run have in common."""

    archive: Archive
    tree: Path
    wheel: Path
    results: Path
    accel: str = "tcg"
    tests: Sequence[str] = ()
    """Tests to run in place of those of the rows."""
    shares: Mapping[str, str] = field(default_factory=dict)
    """Row -> its share of the conformance table, for IMDS_GUARD_SHARE. Rows that are not listed run all of it."""


_ALL = " ".join(f"{backend}=0/1" for backend in sorted(BACKENDS))


def shares(rows: Sequence[Row], every: int | None = None) -> dict[str, str]:
    """Row -> its share of the table: one of ``every`` policies.

    The default is the number of rows with that backend and that architecture: the rows of an architecture together run
    the whole table on each backend. The share of a row does not depend on which other rows are run.
    """
    found: dict[str, list[str]] = {row.name: [] for row in rows}
    for architecture, backend in itertools.product(ARCHITECTURES.values(), sorted(BACKENDS)):
        ours = [row for row in rows if row.kernel.architecture == architecture]
        having = [row for row in ours if backend in row.expect and USUAL in row.tests]
        of = every or len(having)
        for position, row in enumerate(having):
            found[row.name].append(f"{backend}={position % of}/{of}")
    return {name: " ".join(one) for name, one in found.items()}


def machine(archive: Archive, row: Row, accel: str = "tcg") -> guest.Guest:
    """The guest of a row, from the cache or made now. Only this needs the network."""
    hierarchies = {"legacy-cgroups": LEGACY_CGROUPS, "hybrid-cgroups": HYBRID_CGROUPS}
    arguments = [row.cmdline, *(words for setup, words in hierarchies.items() if setup in row.setup)]
    architecture = row.kernel.architecture
    return guest.Guest(
        kernel.fetch(archive, row.kernel), userland.fetch(archive, row.userland, architecture),
        " ".join(filter(None, arguments)), row.memory_mib, accel if architecture == native() else "tcg", row.systemd,
        row.cpus, POINTER_AUTHENTICATION if "pac-bti" in row.setup else "",
    )  # fmt: skip


def run(plan: Plan, row: Row, progress: Callable[[str], None]) -> Verdict:
    """Runs one row and returns the verdict. Console, output, JUnit reports and verdict stay in ``plan.results``."""
    folder = plan.results / row.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    progress("preparing")
    booted = machine(plan.archive, row, plan.accel)
    tarball = folder / "job.tar"
    tools = wheel.test_tools(row.userland.tools, row.userland.python)
    # Wheel and tools are pure Python: what the native userland installs is right for every architecture.
    installer = userland.fetch(plan.archive, row.userland)
    pack(plan, row, tarball, installed.fetch(installer, plan.wheel, tools))
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
    """Writes the job of a row: the wheel, the tests, and the tools that the tests need.

    ``prepared`` is the result of installed.fetch(). Without it the guest installs the wheel.
    """
    files = {
        f"{plan.wheel.name}": plan.wheel,
        "suite/tests": plan.tree / "tests",
        "suite/examples": plan.tree / "examples",
        **{f"suite/vagrant/{name}": plan.tree / "vagrant" / name for name in ("__init__.py", "waiting.py", "guest")},
    }
    if row.userland.name.startswith(CONTAINERS):  # it has services that would start at boot
        files["before-systemd"] = plan.tree / "vagrant" / "guest" / "containers" / "before-systemd"
    job.write(
        tarball,
        job.command(["sh", "suite/vagrant/guest/suite", *(plan.tests or _tests(row))], "."),
        files,
        {**_environment(row), "IMDS_GUARD_SHARE": plan.shares.get(row.name, _ALL)},
        prepared or {"tools": wheel.test_tools(row.userland.tools, row.userland.python)},
    )


def _tests(row: Row) -> list[str]:
    # Where no backend works the other tests have nothing to test.
    usual = USUAL_TESTS if row.expect & BACKENDS else USUAL_TESTS[:1]
    return [path for word in row.tests for path in (usual if word == USUAL else (word,))]


def _environment(row: Row) -> dict[str, str]:
    return {
        "IMDS_GUARD_ROW": row.name,
        "IMDS_GUARD_EXPECT": row.expectation_text,
        "IMDS_GUARD_SETUP": " ".join(sorted(row.setup)),
        "IMDS_GUARD_KERNEL": row.kernel.series,
        "IMDS_GUARD_RUNTIMES": " ".join(row.runtimes),
        "IMDS_GUARD_BCC": "" if "without-bcc" in row.setup else row.userland.bcc,
    }


class _Counter:
    """Reads the verbose output of pytest while it runs and reports the progress every ten seconds."""

    EVERY_S = 10.0

    def __init__(self, progress: Callable[[str], None]) -> None:
        self._progress = progress
        self._rest = b""
        self._counts: dict[bytes, int] = {b"PASSED": 0, b"FAILED": 0, b"ERROR": 0, b"SKIPPED": 0}
        self._percent = ""
        self._reported: float | None = None

    def take(self, output: bytes) -> None:
        """Reads the next piece of output."""
        *lines, self._rest = (self._rest + output).split(b"\n")
        for line in lines:
            for word in self._counts:
                self._counts[word] += line.count(b" " + word)
            if line.rstrip().endswith(b"%]"):
                self._percent = line[line.rindex(b"[") + 1 : line.rindex(b"]")].decode().strip()
        now = time.monotonic()
        if self._percent and (self._reported is None or now - self._reported >= self.EVERY_S):
            self._reported = now
            bad = self._counts[b"FAILED"] + self._counts[b"ERROR"]
            self._progress(f"{self._percent}, {self._counts[b'PASSED']} passed, {bad} failed")
