# SPDX-License-Identifier: Apache-2.0
"""The service of the filters under systemd, with the fallback. test_8_filter_by_iptables_after_reboot.py continues.

The order of the tests matters: each starts with the state that the one before has left.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from vagrant.guest.filtered import (
    CONFIG,
    FILTER,
    REGION,
    SECRET,
    TEXT,
    ask,
    assert_filtered,
    kill_under_load,
    metadata_service,
    reload_with_other_rules,
)
from vagrant.guest.service import UNIT, slow_down, systemctl
from vagrant.guest.world import ACTIVE, STRANGER, command, done

IPTABLES = pytest.mark.parametrize("backend", ["iptables"], indirect=False)
DENIED = "ECONNREFUSED"
WITH_IPTABLES = f'backend = "iptables"\n\n{TEXT}'


@pytest.fixture(scope="module", autouse=True)
def metadata() -> Iterator[None]:
    """The service that is locked."""
    with metadata_service():
        yield


@IPTABLES
def test_install_service_starts_the_filter(backend: str) -> None:
    """Where the configuration names the fallback."""
    CONFIG.parent.mkdir(exist_ok=True)
    CONFIG.write_text(WITH_IPTABLES, encoding="utf-8")
    slow_down(UNIT, FILTER)
    assert "imds-guard is active (iptables)" in done("start")
    done("install-service", "--filter", "--without-root", "--now")
    systemctl("reload", UNIT)  # the account was not there before
    assert_filtered(DENIED)
    assert command("status").returncode == ACTIVE, command("status").stdout


@IPTABLES
def test_kill_9_under_load_never_gives_direct_access(backend: str) -> None:
    """Nobody listens, so the kernel refuses the connect."""
    kill_under_load(DENIED)
    assert_filtered(DENIED)


def assert_served_at(source: str) -> None:
    """On a real machine a caller has the address of an interface. Here it is another one of lo."""
    subprocess.run(["ip", "addr", "replace", f"{source}/32", "dev", "lo"], check=True)  # noqa: S607  (the guest's)
    assert ask(STRANGER, REGION, SECRET, source=source) == ["200", "403"]


@IPTABLES
def test_a_caller_with_the_address_of_an_interface_is_served(backend: str) -> None:
    """By the listeners that the service has made, and by those that a reload has made for it."""
    assert_served_at("10.9.9.9")
    reload_with_other_rules(WITH_IPTABLES)
    assert_served_at("10.9.9.9")


@IPTABLES
def test_flushed_rules_are_named_and_put_back(backend: str) -> None:
    """All of iptables: whoever flushes it opens the endpoint, and repair closes it again."""
    CONFIG.write_text(WITH_IPTABLES, encoding="utf-8")
    for table in ("nat", "mangle", "filter"):
        subprocess.run(["iptables", "-w", "-t", table, "-F"], check=True)  # noqa: S607  (the guest's)
    assert command("status").returncode != ACTIVE
    assert command("verify", "--repair").returncode == ACTIVE
    assert_filtered(DENIED)


@IPTABLES
def test_without_it_callers_are_denied_and_repair_starts_it(backend: str) -> None:
    """As the timer does every five minutes."""
    systemctl("stop", FILTER)
    assert ask(STRANGER, REGION, SECRET) == [DENIED, DENIED]
    assert command("verify", "--repair").returncode == ACTIVE
    assert_filtered(DENIED)
