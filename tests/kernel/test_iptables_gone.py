# SPDX-License-Identifier: Apache-2.0
"""A command of iptables that is not installed, or was uninstalled while rules are in force."""

from __future__ import annotations

import ipaddress
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imds_guard.backends.iptables import IptablesBackend
from imds_guard.errors import GuardError, Unsupported
from imds_guard.kernel import syscalls
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.model import Endpoint, Identities, Lock, make_policy
from imds_guard.policy.ports import ALL_PORTS
from tests.tools import need

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces needs root")

SAID = "rules of imds-guard should be in force, and can't be seen or changed until it runs"
POLICY = make_policy(
    [
        Lock(
            "x",
            tuple(Endpoint(ipaddress.ip_network(one), ALL_PORTS) for one in ("192.0.2.1", "2001:db8::1")),
            Identities(users=frozenset({41_001})),
        )
    ]
)
FOLDER = "/usr/sbin"


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    need("iptables", "ip6tables")
    with Sandbox() as one:
        yield one


def hide(name: str, folder: Path) -> None:
    """Hides the programs of FOLDER whose names begin with ``name``, in a mount namespace of the calling process.

    The folder becomes one of links to the programs that are left. They stay where their own links find them.
    """
    syscalls.unshare(syscalls.CLONE_NEWNS)
    subprocess.run(["/usr/bin/mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["/usr/bin/mount", "--bind", FOLDER, str(folder)], check=True)
    subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "links", FOLDER], check=True)
    for program in os.listdir(folder):
        if not program.startswith(name):
            os.symlink(folder / program, os.path.join(FOLDER, program))


def backend(folder: Path) -> IptablesBackend:
    return IptablesBackend(state_folder=str(folder))


@pytest.mark.parametrize(("gone", "named"), [("ip", ["iptables", "ip6tables"]), ("ip6tables", ["ip6tables"])])
def test_the_rules_are_there_and_can_not_be_seen(sandbox: Sandbox, tmp_path: Path, gone: str, named: list[str]) -> None:
    """A fault for each command, no policy, and an error for whoever wants to remove the rules."""

    def inside() -> tuple[bool, list[str], bool, str]:
        backend(tmp_path).apply(POLICY)
        (tmp_path / "programs").mkdir()
        hide(gone, tmp_path / "programs")
        one = backend(tmp_path)
        try:
            one.remove()
            said = "removed"
        except GuardError as error:
            said = str(error)
        return one.in_force(), one.faults(), one.describe().policy is None, said

    in_force, faults, unreadable, said = sandbox.call(inside, timeout_s=60)
    assert (in_force, unreadable) == (True, True)
    assert [fault.partition(" ")[0] for fault in faults] == named
    assert all(fault.endswith(SAID) for fault in faults)
    assert said == "; ".join(faults)


def test_what_can_be_removed_is_removed(sandbox: Sandbox, tmp_path: Path) -> None:
    """Rules of a command that is still there go. When the other one is back a second stop removes the rest."""

    def inside() -> tuple[str, str]:
        backend(tmp_path).apply(POLICY)
        (tmp_path / "programs").mkdir()
        hide("ip6tables", tmp_path / "programs")
        with pytest.raises(GuardError):
            backend(tmp_path).remove()
        first = subprocess.run(["/usr/sbin/iptables-save"], capture_output=True, text=True, check=True).stdout
        subprocess.run(["/usr/bin/umount", FOLDER], check=True)
        backend(tmp_path).remove()
        return first, subprocess.run(["/usr/sbin/ip6tables-save"], capture_output=True, text=True, check=True).stdout

    assert ["IMDS" in text for text in sandbox.call(inside, timeout_s=60)] == [False, False]


def test_without_ip6tables_nothing_is_locked_by_half(sandbox: Sandbox, tmp_path: Path) -> None:
    """A machine that never had it: no command but start fails, and that says what to install."""

    def inside() -> tuple[str, bool, list[str]]:
        (tmp_path / "programs").mkdir()
        hide("ip6tables", tmp_path / "programs")
        one = backend(tmp_path)
        try:
            one.apply(POLICY)
            said = "applied"
        except Unsupported as error:
            said = str(error)
        one.remove()
        return said, one.in_force(), one.faults()

    said, in_force, faults = sandbox.call(inside, timeout_s=60)
    assert said == "ip6tables is not in /usr/sbin:/usr/bin:/sbin:/bin: install the package iptables"
    assert (in_force, faults) == (False, [])
