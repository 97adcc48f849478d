# SPDX-License-Identifier: Apache-2.0
"""Asks systemd for its state and its jobs, and starts, stops and enables units (systemctl(1))."""

from __future__ import annotations

import os
from collections.abc import Sequence

from imds_guard.errors import GuardError
from imds_guard.kernel.run import run


def is_booted() -> bool:
    """True when systemd is the init of this machine (sd_booted(3)): not in a chroot or in most containers."""
    return os.path.isdir("/run/systemd/system")


def job_of(unit: str) -> str:
    """The type of a unit's job in systemd's queue (``stop``, ``restart``, ...), or "" without one."""
    for line in systemctl("list-jobs", "--no-legend", "--plain", "--full", unit).splitlines():
        columns = line.split()
        if len(columns) >= 3 and columns[1] == unit:
            return columns[2]
    return ""


def is_going_down() -> bool:
    """True once the machine has been told to halt or to reboot."""
    # The exit status is not checked: it is 0 only for "running".
    return run(["systemctl", "is-system-running"]).stdout.strip() == "stopping"


def is_active(unit: str) -> bool:
    """True when a unit is active; False for one that does not exist."""
    return run(["systemctl", "is-active", "--quiet", unit]).status == 0


def is_enabled(unit: str) -> bool:
    """True when a unit is enabled."""
    return run(["systemctl", "is-enabled", "--quiet", unit]).status == 0


def enablement(unit: str) -> str:
    """``enabled``, ``disabled`` and others of ``systemctl is-enabled``; ``not-found`` for a unit without a file."""
    return run(["systemctl", "is-enabled", unit]).stdout.strip() or "not-found"


def run_in(unit: str, seconds: int, description: str, argv: Sequence[str]) -> None:
    """Makes a transient timer that runs a program, that many seconds from now (systemd-run(1)). Raises GuardError.

    Where the program fails it is run again every half minute, until it ends with 0, or is gone (203, EXIT_EXEC of
    systemd.exec(5)): nobody would end that.
    """
    options = [f"--unit={unit}", f"--description={description}", f"--on-active={seconds}s"]
    options += ["--property=Restart=on-failure", "--property=RestartSec=30s", "--property=StartLimitIntervalSec=0"]
    options += ["--property=RestartPreventExitStatus=203"]
    options += ["--timer-property=AccuracySec=1s", "--collect", "--quiet"]
    done = run(["systemd-run", *options, "--", *argv], timeout_s=60)
    if done.status != 0:
        raise GuardError(f"systemd-run --unit={unit}: {done.complaint}; nothing was changed")


def systemctl(*arguments: str) -> str:
    """Runs systemctl and returns its output. Raises GuardError."""
    done = run(["systemctl", *arguments], timeout_s=900)
    if done.status != 0:
        raise GuardError(f"systemctl {' '.join(arguments)}: {done.complaint}; see journalctl -xe")
    return done.stdout
