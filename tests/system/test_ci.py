# SPDX-License-Identifier: Apache-2.0
"""The gate, .ci/run: tests and guests run at once, and a failure of either fails it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

GATE = Path(__file__).resolve().parents[2] / ".ci" / "run"

RUN = """#!/bin/sh
case "$*" in
  "test --version" | "matrix --list") echo "installed for $1" ;;
  test*) echo "tests run with $IMDS_GUARD_HYPOTHESIS, $IMDS_GUARD_EXPECT"; exit "$TESTS" ;;
  matrix*) echo "guests boot: $*"; exit "$GUESTS" ;;
esac
"""


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A copy of the gate in a tree with another ``run``, and with an apt-get that has nothing to install."""
    if platform.machine() != "x86_64":
        pytest.skip("the gate is for x86_64")
    copy = tmp_path / ".ci" / "run"
    copy.parent.mkdir()
    shutil.copy(GATE, copy)
    for name, text in (("run", RUN), ("apt-get", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    return copy


@pytest.mark.parametrize(("tests", "guests", "status"), [(0, 0, 0), (1, 0, 1), (0, 3, 3), (1, 3, 1)])
def test_a_failure_of_tests_or_guests_fails_the_gate(gate: Path, tests: int, guests: int, status: int) -> None:
    """The output of the guests follows that of the tests, and the tests are the full ones, without skips."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("IMDS_GUARD_")}
    path = f"{gate.parents[1]}:{os.environ['PATH']}"
    environment = {**inherited, "PATH": path, "TESTS": str(tests), "GUESTS": str(guests)}
    done = subprocess.run([str(gate)], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        "tests run with full, ebpf,iptables,tools",
        "guests boot: matrix --jobs 1 5.10-debian-11 7.3-debian-13 lockdown",
    ]
    assert done.returncode == status, done.stderr
