# SPDX-License-Identifier: Apache-2.0
"""A kernel without IPv6 (ipv6.disable=1), with a policy that has IPv6 endpoints, as the built-in ones do."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vagrant.guest import world
from vagrant.guest.world import ACTIVE, IPV4, IPV6, LOCK, ONE, STRANGER, command, done, everywhere, left, reach

FILE = Path("/etc/imds-guard/config.toml")


def test_this_kernel_has_no_ipv6() -> None:
    """So the others test what they say."""
    assert world.SERVICES == (IPV4,)


def status() -> Any:
    """What ``status --json`` prints, which must be without a fault."""
    found = json.loads(done("status", "--json"))
    assert found["faults"] == []
    return found


@pytest.fixture
def legacy() -> Iterator[None]:
    """The commands are those of iptables-legacy. The other tests have iptables-nft, Debian's default."""
    _choose("legacy")
    yield
    _choose("nft")


def _choose(kind: str) -> None:
    for name in ("iptables", "ip6tables"):
        program = f"/usr/sbin/{name}-{kind}"
        subprocess.run(["/usr/bin/update-alternatives", "--quiet", "--set", name, program], check=True)


def test_iptables_legacy(legacy: None) -> None:
    """ip6tables-legacy fails here, whatever it is asked; no command may."""
    started = command("start", "--backend", "iptables", "--user", str(ONE), *LOCK)
    assert started.returncode == ACTIVE, started
    assert "this kernel has no IPv6 (ipv6.disable=1), so its endpoints are in no rule" in started.stderr
    assert status()["backend"] == "iptables"
    world.assert_denied("iptables", reach(STRANGER))
    done("allow", "--user", str(STRANGER))
    assert reach(STRANGER) == everywhere("connected")
    done("verify", "--repair")
    done("stop")
    assert left() == []


def test_ipv6_endpoints_alone_are_refused() -> None:
    """There is nothing to lock, and a lock that holds nothing would be reported as one."""
    refused = command("start", "--backend", "iptables", "--user", str(ONE), "--ip", IPV6)
    assert refused.returncode == world.UNSUPPORTED
    assert "this kernel has no IPv6 (ipv6.disable=1), and the policy locks nothing else" in refused.stderr


@pytest.mark.parametrize("name", world.BACKENDS)
def test_the_demonstration(name: str) -> None:
    """It shows IPv4. Nothing is locked meanwhile: a lock on the machine holds for its callers, too."""
    shown = json.loads(done("demo", "--backend", name, "--json"))
    assert (shown["backend"], shown["as_decided"]) == (name, True)
    assert {row["address"] for row in shown["rows"]} == {IPV4}


def test_a_repair_leaves_the_policy_as_it_is(backend: str) -> None:
    """Rules for IPv4 alone are all that can be in force."""
    before = status()
    repaired = command("verify", "--repair")
    assert repaired.returncode == ACTIVE, repaired
    assert "repaired" not in repaired.stdout
    assert status()["policy"] == before["policy"]


def test_boot(backend: str) -> None:
    """The configuration's policy is put in force, without the emergency lock."""
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(
        f'backend = "{backend}"\n[lock.x]\nendpoints = ["{IPV4}", "{IPV6}"]\nusers = [{ONE}]\n', encoding="ascii"
    )
    started = command("start", "--boot")
    assert started.returncode == ACTIVE, started
    assert status()["backend"] == backend
    world.assert_denied(backend, reach(STRANGER))
    assert reach(ONE) == everywhere("connected")
    FILE.unlink()
