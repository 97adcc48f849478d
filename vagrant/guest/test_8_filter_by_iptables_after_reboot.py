# SPDX-License-Identifier: Apache-2.0
"""The same machine after a reboot, in the state that test_7_filter_by_iptables.py has left."""

from __future__ import annotations

import pwd
from collections.abc import Iterator

import pytest

from vagrant.guest.filtered import ACCOUNT, FILTER, assert_filtered, metadata_service
from vagrant.guest.service import UNIT, show
from vagrant.guest.test_7_filter_by_iptables import DENIED, IPTABLES
from vagrant.guest.world import ACTIVE, command, done


@pytest.fixture(scope="module", autouse=True)
def metadata() -> Iterator[None]:
    """The service that is locked."""
    with metadata_service():
        yield


@IPTABLES
def test_it_serves_again(backend: str) -> None:
    """By the units alone, with the same backend. Callers have any address of the machine."""
    assert show(UNIT, "ActiveState") == "active"
    assert_filtered(DENIED)
    said = command("status")
    assert (said.returncode, "active (iptables)" in said.stdout) == (ACTIVE, True), said
    assert set(show(FILTER, "IPAddressAllow").split()) == {"0.0.0.0/0", "::/0"}


@IPTABLES
def test_uninstall_and_stop_leave_nothing(backend: str) -> None:
    """No unit, no account, no rule."""
    done("uninstall-service")
    done("stop")
    assert show(FILTER, "LoadState") == "not-found"
    assert ACCOUNT not in {one.pw_name for one in pwd.getpwall()}
