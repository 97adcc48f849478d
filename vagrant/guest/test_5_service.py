# SPDX-License-Identifier: Apache-2.0
"""The service under systemd, on a machine that has just booted. test_6_after_reboot.py goes on where this ends.

The tests are one story, in their order: each begins with what the one before has left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vagrant.guest import world
from vagrant.guest.service import CONFIG, DROP_IN, SLOW, UNIT, WATCH, put_early_caller, show, systemctl
from vagrant.guest.storm import Storm
from vagrant.guest.world import ACTIVE, INACTIVE, ONE, STRANGER, command, done, everywhere, left, reach

EBPF = pytest.mark.parametrize("backend", ["ebpf"], indirect=False)
RESTARTS = 50
"""An emulated processor takes five seconds for a restart, and two more where the log of denials is restarted, too."""
WITH_THE_LOG = 3

_ADD_A_COMMENT = """
import imds_guard, pathlib
source = pathlib.Path(imds_guard.__file__).parent / "bpf/imds_guard.bpf.c"
source.write_text(source.read_text() + "/* the build before this one */\\n")
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


def refusals_alone(storm: Storm) -> None:
    """Nobody got through, and somebody tried."""
    assert set(storm.outcomes) == {"EPERM"}, storm.outcomes
    assert storm.outcomes["EPERM"] > RESTARTS, storm.outcomes


@EBPF
def test_an_older_build_is_installed_and_started(backend: str) -> None:
    """A build whose programs are of another version; its units are switched on, and what it locks is denied."""
    subprocess.run([sys.executable, "-I", "-c", _ADD_A_COMMENT], check=True)
    done("start", "--backend", backend, *CONFIG, "--save")
    DROP_IN.parent.mkdir()
    DROP_IN.write_text(SLOW, encoding="utf-8")
    done("install-service", "--watch", "--now")
    assert (show(UNIT, "ActiveState"), show(UNIT, "UnitFileState")) == ("active", "enabled")
    assert_locked()


@EBPF
def test_an_upgrade_under_load(backend: str) -> None:
    """The new build in its place, and a restart: hook by hook, and the denied caller never gets through."""
    before = version()
    (wheel,) = Path("/job").glob("*.whl")
    with Storm(STRANGER) as storm:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall"]
        subprocess.run([*pip, str(wheel)], check=True, env={**os.environ, "PIP_BREAK_SYSTEM_PACKAGES": "1"})
        systemctl("restart", UNIT)
    assert version() != before
    assert command("status").returncode == ACTIVE
    refusals_alone(storm)


@EBPF
def test_many_restarts_under_load(backend: str) -> None:
    """The stop in a restart opens nothing, with the log of denials and without it: it has no part in the lock."""
    with Storm(STRANGER) as storm:
        for number in range(RESTARTS):
            if number == WITH_THE_LOG:
                systemctl("disable", "--now", WATCH)
            systemctl("restart", UNIT)
        systemctl("enable", "--now", WATCH)
    refusals_alone(storm)
    assert_locked()


@EBPF
def test_reload_and_reexec_under_load(backend: str) -> None:
    """Nor do a reload, and a new systemd."""
    with Storm(STRANGER) as storm:
        systemctl("reload", UNIT)
        systemctl("daemon-reload")
        systemctl("daemon-reexec")
        systemctl("is-active", UNIT)
    refusals_alone(storm)
    assert command("status").returncode == ACTIVE


@EBPF
def test_kill_of_everything_of_ours(backend: str) -> None:
    """The log of denials is the one process that runs. Killed, it leaves the lock as it was."""
    systemctl("start", WATCH)  # where the restart before it is not through, this waits for it
    ours = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _is_ours(pid)]
    assert ours == [int(show(WATCH, "MainPID"))]
    with Storm(STRANGER) as storm:
        for pid in ours:
            os.kill(pid, signal.SIGKILL)
        assert command("status").returncode == ACTIVE
    refusals_alone(storm)
    assert_locked()


def _is_ours(pid: str) -> bool:
    try:
        return b"imds-guard" in Path("/proc", pid, "cmdline").read_bytes().split(b"\0")[1:2][0].rpartition(b"/")[2]
    except (OSError, IndexError):
        return False


@EBPF
def test_stop_opens_and_start_locks(backend: str) -> None:
    """systemctl stop leaves nothing; systemctl start locks again what the configuration says."""
    systemctl("stop", UNIT)
    assert command("status").returncode == INACTIVE
    assert reach(STRANGER) == everywhere("connected")
    assert left() == []
    systemctl("start", UNIT)
    assert_locked()


@EBPF
def test_ready_for_the_reboot(backend: str) -> None:
    """What the next boot is asked for afterwards is in place."""
    put_early_caller()
    assert show(UNIT, "UnitFileState") == "enabled"
