# SPDX-License-Identifier: Apache-2.0
""".ci/run: the gate fails when tests, clients or a kernel in the background fail, and when a tool is missing.

A copy of it runs beside a ``run`` and an apt-get that only end as they are told.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FAKE_RUN = """#!/bin/sh
case "$1 $2" in
  "test --version") exit "${PREPARE_TESTS:-0}" ;;
  "matrix --list") exit "${PREPARE_MATRIX:-0}" ;;
  "clients --version") exit "${PREPARE_CLIENTS:-0}" ;;
  test*) echo "tests: $2 $IMDS_GUARD_EXPECT $IMDS_GUARD_HYPOTHESIS"; exit "${TESTS:-0}" ;;
  clients*) echo "clients: $2"; exit "${CLIENTS:-0}" ;;
  matrix*) shift; echo "guests: $*"; exit "${GUESTS:-0}" ;;
esac
"""

FAKE_APT = """#!/bin/sh
case " $* " in
  *" -s "*) [ -z "$MISSING" ] || echo "Inst shellcheck" ;;
  *" update "*) exit "${UPDATE:-0}" ;;
  *" install "*) exit "${INSTALL:-0}" ;;
  *" download prometheus "*) [ -n "$PACKAGE" ] && cp "$PACKAGE" prometheus_1_amd64.deb ;;
esac
"""


def ci(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs the copy on a machine that differs from a good one in these settings."""
    machine = f"#!/bin/sh\necho {settings.pop('machine', 'x86_64')}\n"
    files = {".ci/run": (ROOT / ".ci" / "run").read_text(encoding="utf-8"), "run": FAKE_RUN}
    search = os.environ["PATH"]
    if settings.pop("promtool", "installed") == "installed":
        files["bin/promtool"] = "#!/bin/sh\n"
    else:
        search = ":".join(one for one in search.split(":") if not Path(one, "promtool").exists())
    for name, content in {**files, "bin/apt-get": FAKE_APT, "bin/uname": machine}.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")
        path.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("IMDS_GUARD_")}
    environment.update(settings, PATH=f"{folder}/bin:{search}", MISSING=settings.get("MISSING", ""))
    environment["IMDS_GUARD_CACHE"] = f"{folder}/cache"
    command = [str(folder / ".ci" / "run"), "chosen"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({}, 0),
        ({"MISSING": "1"}, 0),
        ({"TESTS": "1"}, 1),
        ({"TESTS": "5"}, 5),
        ({"CLIENTS": "4"}, 4),
        ({"GUESTS": "3"}, 3),
        ({"TESTS": "1", "GUESTS": "3"}, 1),
    ],
    ids=["good", "a tool that can be installed", "tests", "no tests", "clients", "guests", "both"],
)
def test_the_gate_fails_with_the_tests_the_clients_and_the_guests(
    settings: dict[str, str], status: int, tmp_path: Path
) -> None:
    """All run to their end, with all tools and backends expected, and all outputs are printed."""
    done = ci(tmp_path, **settings)
    assert done.returncode == status
    assert done.stdout.splitlines() == [
        "tests: chosen ebpf,iptables,tools full",
        "clients: ",
        "guests: --jobs 1 5.10-debian-11 7.3-debian-13 lockdown 6.12-arm64-16k-debian-13 containers-docker",
    ]


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({"MISSING": "1", "INSTALL": "100"}, 69),
        ({"MISSING": "1", "UPDATE": "100"}, 69),
        ({"machine": "aarch64"}, 69),
        ({"promtool": "missing"}, 69),
        ({"PREPARE_TESTS": "77"}, 77),
        ({"PREPARE_MATRIX": "78"}, 78),
        ({"PREPARE_CLIENTS": "69"}, 69),
    ],
    ids=[
        "a tool",
        "package lists",
        "another architecture",
        "promtool",
        "the tests' environment",
        "the emulator",
        "the clients",
    ],
)
def test_what_is_missing_fails_the_gate_before_anything_runs(
    settings: dict[str, str], status: int, tmp_path: Path
) -> None:
    done = ci(tmp_path, **settings)
    assert (done.returncode, done.stdout) == (status, "")


@pytest.mark.skipif(os.path.exists("/usr/bin/promtool"), reason="promtool is a package of this machine")
def test_the_gate_takes_promtool_from_its_package(tmp_path: Path) -> None:
    """Nothing else of the package is installed. A second run downloads nothing."""
    package = tmp_path / "package"
    (package / "DEBIAN").mkdir(parents=True)
    (package / "usr" / "bin").mkdir(parents=True)
    fields = "Package: prometheus\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x.example>\nDescription: x\n"
    (package / "DEBIAN" / "control").write_text(fields, encoding="utf-8")
    for name in ("prometheus", "promtool"):
        (package / "usr" / "bin" / name).write_text("#!/bin/sh\n", encoding="utf-8")
        (package / "usr" / "bin" / name).chmod(0o755)
    made = str(tmp_path / "made.deb")
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", str(package), made], check=True, capture_output=True)
    first = ci(tmp_path, promtool="missing", PACKAGE=made)
    again = ci(tmp_path, promtool="missing")
    assert (first.returncode, again.returncode) == (0, 0), first.stderr
    assert [one.name for one in (tmp_path / "cache" / "bin").iterdir()] == ["promtool"]
