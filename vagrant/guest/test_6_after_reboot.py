# SPDX-License-Identifier: Apache-2.0
"""The same machine after a reboot, in the state that test_5_service.py has left."""

from __future__ import annotations

from pathlib import Path

from vagrant.guest.service import DROP_IN, EARLY, NETWORK, UNIT, show
from vagrant.guest.test_5_service import EBPF, assert_locked
from vagrant.guest.world import ACTIVE, INACTIVE, STRANGER, command, done, everywhere, left, reach


@EBPF
def test_it_is_locked_again(backend: str) -> None:
    """By the unit alone; the programs are complete."""
    assert show(UNIT, "ActiveState") == "active"
    assert command("status").returncode == ACTIVE
    assert_locked()


@EBPF
def test_the_lock_was_there_before_the_network(backend: str) -> None:
    """By systemd's timestamps, and by a caller just before the units of the network start."""
    locked_at, network_at = (int(show(unit, "ActiveEnterTimestampMonotonic")) for unit in (UNIT, NETWORK))
    assert 0 < locked_at < network_at
    assert (EARLY / "outcome").read_text(encoding="ascii") == "EPERM\n"


@EBPF
def test_uninstall_leaves_nothing(backend: str) -> None:
    """No unit, no pin, no rule; the configuration belongs to the administrator and stays."""
    done("uninstall-service")
    done("stop")
    assert show(UNIT, "LoadState") == "not-found"
    assert list(Path("/etc/systemd/system").rglob("imds-guard*")) == [DROP_IN.parent]
    assert command("status").returncode == INACTIVE
    assert reach(STRANGER) == everywhere("connected")
    assert left() == []
