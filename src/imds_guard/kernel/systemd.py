# SPDX-License-Identifier: Apache-2.0
"""What systemd says of itself and of its jobs, and what we ask it to do (systemctl(1))."""

from __future__ import annotations

import os

from imds_guard.errors import GuardError
from imds_guard.kernel.run import run


def is_booted() -> bool:
    """True when systemd is the init of this machine (sd_booted(3)); not in a chroot or most containers."""
    return os.path.isdir("/run/systemd/system")


def job_of(unit: str) -> str:
    """The type of the job that systemd does for a unit now (``stop``, ``restart``, ...); "" when there is none."""
    for line in systemctl("list-jobs", "--no-legend", "--plain", "--full", unit).splitlines():
        words = line.split()
        if len(words) >= 3 and words[1] == unit:
            return words[2]
    return ""


def is_going_down() -> bool:
    """True from the moment when the machine is told to halt or to reboot."""
    # Its exit status is that of a machine that is not well.
    return run(["systemctl", "is-system-running"]).stdout.strip() == "stopping"


def is_active(unit: str) -> bool:
    """True when a unit is active; a unit that is not there is not."""
    return run(["systemctl", "is-active", "--quiet", unit]).status == 0


def systemctl(*words: str) -> str:
    """Runs systemctl; what it printed. Raises GuardError."""
    done = run(["systemctl", *words], timeout_s=900)
    if done.status != 0:
        raise GuardError(f"systemctl {' '.join(words)}: {done.complaint}; see journalctl -xe")
    return done.stdout
