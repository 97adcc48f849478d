# SPDX-License-Identifier: Apache-2.0
"""iptables is uninstalled while its rules are in force: they go on, and nobody can see or remove them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vagrant.guest import world
from vagrant.guest.world import ACTIVE, DEGRADED, STRANGER, command, reach

FAILED = 1
SAID = "rules of imds-guard should be in force, and can't be seen or changed until it runs"


@contextmanager
def without_iptables() -> Iterator[None]:
    """Hides the folder of system programs."""
    subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "empty", "/usr/sbin"], check=True)
    try:
        yield
    finally:
        subprocess.run(["/usr/bin/umount", "/usr/sbin"], check=True)


@pytest.mark.parametrize("backend", ["iptables"], indirect=True)
def test_the_lock_is_reported_as_degraded(backend: str) -> None:
    """Not as unknown: the rules are still there, and denied callers still denied."""
    with without_iptables():
        for words in (("status",), ("verify",), ("verify", "--repair")):
            found = command(*words)
            assert found.returncode == DEGRADED, found
            assert f"iptables is not in /usr/sbin:/usr/bin:/sbin:/bin: install the package iptables; {SAID}" in (
                " ".join(found.stdout.split()) + found.stderr
            )
        world.assert_denied(backend, reach(STRANGER))
    assert command("status").returncode == ACTIVE


@pytest.mark.parametrize("backend", ["iptables"], indirect=True)
def test_stop_says_what_it_can_not_remove(backend: str) -> None:
    """With a status that is not 0, since the lock is still there."""
    with without_iptables():
        stopped = command("stop")
        assert (stopped.returncode, stopped.stdout) == (FAILED, ""), stopped
        assert SAID in stopped.stderr
        world.assert_denied(backend, reach(STRANGER))
    assert command("status").returncode == ACTIVE
