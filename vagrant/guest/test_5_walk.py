# SPDX-License-Identifier: Apache-2.0
"""The lines of README.md and docs/operations.md on a machine that has just booted, until its reboot.

The order of the tests matters: each starts with the state that the one before has left.
"""

from __future__ import annotations

import grp
import re
import subprocess
from pathlib import Path

import pytest

from vagrant.guest import walk, world
from vagrant.guest.service import UNIT, VERIFY, slow_down
from vagrant.guest.walk import Line

LATER = Path(f"/etc/systemd/system/{VERIFY}.d/later.conf")
DEPLOY, WWW_DATA, MEMBER = world.TWO, 33, world.ONE


def who_passes() -> frozenset[str]:
    """Those who reach every one of the services. The others must reach none."""
    members = [group.gr_gid for group in grp.getgrall() if group.gr_name == "canAccessIP"]
    tries = {"root": (0, ()), "member": (MEMBER, members), "deploy": (DEPLOY, ()), "www-data": (WWW_DATA, ())}
    found = {name: set(world.reach(uid, *groups)[:1]) for name, (uid, groups) in tries.items()}
    assert set().union(*found.values()) <= {"connected", "EPERM"}, found
    return frozenset(name for name, outcomes in found.items() if outcomes == {"connected"})


def assert_does(line: Line) -> None:
    """Types the line in a shell, and looks at the exit status, at what it printed, and at who passes."""
    done = subprocess.run(
        ["/bin/sh", "-c", line.typed or line.written],
        cwd="/",
        env={**world.environment(), "PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "SYSTEMD_PAGER": ""},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=world.PATIENCE_S,
        check=False,
    )
    assert done.returncode == line.status, done
    assert re.search(line.says, done.stdout), done
    assert who_passes() == line.passes, done


def test_the_machine_has_the_accounts_of_the_pages() -> None:
    """And nothing of ours runs by itself meanwhile: the check every five minutes would lock again."""
    subprocess.run(["/usr/sbin/useradd", "-M", "-u", str(DEPLOY), "deploy"], check=True)
    slow_down(UNIT)
    LATER.parent.mkdir(parents=True)
    LATER.write_text("[Timer]\nOnActiveSec=\nOnUnitInactiveSec=\nOnActiveSec=1d\n", encoding="ascii")
    assert who_passes() == walk.EVERYBODY


@pytest.mark.parametrize("line", walk.FIRST_LOCK, ids=lambda line: line.written)
def test_the_first_lock(line: Line) -> None:
    """README.md, "First lock"."""
    assert_does(line)


@pytest.mark.parametrize("line", walk.DAY_1, ids=lambda line: line.written)
def test_day_1(line: Line) -> None:
    """From audit to a lock at every boot."""
    assert_does(line)


@pytest.mark.parametrize("line", walk.DAY_2, ids=lambda line: line.written)
def test_day_2(line: Line) -> None:
    """Users who come and go, and the ways out when everything is denied."""
    assert_does(line)


@pytest.mark.parametrize("line", walk.WRONG, ids=lambda line: line.written)
def test_what_is_mistyped(line: Line) -> None:
    """Nothing changes."""
    assert_does(line)
