# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of the service before and after a reboot."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from vagrant.guest.world import IPV4, LOCK, ONE, OTHERS, PATIENCE_S, STRANGER

UNIT, WATCH = "imds-guard.service", "imds-guard-watch.service"
VERIFY, REQUIRED = "imds-guard-verify.timer", "imds-guard-required.service"
CONFIG = ("--user", str(ONE), "--user", "root", *LOCK)
EARLY = Path("/var/lib/early-caller")
"""The StateDirectory of the unit. Root makes it, and systemd gives it to the user of the unit."""
NETWORK = "systemd-networkd.service"

DROP_IN = Path(f"/etc/systemd/system/{UNIT}.d/slow.conf")
SLOW = f"""\
# The limit of the unit itself is too short for an emulated machine.
[Service]
TimeoutStartSec={PATIENCE_S}
"""

_CALL = f"""\
import errno, socket
with socket.socket() as one:
    print(errno.errorcode.get(one.connect_ex(("{IPV4}", 80)), "connected"))
"""

_UNIT = f"""\
# Runs before the units of the network, and connects as a user who is not allowed to.
[Unit]
DefaultDependencies=no
After=network-pre.target
Before={NETWORK}
[Service]
Type=oneshot
User=early-caller
StateDirectory=early-caller
ExecStart=/usr/bin/python3 -I -S {EARLY}/call.py
StandardOutput=truncate:{EARLY}/outcome
[Install]
WantedBy={NETWORK}
"""


def systemctl(*arguments: str) -> str:
    """Runs systemctl, which must succeed, and returns its output."""
    ended = subprocess.run(
        ["/usr/bin/systemctl", *arguments], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert ended.returncode == 0, (arguments, ended, _journal())
    return ended.stdout.strip()


def show(unit: str, name: str) -> str:
    """One property of a unit."""
    return systemctl("show", "--property", name, "--value", unit)


def exit_status_of(*arguments: str) -> int:
    """The exit status of systemctl."""
    argv = ["/usr/bin/systemctl", *arguments]
    return subprocess.run(argv, capture_output=True, timeout=PATIENCE_S, check=False).returncode


def journal(unit: str) -> str:
    """The messages of a unit since the boot."""
    argv = ["/usr/bin/journalctl", "-b", "-o", "cat", "--no-pager", "-u", unit]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def logged_changes() -> list[str]:
    """The audit trail since the boot: a line for each change of policy."""
    argv = ["/usr/bin/journalctl", "-b", "-o", "cat", "--no-pager", "-t", "imds-guard", "-g", "^policy changed: "]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()


def slow_down(*units: str) -> None:
    """Gives units more time, for an emulated machine."""
    for unit in units:
        folder = Path(f"/etc/systemd/system/{unit}.d")
        folder.mkdir(exist_ok=True)
        (folder / DROP_IN.name).write_text(SLOW, encoding="utf-8")


def install_early_caller() -> None:
    """Installs a caller between network-pre.target and the network. Its result is read after the reboot."""
    subprocess.run(["/usr/sbin/groupadd", "-g", str(OTHERS), "others"], check=True)
    subprocess.run(["/usr/sbin/useradd", "-M", "-u", str(STRANGER), "-g", "others", "early-caller"], check=True)
    EARLY.mkdir()
    (EARLY / "call.py").write_text(_CALL, encoding="utf-8")
    Path("/etc/systemd/system/early-caller.service").write_text(_UNIT, encoding="utf-8")
    systemctl("daemon-reload")
    systemctl("enable", "early-caller.service", NETWORK)


# --- a soft reboot ----------------------------------------------------------------------------------------------------

_SURVIVOR = "survivor.service"
_OUTCOMES = Path("/run/survivor")
_STRANGER_CALLS = f"""\
import errno, json, select, signal, socket
counts, going = {{}}, True
def end(*_):
    global going
    going = False
signal.signal(signal.SIGTERM, end)
while going:
    with socket.socket() as one:
        outcome = errno.errorcode.get(one.connect_ex(("{IPV4}", 80)), "connected")
    counts[outcome] = counts.get(outcome, 0) + 1
    select.select([], [], [], 0.02)
print(json.dumps(counts))
"""
_SURVIVING_UNIT = f"""\
# Survives a soft reboot, as systemd-soft-reboot.service(8) describes it.
[Unit]
DefaultDependencies=no
SurviveFinalKillSignal=yes
IgnoreOnIsolate=yes
[Service]
User={STRANGER}
ExecStart=/usr/bin/python3 -I -S {EARLY}/survivor.py
StandardOutput=truncate:{_OUTCOMES}
"""


def can_soft_reboot() -> bool:
    """True for systemd 254 and later."""
    return int(systemctl("--version").split()[1]) >= 254


def start_survivor() -> None:
    """Starts a caller that goes on through a soft reboot. It is to be denied all the time."""
    (EARLY / "survivor.py").write_text(_STRANGER_CALLS, encoding="utf-8")
    Path(f"/etc/systemd/system/{_SURVIVOR}").write_text(_SURVIVING_UNIT, encoding="utf-8")
    systemctl("daemon-reload")
    systemctl("start", _SURVIVOR)


def outcomes_of_survivor() -> dict[str, int]:
    """How often each outcome came. Ends it."""
    systemctl("stop", _SURVIVOR)
    found: dict[str, int] = json.loads(_OUTCOMES.read_text(encoding="ascii"))
    return found


def _journal() -> str:
    said = subprocess.run(
        ["/usr/bin/journalctl", "-b", "--no-pager", "-n", "40"], capture_output=True, text=True, check=False
    )
    return said.stdout
