# SPDX-License-Identifier: Apache-2.0
"""Which clients a policy would shut out, with real processes under the names of metadata clients."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imds_guard.commands import preflight
from imds_guard.commands.preflight import CLIENTS, Client, Preflight, ShutOut, installed_shut_out, shut_out
from imds_guard.config.options import policy_from_options
from imds_guard.policy.builtin import PRESETS
from imds_guard.policy.model import Mode, Verdict

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="inspecting other users' processes needs root")
needs_host = pytest.mark.skipif(
    os.stat("/proc/self/ns/pid").st_ino != 0xEFFFFFFC, reason="in a container every caller is denied"
)
pytestmark = [needs_root, needs_host]

STRANGER, STRANGERS = 45_001, 45_002


def by_pid(found: Preflight) -> dict[int, ShutOut]:
    return {one.pid: one for one in found.shut_out if one.pid is not None}


@contextlib.contextmanager
def running(argv: list[str], uid: int = STRANGER, gid: int = STRANGERS) -> Iterator[subprocess.Popen[bytes]]:
    """A process with these IDs. It waits for its standard input, and is killed at the end of the block."""
    with subprocess.Popen(argv, stdin=subprocess.PIPE, user=uid, group=gid, extra_groups=[]) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory that every user may enter."""
    for one in (tmp_path, *tmp_path.parents):
        if one.owner() == "root" and str(one).startswith("/tmp/"):
            one.chmod(0o755)
    return tmp_path


def program(folder: Path, name: str) -> str:
    """A program of this name that waits for its standard input."""
    return shutil.copy("/bin/cat", str(folder / name))


def test_a_known_client_that_would_be_denied_is_found(folder: Path) -> None:
    with running([program(folder, "google_guest_agent")]) as process:
        found = by_pid(shut_out(policy_from_options(nobody=True)))[process.pid]
        assert ("google_guest_agent", str(STRANGER)) == (found.name, found.user)
        assert found.why == (
            "is a metadata client (google_guest_agent) and needs 169.254.169.254:80: not-listed in lock 'default'"
        )


@pytest.mark.parametrize(
    "options",
    [
        {"users": [str(STRANGER)]},
        {"groups": [str(STRANGERS)]},
        {"nobody": True, "ips": ["10.9.9.9"]},
        {"nobody": True, "mode": Mode.AUDIT},
    ],
)
def test_a_client_that_keeps_its_access_is_not_found(folder: Path, options: dict[str, object]) -> None:
    with running([program(folder, "google_guest_agent")]) as process:
        assert process.pid not in by_pid(shut_out(policy_from_options(**options)))  # type: ignore[arg-type]


def test_a_client_is_judged_by_the_addresses_of_its_cloud(folder: Path) -> None:
    with running([program(folder, "amazon-ssm-agent")]) as process:
        assert process.pid not in by_pid(shut_out(policy_from_options(nobody=True, presets=["scaleway"])))
        assert process.pid in by_pid(shut_out(policy_from_options(nobody=True, ips=["fd00:ec2::254"])))


def test_a_script_is_recognised_by_its_own_name(folder: Path) -> None:
    script = folder / "waagent"
    script.write_text("import sys; sys.stdin.read()\n")
    with running(["/usr/bin/python3", "-u", str(script)]) as process:
        found = by_pid(shut_out(policy_from_options(nobody=True)))
        assert "is a metadata client (waagent)" in found[process.pid].why


def test_a_client_name_in_another_argument_is_not_a_client(folder: Path) -> None:
    with (
        running(["/bin/sh", "-c", "read line", "cloud-init"]) as shell,
        running([program(folder, "journalctl"), "-", "cloud-init"]) as reader,
    ):
        found = by_pid(shut_out(policy_from_options(nobody=True)))
        assert shell.pid not in found
        assert reader.pid not in found


def test_root_is_not_allowed_unless_it_is_named(folder: Path) -> None:
    with running([program(folder, "cloud-init")], uid=0, gid=0) as process:
        found = by_pid(shut_out(policy_from_options(groups=[str(STRANGERS)])))
        assert found[process.pid].user == "root"


def test_a_process_that_has_ended_is_left_out(folder: Path) -> None:
    """First it is a zombie, which still has its name. Then it is gone."""
    with subprocess.Popen([program(folder, "kubelet")], stdin=subprocess.DEVNULL) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process.pid not in by_pid(shut_out(policy_from_options(nobody=True)))
    assert process.pid not in by_pid(shut_out(policy_from_options(nobody=True)))


def test_an_installed_client_is_judged_by_the_account_it_runs_as(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = program(folder, "agent")
    known = (
        Client("as-root", ("a",), ("aws",), paths=(here,)),
        Client("absent", ("b",), ("aws",), paths=(str(folder / "absent"),)),
        Client("no-account", ("c",), ("aws",), user="imds-guard-absent", paths=(here,)),
    )
    monkeypatch.setattr(preflight, "CLIENTS", known)
    (found,) = installed_shut_out(policy_from_options(groups=[str(STRANGERS)]))
    assert (found.pid, found.name, found.user) == (None, "as-root", "root")
    assert "needs 169.254.169.254:80 as root: not-listed" in found.why
    assert installed_shut_out(policy_from_options(users=["0"])) == []
    assert installed_shut_out(policy_from_options(users=["0"], containers=Verdict.ALLOW)) == []


def test_the_clients_have_distinct_programs_and_known_presets() -> None:
    programs = [name for client in CLIENTS for name in client.programs]
    assert len(programs) == len(set(programs))
    assert {name for client in CLIENTS for name in client.presets} <= set(PRESETS)
    assert all(preflight._destinations(client) for client in CLIENTS)
