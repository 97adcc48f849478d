# SPDX-License-Identifier: Apache-2.0
"""The check that repairs, and a broken configuration before the next boot. test_8_after_broken.py continues.

The order of the tests matters: each starts with the state that the one before has left.
"""

from __future__ import annotations

import os
from pathlib import Path

from vagrant.guest.service import NETWORK, REQUIRED, UNIT, VERIFY, journal, show, slow_down, systemctl
from vagrant.guest.test_5_service import EBPF, assert_locked
from vagrant.guest.world import ACTIVE, DEGRADED, IPV4, IPV6, ONE, command, done

FILE = Path("/etc/imds-guard/config.toml")
BAD_POLICY = 78
_CONFIGURATION = f"""\
on_error = "closed"

[lock."metadata"]
endpoints = ["{IPV4}", "{IPV6}"]
users = ["root", {ONE}]
"""


@EBPF
def test_without_a_configuration_nothing_is_installed(backend: str) -> None:
    """It prints one sentence and installs no unit."""
    result = command("install-service")
    assert (result.returncode, result.stdout) == (BAD_POLICY, ""), result
    assert f"there is no configuration {FILE} for it" in result.stderr
    assert list(Path("/etc/systemd/system").rglob("imds-guard*")) == []


@EBPF
def test_the_service_with_verify_and_the_gate(backend: str) -> None:
    """A second installation changes nothing; the timer runs with the unit."""
    FILE.parent.mkdir()
    FILE.write_text(_CONFIGURATION, encoding="utf-8")
    slow_down(UNIT, VERIFY.replace("timer", "service"), REQUIRED)
    systemctl("enable", NETWORK)
    for _ in range(2):
        done("install-service", "--verify", "--require-lock")
    systemctl("start", UNIT)
    assert [show(unit, "ActiveState") for unit in (UNIT, VERIFY)] == ["active"] * 2
    assert show(REQUIRED, "UnitFileState") == "enabled"
    assert_locked()


@EBPF
def test_the_timers_unit_repairs_and_logs_it(backend: str) -> None:
    """A hook loses its pin, and its link with it."""
    os.unlink("/sys/fs/bpf/imds-guard/link_connect6")
    assert command("status").returncode == DEGRADED
    systemctl("start", VERIFY.replace("timer", "service"))
    assert command("status").returncode == ACTIVE
    assert "repaired: the hook connect6 is not attached" in journal(VERIFY.replace("timer", "service"))
    assert_locked()


@EBPF
def test_a_reload_with_a_broken_configuration_leaves_the_lock_as_it_is(backend: str) -> None:
    """The broken configuration stays for the next boot."""
    FILE.write_text(FILE.read_text(encoding="utf-8") + "broken\n", encoding="utf-8")
    assert command("start", "--boot").returncode == BAD_POLICY
    assert_locked()
