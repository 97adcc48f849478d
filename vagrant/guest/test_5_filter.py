# SPDX-License-Identifier: Apache-2.0
"""The service of the filters under systemd. test_6_filter_after_reboot.py continues after these.

The order of the tests matters: each starts with the state that the one before has left.
"""

from __future__ import annotations

import pwd
from collections.abc import Iterator
from pathlib import Path

import pytest

from vagrant.guest.filtered import (
    ACCOUNT,
    ADDRESS,
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
from vagrant.guest.service import UNIT, show, slow_down, systemctl
from vagrant.guest.world import ACTIVE, DEGRADED, STRANGER, command, done

EBPF = pytest.mark.parametrize("backend", ["ebpf"], indirect=False)


@pytest.fixture(scope="module", autouse=True)
def metadata() -> Iterator[None]:
    """The service that is locked."""
    with metadata_service():
        yield


@EBPF
def test_install_service_makes_the_account_and_starts_the_filter(backend: str) -> None:
    """One command, after the configuration is written."""
    CONFIG.parent.mkdir(exist_ok=True)
    CONFIG.write_text(TEXT, encoding="utf-8")
    slow_down(UNIT, FILTER)
    done("start")  # compiles: boot has a deadline, which an emulated processor may miss
    said = done("install-service", "--filter", "--without-root", "--now")
    assert f"made the account {ACCOUNT}" in said
    assert show(FILTER, "UnitFileState") == "enabled"
    # The account was not there when the lock was put in force for the first time.
    systemctl("reload", UNIT)
    assert_filtered()
    assert command("status").returncode == ACTIVE, command("status").stdout


@EBPF
def test_it_has_no_rights_and_reaches_nothing_else(backend: str) -> None:
    """By the kernel's record of the process, and by systemd's filter of addresses."""
    status = Path("/proc", show(FILTER, "MainPID"), "status").read_text(encoding="ascii")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert set(fields["Uid"].split()) == {str(pwd.getpwnam(ACCOUNT).pw_uid)}
    assert (int(fields["CapEff"], 16), int(fields["CapPrm"], 16), fields["NoNewPrivs"].strip()) == (0, 0, "1")
    allowed = show(FILTER, "IPAddressAllow").split()
    assert set(allowed) == {"127.0.0.0/8", "::1/128", f"{ADDRESS}/32"}
    assert set(show(FILTER, "IPAddressDeny").split()) == {"0.0.0.0/0", "::/0"}


@EBPF
def test_kill_9_under_load_never_gives_direct_access(backend: str) -> None:
    """systemd starts it again; meanwhile the caller is denied at once."""
    # The listener may go between the hook's look at it and the arrival of the SYN: ECONNREFUSED.
    kill_under_load("EPERM", "ECONNREFUSED")
    assert_filtered()


@EBPF
def test_a_reload_changes_the_rules_and_not_the_process(backend: str) -> None:
    """The command hands new listeners to the process that runs."""
    reload_with_other_rules(TEXT)


@EBPF
def test_without_it_callers_are_denied_and_repair_starts_it(backend: str) -> None:
    """As the timer does every five minutes."""
    systemctl("stop", FILTER)
    assert ask(STRANGER, REGION, SECRET) == ["EPERM", "EPERM"]
    said = command("status")
    assert (said.returncode, "the filter does not serve 'region'" in said.stdout.replace("\n         ", " ")) == (
        DEGRADED,
        True,
    ), said
    assert command("verify", "--repair").returncode == ACTIVE
    assert_filtered()


@EBPF
def test_it_stops_and_starts_with_the_lock(backend: str) -> None:
    """PartOf= and WantedBy=."""
    systemctl("restart", UNIT)
    assert_filtered()
    systemctl("stop", UNIT)
    assert show(FILTER, "ActiveState") in ("inactive", "failed")
    systemctl("start", UNIT)
    assert_filtered()
    assert command("status").returncode == ACTIVE


@EBPF
def test_refusals_are_reported(backend: str) -> None:
    """With the path, and without the query."""
    ask(STRANGER, f"{SECRET}?token=abc")
    said = done("report")
    assert f"GET {SECRET}" in said
    assert "abc" not in said
    assert 'imds_guard_filter_requests_total{filter="region",outcome="refused"}' in done("metrics")
