# SPDX-License-Identifier: Apache-2.0
"""The service under systemd, on a machine that has just booted. test_6_after_reboot.py continues after these.

The order of the tests matters: each starts with the state that the one before has left.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from vagrant.guest import world
from vagrant.guest.service import (
    CONFIG,
    DROP_IN,
    SLOW,
    UNIT,
    WATCH,
    can_soft_reboot,
    install_early_caller,
    logged_changes,
    show,
    start_survivor,
    systemctl,
)
from vagrant.guest.storm import Storm
from vagrant.guest.world import ACTIVE, INACTIVE, ONE, PATIENCE_S, STRANGER, command, done, everywhere, left, reach
from vagrant.waiting import wait_until

EBPF = pytest.mark.parametrize("backend", ["ebpf"], indirect=False)
RESTARTS = 20
"""A restart takes five seconds on an emulated processor, and two more where the log of denials restarts, too."""
RESTARTS_WITH_LOG = 3
TEXTFILES = Path("/var/lib/textfiles")
BY_HAND = Path("/sys/fs/cgroup/by-hand")
QUIET = Path("/run/systemd/system/rescue.service.d/quiet.conf")
"""Without a shell on the console, whose end would isolate the default target."""

_ADD_A_COMMENT = """
import imds_guard, pathlib
source = pathlib.Path(imds_guard.__file__).parent / "bpf/imds_guard.bpf.c"
source.write_text(source.read_text() + "/* an older build */\\n")
"""


def version() -> str:
    """The version of the programs that are attached."""
    versions = json.loads(done("status", "--json"))["ebpf"]["versions"]
    assert len(versions) == 1, versions
    return str(versions[0])


def assert_locked() -> None:
    """The stranger is denied and the user is not."""
    world.assert_denied("ebpf", reach(STRANGER))
    assert reach(ONE) == everywhere("connected")


def assert_only_denials(storm: Storm) -> None:
    """The caller was denied each time, and tried often."""
    assert set(storm.outcomes) == {"EPERM"}, storm.outcomes
    assert storm.outcomes["EPERM"] > RESTARTS, storm.outcomes


@EBPF
def test_an_older_build_is_installed_and_started(backend: str) -> None:
    """Installs a build whose programs have another version; its units are enabled, and it locks."""
    subprocess.run([sys.executable, "-I", "-c", _ADD_A_COMMENT], check=True)
    done("start", "--backend", backend, *CONFIG, "--save")
    DROP_IN.parent.mkdir()
    DROP_IN.write_text(SLOW, encoding="utf-8")
    done("install-service", "--watch", "--now")
    assert (show(UNIT, "ActiveState"), show(UNIT, "UnitFileState")) == ("active", "enabled")
    assert_locked()


@EBPF
def test_an_upgrade_under_load(backend: str) -> None:
    """Installs the new build and restarts the unit, hook by hook; the denied caller never connects."""
    before = version()
    (wheel,) = Path("/job").glob("*.whl")
    with Storm(STRANGER) as storm:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall"]
        subprocess.run([*pip, str(wheel)], check=True, env={**os.environ, "PIP_BREAK_SYSTEM_PACKAGES": "1"})
        systemctl("restart", UNIT)
    assert version() != before
    assert command("status").returncode == ACTIVE
    assert_only_denials(storm)


@EBPF
def test_many_restarts_under_load(backend: str) -> None:
    """A restart never unlocks, with the log of denials and without it, which plays no part in the lock."""
    with Storm(STRANGER) as storm:
        for number in range(RESTARTS):
            if number == RESTARTS_WITH_LOG:
                systemctl("disable", "--now", WATCH)
            systemctl("restart", UNIT)
        systemctl("enable", "--now", WATCH)
    assert_only_denials(storm)
    assert_locked()


@EBPF
def test_reload_and_reexec_under_load(backend: str) -> None:
    """A reload of the unit and a restart of systemd itself never unlock."""
    with Storm(STRANGER) as storm:
        systemctl("reload", UNIT)
        systemctl("daemon-reload")
        systemctl("daemon-reexec")
        systemctl("is-active", UNIT)
    assert_only_denials(storm)
    assert command("status").returncode == ACTIVE


@EBPF
def test_killing_all_processes_of_ours_leaves_the_lock(backend: str) -> None:
    """All that runs is the log of denials, and its child that reads about processes. Killing them changes no lock."""
    systemctl("start", WATCH)  # waits for a restart that is still running
    ours = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _is_ours(pid)]
    watch = int(show(WATCH, "MainPID"))
    assert watch in ours
    assert {psutil.Process(pid).ppid() for pid in ours if pid != watch} <= {watch}
    with Storm(STRANGER) as storm:
        for pid in ours:
            os.kill(pid, signal.SIGKILL)
        assert command("status").returncode == ACTIVE
    assert_only_denials(storm)
    assert_locked()


def _is_ours(pid: str) -> bool:
    try:
        return b"imds-guard" in Path("/proc", pid, "cmdline").read_bytes().split(b"\0")[1:2][0].rpartition(b"/")[2]
    except (OSError, IndexError):
        return False


@EBPF
def test_allow_for_a_time_takes_itself_back(backend: str) -> None:
    """A timer of systemd does it, and the journal has a line for both changes. What was there before stays."""
    answer = done("allow", "--for", "60s", "--user", str(STRANGER), "--user", str(ONE))
    assert "this ends at" in answer
    assert reach(STRANGER) == everywhere("connected")
    (ends,) = json.loads(done("status", "--json"))["temporary"]
    assert [user["id"] for user in ends["users"]] == [STRANGER]
    wait_until(lambda: not json.loads(done("status", "--json"))["temporary"], lambda: str(logged_changes()), PATIENCE_S)
    assert_locked()
    lines = [line for line in logged_changes() if f"user {STRANGER}" in line]
    assert [line.rpartition(": ")[2] for line in lines] == [f"+ user {STRANGER}", f"- user {STRANGER}"]
    assert 'command="allow --for 60s"' in lines[0]
    assert 'command="revoke --timer ' in lines[1]


def is_active_in(metrics: Path) -> str:
    """The value of imds_guard_active in a file of metrics; empty where there is none yet."""
    text = metrics.read_text(encoding="utf-8") if metrics.exists() else ""
    return "".join(re.findall(r"^imds_guard_active ([01])", text, re.MULTILINE))


@EBPF
def test_metrics_are_written_and_go_on_while_nothing_is_locked(backend: str) -> None:
    """Into the folder of another user, as that of node_exporter is."""
    TEXTFILES.mkdir()
    os.chown(TEXTFILES, ONE, ONE)
    done("install-service", "--textfile", str(TEXTFILES), "--now")
    metrics = TEXTFILES / "imds-guard.prom"
    wait_until(lambda: is_active_in(metrics) == "1", lambda: show("imds-guard-metrics.service", "Result"), PATIENCE_S)
    systemctl("stop", UNIT)
    wait_until(lambda: is_active_in(metrics) == "0", lambda: show("imds-guard-metrics.service", "Result"), PATIENCE_S)
    systemctl("start", UNIT)
    assert_locked()


@EBPF
def test_stop_opens_and_start_locks(backend: str) -> None:
    """systemctl stop leaves nothing, no guard of a cgroup either; systemctl start locks again by the configuration."""
    BY_HAND.mkdir()
    done("start", "--cgroup", str(BY_HAND), *CONFIG)
    assert f"also locked: {BY_HAND} (ebpf)" in done("status")
    systemctl("stop", UNIT)
    BY_HAND.rmdir()
    assert command("status").returncode == INACTIVE
    assert reach(STRANGER) == everywhere("connected")
    assert left() == []
    assert any("no longer locked: " in line for line in logged_changes()[-2:]), "the machine's, then the cgroup's"
    systemctl("start", UNIT)
    assert_locked()
    assert 'command="start --boot"' in logged_changes()[-1]


@EBPF
def test_a_stop_beside_the_service_says_how_to_lock_again(backend: str) -> None:
    """systemd counts the unit as started all the same, so a start would do nothing. status knows what boot does."""
    found = json.loads(done("status", "--json"))
    assert (found["boot"], found["file"]["in_force"]) == ({"unit": "enabled"}, True)
    stopped = command("stop")
    assert (stopped.returncode, "systemctl restart imds-guard locks again" in stopped.stderr) == (0, True), stopped
    systemctl("restart", UNIT)
    assert_locked()


@EBPF
def test_isolate_leaves_the_lock(backend: str) -> None:
    """systemctl isolate stops what the target does not want; on the way back the log of denials starts again."""
    QUIET.parent.mkdir(parents=True)
    QUIET.write_text("[Service]\nExecStartPre=\nExecStart=\nExecStart=/usr/bin/sleep infinity\n", encoding="ascii")
    systemctl("daemon-reload")
    with Storm(STRANGER) as storm:
        for target in ("rescue.target", "multi-user.target"):
            systemctl("isolate", target)
            assert show(target, "ActiveState") == "active"
            assert show(UNIT, "ActiveState") == "active"
            assert command("status").returncode == ACTIVE
    assert_only_denials(storm)
    assert_locked()
    assert show(WATCH, "ActiveState") == "active"


@EBPF
def test_preparation_of_the_reboot(backend: str) -> None:
    """Installs the caller whose result is read after the reboot, and the one that goes on through a soft reboot."""
    install_early_caller()
    assert show(UNIT, "UnitFileState") == "enabled"
    if can_soft_reboot():
        start_survivor()
