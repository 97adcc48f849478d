# SPDX-License-Identifier: Apache-2.0
"""systemd after a soft reboot (systemd-soft-reboot.service(8)): the kernel goes on, and so must the lock.

The state is the one that test_5_service.py has left.
"""

from __future__ import annotations

from vagrant.guest.service import UNIT, WATCH, outcomes_of_survivor, show, systemctl
from vagrant.guest.test_5_service import EBPF, assert_locked
from vagrant.guest.world import ACTIVE, command

MANY = 50


@EBPF
def test_it_was_a_soft_reboot(backend: str) -> None:
    """The manager counts them."""
    assert systemctl("show", "--property", "SoftRebootsCount", "--value") == "1"


@EBPF
def test_the_lock_was_there_all_the_time(backend: str) -> None:
    """By a caller that was killed neither with the services nor by the last signal to everybody."""
    outcomes = outcomes_of_survivor()
    assert set(outcomes) == {"EPERM"}, outcomes
    assert outcomes["EPERM"] > MANY, outcomes


@EBPF
def test_it_is_locked_and_the_units_are_up(backend: str) -> None:
    """Pins, maps and links are those from before."""
    assert command("status").returncode == ACTIVE
    assert_locked()
    assert [show(unit, "ActiveState") for unit in (UNIT, WATCH)] == ["active"] * 2
