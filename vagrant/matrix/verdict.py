# SPDX-License-Identifier: Apache-2.0
"""Makes the verdict on a row from the results of its guest. Every skip must be justified, every success expected."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from vagrant.matrix import cells
from vagrant.matrix.table import BACKENDS, Row, Skip

PASSED, FAILED, LOST = "passed", "failed", "lost"


@dataclass(frozen=True)
class Test:
    """One test of a guest's JUnit report. ``outcome`` is passed, failed or skipped."""

    name: str
    outcome: str
    reason: str = ""

    def about(self, backend: str) -> bool:
        """True for a test with that backend as a parameter: pytest writes parameters in brackets, between hyphens."""
        return bool(re.search(rf"\[(.*-)?{backend}(-.*)?\]$", self.name))


@dataclass(frozen=True)
class Verdict:
    """The result of one row. ``complaints`` say why it is not "passed"; ``skips`` maps a reason to its number."""

    row: str
    state: str
    seconds: float
    release: str = ""
    passed: int = 0
    failed: int = 0
    skips: Mapping[str, int] = field(default_factory=dict)
    complaints: tuple[str, ...] = ()
    works: tuple[str, ...] = ()
    cells: Mapping[str, str] = field(default_factory=dict)
    """What was seen in the cells of the container-runtime suite (cells.py)."""

    @property
    def line(self) -> str:
        """A summary in one line."""
        skipped = sum(self.skips.values())
        reasons = "; ".join(f"{count} {reason}" for reason, count in sorted(self.skips.items()))
        counts = f"{self.passed} passed, {self.failed} failed, {skipped} skipped" + (f" ({reasons})" if reasons else "")
        return f"{self.row:28} {self.state.upper():6} {counts}, {self.seconds:.0f} s"


def lost(row: Row, seconds: float, reason: str) -> Verdict:
    """The verdict on a guest without results: no test was judged, so none has failed."""
    return Verdict(row.name, LOST, seconds, complaints=(f"the guest was lost: {reason}",))


def judge(row: Row, status: int, results: Path, release: str, seconds: float) -> Verdict:
    """The verdict on a guest whose job ended with ``status`` and wrote junit*.xml to ``results``."""
    tests = [test for report in sorted(results.glob("junit*.xml")) for test in read_junit(report)]
    complaints = [*_failures(tests), *_unjustified(row, tests), *_unexpected(row, tests)]
    if not tests:
        complaints.append(f"no test ran; the job ended with status {status}")
    elif status != 0 and not complaints:
        complaints.append(f"the job ended with status {status} though no test failed")
    outcomes = Counter(test.outcome for test in tests)
    return Verdict(
        row.name, FAILED if complaints else PASSED, seconds, release,
        outcomes["passed"], outcomes["failed"], _reasons(tests), tuple(complaints), works(tests),
        cells.read_seen(results),
    )  # fmt: skip


def works(tests: Iterable[Test]) -> tuple[str, ...]:
    """The backends that passed at least one test and failed none."""
    tests = list(tests)
    found = []
    for backend in sorted(BACKENDS):
        outcomes = {test.outcome for test in tests if test.about(backend)}
        if "passed" in outcomes and "failed" not in outcomes:
            found.append(backend)
    return tuple(found)


def never_run(folders: Iterable[Path]) -> list[str]:
    """The tests that every row skipped, from the folders with the rows' results: nothing shows that they can pass."""
    tests = [test for folder in folders for report in folder.glob("junit*.xml") for test in read_junit(report)]
    return sorted({test.name for test in tests} - {test.name for test in tests if test.outcome != "skipped"})


def read_junit(path: Path) -> list[Test]:
    """The tests of a JUnit report of pytest. An error in a fixture counts as a failure."""
    return [_test(case) for case in ElementTree.parse(path).getroot().iter("testcase")]  # noqa: S314  (our own guest wrote it)


def _test(case: ElementTree.Element) -> Test:
    name = f"{case.get('classname', '')}::{case.get('name', '')}"
    for kind, outcome in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        child = case.find(kind)
        if child is not None:
            return Test(name, outcome, child.get("message") or "")
    return Test(name, "passed")


def _failures(tests: Iterable[Test]) -> list[str]:
    return [f"{test.name}: {_first_line(test.reason)}" for test in tests if test.outcome == "failed"]


def _unjustified(row: Row, tests: Iterable[Test]) -> list[str]:
    """Skips that neither the expectations of the row nor the reasons in kernels.toml explain."""
    complaints: dict[str, int] = Counter()
    for test in tests:
        if test.outcome != "skipped" or any(test.about(backend) for backend in BACKENDS - row.expect):
            continue
        if not any(_covers(skip, row, test) for skip in row.skips):
            complaints[f"skipped without being allowed to: {_first_line(test.reason)}"] += 1
    return [f"{complaint} ({count} tests)" for complaint, count in complaints.items()]


def _covers(skip: Skip, row: Row, test: Test) -> bool:
    return row.kernel.series in skip.kernels and re.search(skip.reason, test.reason) is not None


def _unexpected(row: Row, tests: Sequence[Test]) -> list[str]:
    return [
        f"{backend} works here though {row.name} does not expect it: correct kernels.toml, or find out what enforced it"
        for backend in works(tests)
        if backend not in row.expect
    ]


def _reasons(tests: Iterable[Test]) -> dict[str, int]:
    return dict(Counter(_first_line(test.reason) for test in tests if test.outcome == "skipped"))


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
