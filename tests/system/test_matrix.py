# SPDX-License-Identifier: Apache-2.0
"""The command line of the matrix, and its verdicts. ./run matrix itself shows that guests boot."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from vagrant.matrix import plant, report, support, table, verdict
from vagrant.matrix.errors import MatrixError
from vagrant.matrix.faults import FAULTS, Fault
from vagrant.matrix.verdict import FAILED, LOST, PASSED, Verdict

TREE = Path(__file__).resolve().parents[2]
RUN = TREE / "vagrant" / "run.py"
EXPECTS_BOTH, EXPECTS_ONE, EXPECTS_NONE = "6.1-debian-12", "lockdown", "neither"

_AS_NOBODY = """
import os, sys
from pathlib import Path
from vagrant.matrix import process, userland

folder, nobody = Path(sys.argv[1]), int(sys.argv[2])
os.chown(folder, nobody, nobody)
os.setgroups([])
os.setgid(nobody)
os.setuid(nobody)
with userland.scratch_of_owners(folder) as scratch:
    make = 'mkdir "$1/theirs"; touch "$1/theirs/file"; chown -R 5:6 "$1/theirs"; stat -c %u:%g "$1/theirs/file"'
    print(process.run(userland.as_owner(["sh", "-ec", make, "sh", str(scratch)])), os.listdir(scratch))
print(os.listdir(folder))
"""
NOBODY = 65534
GOOD = {"test_row[ebpf-a]": "passed", "test_row[iptables-a]": "passed"}


def row(name: str) -> table.Row:
    return table.load().row(name)


def judged(folder: Path, name: str, outcomes: dict[str, str], status: int = 0) -> Verdict:
    """The verdict on a row whose JUnit report has these outcomes ("skipped: why" for a skip)."""
    top = ElementTree.Element("testsuites")
    for test, outcome in outcomes.items():
        case = ElementTree.SubElement(top, "testcase", classname="tests.conformance.test_backends", name=test)
        kind, _, why = outcome.partition(": ")
        if kind != "passed":
            ElementTree.SubElement(case, {"failed": "failure", "skipped": "skipped"}[kind], message=why)
    ElementTree.ElementTree(top).write(folder / "junit-suite.xml")
    return verdict.judge(row(name), status, folder, "6.1.0-1-cloud-amd64", 12.0)


def test_expected_tests_that_pass(tmp_path: Path) -> None:
    found = judged(tmp_path, EXPECTS_BOTH, GOOD)
    assert (found.state, found.works, found.complaints) == (PASSED, ("ebpf", "iptables"), ())


@pytest.mark.parametrize(
    ("name", "outcomes", "complaint"),
    [
        (EXPECTS_BOTH, {**GOOD, "test_row[ebpf-b]": "failed: allowed != denied"}, "allowed != denied"),
        (EXPECTS_BOTH, {**GOOD, "test_row[ebpf-b]": "skipped: no BTF"}, "skipped without being allowed to: no BTF"),
        (EXPECTS_ONE, GOOD, "ebpf works here though lockdown does not expect it"),
        (EXPECTS_NONE, {"test_x": "skipped: because"}, "skipped without being allowed to: because"),
        (EXPECTS_BOTH, {}, "no test ran"),
    ],
)
def test_reasons_for_a_failed_row(tmp_path: Path, name: str, outcomes: dict[str, str], complaint: str) -> None:
    """A failed test, a skip without a justification, an unexpected success, and no tests at all."""
    found = judged(tmp_path, name, outcomes)
    assert found.state == FAILED
    assert [complaint in one for one in found.complaints] == [True], found.complaints


def test_a_status_without_a_failed_test_fails_the_row(tmp_path: Path) -> None:
    """For example when pytest is killed after it wrote the report."""
    assert judged(tmp_path, EXPECTS_BOTH, GOOD, status=137).state == FAILED


@pytest.mark.parametrize(
    "skip",
    [
        (EXPECTS_ONE, "test_row[ebpf-a]", "skipped: the kernel refused it"),
        (EXPECTS_BOTH, "test_row[ebpf-c]", "skipped: io_uring can't be used here: EPERM"),
    ],
)
def test_justified_skips(tmp_path: Path, skip: tuple[str, str, str]) -> None:
    """By the expectations of the row, or by a [[skip]] of kernels.toml."""
    name, test, outcome = skip
    passed = {"test_row[iptables-a]": "passed"} if name == EXPECTS_ONE else GOOD
    assert judged(tmp_path, name, {**passed, test: outcome}).state == PASSED


def test_a_lost_guest_is_not_a_failed_test(tmp_path: Path) -> None:
    """It is an <error> for CI; a failed row is a <failure>."""
    found = verdict.lost(row(EXPECTS_BOTH), 1200.0, "deadline passed, QEMU was killed")
    assert (found.state, found.failed) == (LOST, 0)
    written = ElementTree.parse(report.write_junit([found], tmp_path)).getroot()
    assert len(list(written.iter("error"))) == 1
    assert list(written.iter("failure")) == []


def test_the_list_shows_every_row() -> None:
    """As lines and as JSON."""
    words = [sys.executable, str(RUN), "--list", "--json"]
    listed = json.loads(subprocess.run(words, capture_output=True, check=True, text=True).stdout)
    assert [one["name"] for one in listed] == [one.name for one in table.load().all_rows]


def without_root(tmp_path: Path, sub_ids: str) -> subprocess.CompletedProcess[str]:
    """Makes files of other owners as user nobody with these sub-IDs, in a folder that only nobody may enter."""
    if os.geteuid() != 0 or shutil.which("newuidmap") is None:
        pytest.skip("giving somebody sub-IDs needs root and newuidmap")
    (tmp_path / "sub").write_text(sub_ids, encoding="ascii")
    given = 'mount --bind "$1" /etc/subuid; mount --bind "$1" /etc/subgid; shift; exec "$@"'
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-c", _AS_NOBODY, folder, str(NOBODY)]
        return subprocess.run(
            ["unshare", "--mount", "sh", "-ec", given, "sh", str(tmp_path / "sub"), *words],
            cwd=TREE, capture_output=True, check=False, text=True, timeout=60,
        )  # fmt: skip


def test_without_root_files_have_owners_and_are_removed(tmp_path: Path) -> None:
    """Images are made like this; rmtree() could not remove files of other owners."""
    done = without_root(tmp_path, "nobody:300000:65536\n")
    assert done.stdout.split("\n") == ["5:6", " ['theirs']", "[]", ""], done.stderr


def test_without_sub_ids_the_message_says_what_to_do(tmp_path: Path) -> None:
    """It has the message of unshare(1) and ours."""
    done = without_root(tmp_path, "somebody:300000:65536\n")
    assert done.returncode != 0
    assert '"nobody" in /etc/subuid' in done.stderr
    assert "usermod --add-subuids" in done.stderr


_LEAVES_ONE = """
import subprocess, sys
from vagrant.matrix import process
subprocess.Popen(process.dies_with_us(["sh", "-c", "echo $$; exec sleep 1000"]))
sys.stdin.read()
"""


def test_no_guest_outlives_a_run_that_is_killed() -> None:
    """As when a job of a CI is cancelled."""
    words = [sys.executable, "-c", _LEAVES_ONE]
    with subprocess.Popen(words, cwd=TREE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as runs:
        assert runs.stdout is not None
        guest = os.pidfd_open(int(runs.stdout.readline()))
        assert select.select([guest], [], [], 0) == ([], [], [])
        runs.kill()
    ended, _, _ = select.select([guest], [], [], 30)  # a pidfd becomes readable when the process ends (pidfd_open(2))
    os.close(guest)
    assert ended == [guest]


def test_an_unknown_row_is_an_error() -> None:
    """Nothing is booted."""
    words = [sys.executable, str(RUN), "exec", "2.6+debian-1", "--", "true"]
    done = subprocess.run(words, capture_output=True, check=False, text=True)
    assert done.returncode == 3
    assert done.stderr.startswith("matrix: there is no row '2.6+debian-1'")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_every_fault_can_be_planted(fault: Fault, tmp_path: Path) -> None:
    """Its text occurs once in its file, and its row and its tests exist."""
    target = tmp_path / fault.file
    target.parent.mkdir(parents=True)
    shutil.copy2(TREE / fault.file, target)
    plant.plant(fault, tmp_path)
    assert target.read_text(encoding="utf-8") != (TREE / fault.file).read_text(encoding="utf-8")
    assert row(fault.row).name == fault.row
    files = [word.partition("::")[0] for word in fault.tests if ".py" in word]
    assert [name for name in files if not (TREE / name).exists()] == []


def test_a_fault_without_its_text_is_an_error(tmp_path: Path) -> None:
    """The tree has changed since; a copy without the fault would pass and prove nothing."""
    Path(tmp_path, "there").write_text("one and one", encoding="utf-8")
    for text, times in (("two", 0), ("one", 2)):
        with pytest.raises(MatrixError, match=f"occurs {times} times"):
            plant.plant(replace(FAULTS[0], file="there", old=text), tmp_path)


def test_a_fault_is_caught_only_for_its_own_reason() -> None:
    """A tree that does not start, a row that passes, and a lost guest prove nothing."""
    fault = FAULTS[0]
    words = f"test_who: AssertionError: {['EPERM', 'EPERM', 'connected']}"
    red = Verdict(fault.row, FAILED, 1.0, complaints=(words,))
    assert plant.outcome(fault, red) == plant.CAUGHT
    broken = Verdict(fault.row, FAILED, 1.0, complaints=("test_who: the verifier refused the program",))
    assert plant.outcome(fault, broken) == plant.SLIPPED_THROUGH
    assert plant.outcome(fault, Verdict(fault.row, PASSED, 1.0)) == plant.SLIPPED_THROUGH
    assert plant.outcome(fault, verdict.lost(row(fault.row), 1.0, "connected")) == LOST


def test_long_rows_come_first(tmp_path: Path) -> None:
    """By the recorded times; a row that never ran may take any time."""
    first, second, third = table.load().rows[:3]
    recorded = tmp_path / "results.json"
    recorded.write_text(json.dumps({first.name: {"seconds": 5}, second.name: {"seconds": 7}}), encoding="utf-8")
    assert support.longest_first([first, second, third], recorded) == [third, second, first]


def test_every_row_has_a_result_for_its_present_meaning() -> None:
    """A change of a row in kernels.toml needs a new run with --record."""
    matrix, known = table.load(), support.read_record()
    assert [name for name in known if name in support.stale(matrix, known)] == []
    assert set(known) <= {one.name for one in matrix.all_rows}


@pytest.mark.parametrize("document", support.DOCUMENTS, ids=lambda path: path.name)
def test_the_support_table_is_current(document: Path) -> None:
    """After a change of kernels.toml or results.json run ./run matrix table --write FILE for each of these files."""
    text = document.read_text(encoding="utf-8")
    assert support.put_into(text, table.load(), support.read_record()) == text


def test_a_document_without_markers_is_an_error() -> None:
    with pytest.raises(MatrixError, match="no markers"):
        support.put_into("# A page\n", table.load(), {})


def test_the_short_table_does_not_hide_a_failure() -> None:
    """A row that fails decides the cell of its kernel; rows that were not run as they are now are counted."""
    matrix = table.load()
    rows = [one for one in matrix.rows if "ebpf" in one.expect and one.kernel.series == "6.1"]
    known: dict[str, dict[str, object]] = {
        one.name: {"meaning": support.meaning(one), "state": "passed", "works": sorted(one.expect)} for one in rows
    }

    def cell() -> str:
        line = next(line for line in support.table_of_kernels(matrix, known).splitlines() if "6.1 " in line)
        return line.split(" | ")[2]

    assert cell() == "yes"
    passed = known.pop(rows[0].name)
    assert cell() == f"yes; 1 of {len(rows)} rows not run again"
    known[rows[0].name] = {**passed, "works": [], "state": FAILED}
    assert cell() == "FAILS"
    assert support.table_of_kernels(matrix, {}).count("| not tried |") > 0
