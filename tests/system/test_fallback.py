# SPDX-License-Identifier: Apache-2.0
"""The commands on the fallback, beside rules of others in OUTPUT: what the lock can't hold against is named."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from imds_guard.kernel.run import run
from tests import command
from tests.command import ONE, SERVICE, STRANGER, TIMEOUT_S, Guard, Result

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making namespaces and cgroups needs root")

REDIRECT = (
    "-t",
    "nat",
    "-A",
    "OUTPUT",
    "-d",
    SERVICE,
    "-p",
    "tcp",
    "--dport",
    "80",
    "-j",
    "REDIRECT",
    "--to-ports",
    "80",
)
BEFORE_OURS = ("-t", "mangle", "-I", "OUTPUT", "1", "-d", SERVICE, "-j", "ACCEPT")


@pytest.fixture
def guard() -> Iterator[Guard]:
    with command.guard() as one:
        yield one


def inside(guard: Guard, *words: str) -> Result:
    """Runs a command on the machine of the sandbox: iptables judges one network namespace."""
    return guard.sandbox.call(lambda: command.run(command.argv(words)), timeout_s=TIMEOUT_S)


def iptables(guard: Guard, *words: str) -> None:
    done = guard.sandbox.call(lambda: run(["iptables", "-w", *words]))
    assert done.status == 0, done.complaint


def reach(guard: Guard) -> list[str]:
    return [guard.reach(uid, SERVICE) for uid in (ONE, STRANGER)]


def start(guard: Guard) -> Result:
    return inside(guard, "start", "--user", str(ONE), "--ip", SERVICE, "--backend", "iptables")


def test_a_redirect_does_not_open_the_lock(guard: Guard) -> None:
    """As the ECS agent and GKE have it. Who is allowed reaches the proxy."""
    guard.sandbox.serve(("127.0.0.1",), (80,))
    iptables(guard, *REDIRECT)
    assert reach(guard) == ["connected"] * 2
    assert start(guard).status == 0
    assert reach(guard) == ["connected", "ECONNREFUSED"]
    assert inside(guard, "status").status == 0


def test_what_opens_it_is_named_by_status_and_explain_and_repaired_by_verify(guard: Guard) -> None:
    """NAT, and an ACCEPT that somebody has put before our marks."""
    guard.sandbox.serve(("127.0.0.1",), (80,))
    start(guard)
    iptables(guard, *REDIRECT)
    iptables(guard, *BEFORE_OURS)
    assert reach(guard) == ["connected"] * 2
    status, explained = inside(guard, "status"), inside(guard, "explain", "--user", "nobody", SERVICE)
    assert status.status == 1
    for shown in (status, explained):
        assert "in mangle OUTPUT stand before ours" in " ".join(shown.stdout.split())
    repaired = inside(guard, "verify", "--repair")
    assert reach(guard) == ["connected", "ECONNREFUSED"]
    # The machine's status also names guards whose cgroup was just removed, by other tests.
    for shown in (repaired, inside(guard, "status")):
        assert shown.status == 0 or "the cgroup of a guard was removed" in " ".join(shown.stdout.split()), shown
    assert "stand before ours" not in inside(guard, "status").stdout


def test_start_names_what_it_can_not_stand_before(guard: Guard) -> None:
    """A chain of nft that changes marks behind mangle."""
    chain = "chain c { type filter hook output priority -120; policy accept\nmeta mark set 0x1\n}"
    done = guard.sandbox.call(lambda: run(["nft", "-f", "/proc/self/fd/0"], stdin=f"table inet other {{ {chain}\n}}\n"))
    assert done.status == 0, done.complaint
    started = start(guard)
    for shown, text in ((started, started.stderr), (status := inside(guard, "status"), status.stdout)):
        assert "may change the mark of what is denied" in " ".join(text.split()), shown
    assert (started.status, status.status) == (0, 1)
