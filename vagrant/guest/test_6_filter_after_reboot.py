# SPDX-License-Identifier: Apache-2.0
"""The same machine after a reboot, in the state that test_5_filter.py has left."""

from __future__ import annotations

import pwd
from collections.abc import Iterator
from pathlib import Path

import pytest

from vagrant.guest.filtered import ACCOUNT, ADDRESS, FILTER, assert_filtered, metadata_service
from vagrant.guest.service import UNIT, show
from vagrant.guest.test_5_filter import EBPF
from vagrant.guest.world import ACTIVE, command, done


@pytest.fixture(scope="module", autouse=True)
def metadata() -> Iterator[None]:
    """The service that is locked."""
    with metadata_service():
        yield


@EBPF
def test_it_serves_again(backend: str) -> None:
    """By the units alone, with the same addresses."""
    assert show(UNIT, "ActiveState") == "active"
    assert_filtered()
    assert command("status").returncode == ACTIVE
    assert f"{ADDRESS}/32" in show(FILTER, "IPAddressAllow").split()


@EBPF
def test_uninstall_leaves_neither_unit_nor_account(backend: str) -> None:
    """What install-service has made, uninstall-service removes."""
    done("uninstall-service")
    done("stop")
    assert show(FILTER, "LoadState") == "not-found"
    # The drop-in is the test's own.
    assert list(Path("/etc/systemd/system").rglob("imds-guard-filter*")) == [Path(f"/etc/systemd/system/{FILTER}.d")]
    assert ACCOUNT not in {one.pw_name for one in pwd.getpwall()}
