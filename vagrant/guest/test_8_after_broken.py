# SPDX-License-Identifier: Apache-2.0
"""The same machine after a reboot with a configuration that can't be parsed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vagrant.guest import world
from vagrant.guest.service import NETWORK, REQUIRED, UNIT, VERIFY, exit_status_of, journal, show, systemctl
from vagrant.guest.test_5_service import EBPF, assert_locked
from vagrant.guest.test_7_broken import FILE
from vagrant.guest.world import ACTIVE, DEGRADED, INACTIVE, ONE, STRANGER, command, done, everywhere, left, reach


@EBPF
def test_the_emergency_lock_is_in_force(backend: str) -> None:
    """Only root connects; unit, journal and status report it. The network is up, because a lock is in force."""
    assert (show(UNIT, "ActiveState"), show(UNIT, "ExecMainStatus")) == ("failed", "78")
    assert "(emergency lock)" in journal(UNIT)
    status = command("status")
    assert (status.returncode, status.stdout.splitlines()[0]) == (
        DEGRADED,
        "imds-guard: degraded: emergency lock (ebpf)",
    )
    assert f"file: unusable: {FILE}:" in status.stdout
    assert re.search(r"^  line [0-9]+: broken$", status.stdout, re.MULTILINE), status.stdout
    assert reach(0) == everywhere("connected")
    for uid in (ONE, STRANGER):
        world.assert_denied("ebpf", reach(uid))
    assert [show(unit, "ActiveState") for unit in (REQUIRED, NETWORK, VERIFY)] == ["active"] * 3


@EBPF
def test_without_any_lock_the_network_does_not_start(backend: str) -> None:
    """With on_error = "open" and the gate, the gate keeps the network down."""
    systemctl("stop", NETWORK, f"{NETWORK.partition('.')[0]}.socket", REQUIRED, VERIFY)
    done("stop")
    text = FILE.read_text(encoding="utf-8")
    FILE.write_text(
        'on_error = "open"\n' + text.replace('on_error = "closed"\n', "").replace("broken\n", "colour = 1\n")
    )
    assert exit_status_of("start", NETWORK) != 0
    assert (show(NETWORK, "ActiveState"), show(REQUIRED, "ActiveState")) == ("inactive", "failed")
    assert command("status").returncode == INACTIVE
    FILE.write_text(text.replace("broken\n", ""), encoding="utf-8")
    systemctl("start", NETWORK)
    assert_locked()


@EBPF
def test_a_configuration_that_others_can_change_is_refused_in_the_unit(backend: str) -> None:
    """Its ProtectSystem=strict makes the file look as if nobody could change it."""
    os.chown(FILE, STRANGER, 0)
    assert exit_status_of("reload", UNIT) != 0
    assert f"{FILE} (owner {STRANGER}, group 0, mode 0644) can be changed by others than root" in journal(UNIT)
    assert_locked()
    os.chown(FILE, 0, 0)
    systemctl("reload", UNIT)
    assert_locked()


@EBPF
def test_a_repair_ends_the_emergency_lock_whose_reason_is_gone(backend: str) -> None:
    """As the timer does a minute after boot."""
    assert "OnActiveSec=1min" in systemctl("cat", VERIFY)
    systemctl("stop", UNIT)
    text = FILE.read_text(encoding="utf-8")
    FILE.write_text("broken\n", encoding="utf-8")
    assert exit_status_of("start", UNIT) != 0
    assert command("status").returncode == DEGRADED
    FILE.write_text(text, encoding="utf-8")
    systemctl("start", VERIFY.replace("timer", "service"))
    assert command("status").returncode == ACTIVE
    assert_locked()
    systemctl("restart", UNIT)


@EBPF
def test_the_network_outlives_restart_and_stop_of_the_lock(backend: str) -> None:
    """The network requires the gate, which neither of them stops."""
    before = show(NETWORK, "InvocationID")
    systemctl("restart", UNIT)
    assert command("status").returncode == ACTIVE
    systemctl("stop", UNIT)
    assert command("status").returncode == INACTIVE
    systemctl("start", UNIT)
    assert show(NETWORK, "InvocationID") == before


@EBPF
def test_uninstall_leaves_the_lock_and_the_network(backend: str) -> None:
    """Only imds-guard stop unlocks; then nothing is left."""
    before = show(NETWORK, "InvocationID")
    done("uninstall-service")
    assert (command("status").returncode, show(UNIT, "ActiveState")) == (ACTIVE, "inactive")
    assert_locked()
    assert (show(NETWORK, "InvocationID"), show(NETWORK, "ActiveState")) == (before, "active")
    assert [path for path in Path("/etc/systemd/system").rglob("imds-guard*") if not path.name.endswith(".d")] == []
    done("stop")
    assert left() == []
    assert "nothing to remove" in done("uninstall-service")
