# SPDX-License-Identifier: Apache-2.0
"""ip-lockdown, which takes the place of the script of that name, and the commands on the fallback."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Callable

import pytest

from tests import command
from tests.command import NEIGHBOUR, ONE, SERVICE, SERVICE_V6, STAFF, STRANGER, TIMEOUT_S, TWO, Guard, Result
from tests.tools import need

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making namespaces and cgroups needs root")

Command = Callable[..., Result]


@pytest.fixture
def guard() -> Iterator[Guard]:
    with command.guard() as one:
        yield one


def _inside(guard: Guard, *words: str, entry: str = "main") -> Result:
    """Runs the command on iptables, in the sandbox's network namespace."""
    return guard.sandbox.call(lambda: command.run(command.argv(words, entry=entry)), timeout_s=TIMEOUT_S)


@pytest.fixture(params=["ebpf", "iptables"])
def lock_down(request: pytest.FixtureRequest, guard: Guard) -> Command:
    """``ip-lockdown`` with each backend."""

    def on_ebpf(*words: str) -> Result:
        return command.run(command.argv(("--cgroup", guard.sandbox.cgroup, *words), entry="ip_lockdown"))

    def on_iptables(*words: str) -> Result:
        return _inside(guard, "--backend", "iptables", *words, entry="ip_lockdown")

    return on_ebpf if request.param == "ebpf" else on_iptables


def _through(guard: Guard) -> list[tuple[str, int]]:
    """The (address, user ID) pairs that get through."""
    return [(to, uid) for to in (SERVICE, NEIGHBOUR) for uid in (0, ONE, TWO) if guard.reach(uid, to) == "connected"]


def test_it_denies_an_address_to_all_but_these(guard: Guard, lock_down: Command) -> None:
    assert lock_down(SERVICE, str(ONE), "0").status == 0
    assert _through(guard) == [(SERVICE, 0), (SERVICE, ONE), (NEIGHBOUR, 0), (NEIGHBOUR, ONE), (NEIGHBOUR, TWO)]


def test_it_adds_and_never_takes_away(guard: Guard, lock_down: Command) -> None:
    """The second call's user is added to the first one's."""
    lock_down(SERVICE, str(ONE))
    assert lock_down(SERVICE, str(TWO)).status == 0
    assert [uid for to, uid in _through(guard) if to == SERVICE] == [ONE, TWO]


def test_another_address_is_another_lock(guard: Guard, lock_down: Command) -> None:
    """Locking A for ONE and B for TWO does not let TWO reach A."""
    lock_down(SERVICE, str(ONE))
    assert lock_down(NEIGHBOUR, str(TWO)).status == 0
    assert _through(guard) == [(SERVICE, ONE), (NEIGHBOUR, TWO)]


def test_the_same_again_changes_nothing(guard: Guard, lock_down: Command) -> None:
    lock_down(SERVICE, str(ONE))
    again = lock_down(SERVICE, str(ONE))
    assert again.status == 0
    assert "already" in again.stdout
    assert [uid for to, uid in _through(guard) if to == SERVICE] == [ONE]


def test_without_users_nobody_gets_through(guard: Guard, lock_down: Command) -> None:
    assert lock_down(SERVICE).status == 0
    assert [uid for to, uid in _through(guard) if to == SERVICE] == []


@pytest.mark.parametrize(
    ("words", "status"), [(("192.0.2.999",), 78), (("192.0.2.1", "no-such-user"), 78), ((), 2)], ids=str
)
def test_a_mistake_is_reported_on_stderr_and_locks_nothing(
    guard: Guard, lock_down: Command, words: tuple[str, ...], status: int
) -> None:
    done = lock_down(*words)
    assert (done.status, done.stdout) == (status, "")
    assert done.stderr
    assert "Traceback" not in done.stderr
    assert len(_through(guard)) == 6


# --- the commands on iptables ---------------------------------------------------------------------------------------


def test_every_command_works_on_iptables(guard: Guard) -> None:
    """start, status, allow, revoke, explain and stop, as with eBPF."""
    assert _inside(guard, "status").status == 3
    started = _inside(guard, "start", "--backend", "iptables", "--user", str(ONE), "--ip", SERVICE, "--ip", SERVICE_V6)
    assert started.status == 0, started
    assert "active (iptables)" in started.stdout
    assert (guard.reach(ONE), guard.reach(STRANGER), guard.reach(STRANGER, SERVICE_V6)) == (
        "connected",
        "ECONNREFUSED",
        "ECONNREFUSED",
    )
    status = _inside(guard, "status", "--json")
    assert (status.status, status.values["state"], status.values["backend"]) == (0, "active", "iptables")
    assert _inside(guard, "allow", "--user", str(TWO)).status == 0
    assert guard.reach(TWO) == "connected"
    assert _inside(guard, "revoke", "--user", str(ONE)).status == 0
    assert (guard.reach(ONE), guard.reach(TWO)) == ("ECONNREFUSED", "connected")
    assert _inside(guard, "stop").status == 0
    assert guard.reach(STRANGER) == "connected"
    assert _inside(guard, "status").status == 3


def test_after_another_tool_flushes_the_status_is_degraded_and_start_repairs(guard: Guard) -> None:
    words = ("start", "--backend", "iptables", "--user", str(ONE), "--ip", SERVICE)
    _inside(guard, *words)
    flushed = guard.sandbox.call(lambda: command.run(("iptables", "-F")), timeout_s=TIMEOUT_S)
    assert flushed.status == 0
    degraded = _inside(guard, "status")
    assert degraded.status == 1
    assert "fault" in degraded.stdout
    assert _inside(guard, *words).status == 0
    assert _inside(guard, "status").status == 0
    assert guard.reach(STRANGER) == "ECONNREFUSED"


def test_changes_are_named_and_audit_is_left_in_one_step(guard: Guard) -> None:
    """The same words as under eBPF. The rules for forwarded packets follow the mode."""
    need("nft")
    start = ("start", "--backend", "iptables", "--user", str(ONE), "--ip", SERVICE)
    assert f"now locked: {SERVICE} and 1 more\n" in _inside(guard, *start, "--ip", NEIGHBOUR, "--mode", "audit").stdout
    assert guard.reach(STRANGER) == "connected"
    done = _inside(guard, "mode", "enforce")
    assert done.stdout.startswith("mode: audit -> enforce\n")
    assert "forwarded packets to locked endpoints are rejected" in done.stdout
    assert guard.reach(STRANGER) == "ECONNREFUSED"
    dry = _inside(guard, "allow", "--user", str(TWO), "--ip", SERVICE, "--dry-run")
    assert dry.stdout == f"+ user {TWO} at {SERVICE}\nnothing was changed (--dry-run)\n"
    assert guard.reach(TWO) == "ECONNREFUSED"
    fewer = _inside(guard, *start, "--forwarded", "leave")
    assert fewer.stdout.startswith(f"no longer locked: {NEIGHBOUR}\nforwarded: drop -> leave\n")
    assert "locks less than now" in fewer.stderr
    assert _inside(guard, "stop").status == 0


def test_a_cgroup_needs_ebpf(guard: Guard) -> None:
    done = guard("start", "--backend", "iptables", "--user", str(ONE), "--ip", SERVICE)
    assert done.status == 2
    assert "--cgroup" in done.sentence


def test_forwarded_packets_are_rejected_too(guard: Guard) -> None:
    """In tables of our own. status and its JSON say so, verify puts them back after a flush, stop removes them."""
    need("nft")

    def tables() -> str:
        return guard.sandbox.call(lambda: command.run(("nft", "list", "tables")), timeout_s=TIMEOUT_S).stdout

    started = _inside(guard, "start", "--backend", "iptables", "--user", str(ONE), "--ip", SERVICE)
    assert started.status == 0, started
    assert "forwarded packets to locked endpoints are rejected, by rules written with nft" in started.stdout
    assert "table ip imds-guard-forward" in tables()
    status = _inside(guard, "status")
    assert status.status == 0
    assert "forwarded packets to locked endpoints: rejected" in status.stdout
    guard.sandbox.call(lambda: command.run(("nft", "delete", "table", "ip", "imds-guard-forward")))
    degraded = _inside(guard, "status", "--json")
    assert (degraded.status, json.loads(degraded.stdout)["forwarded"]["state"]) == (1, "open")
    repaired = _inside(guard, "verify", "--repair")
    assert (repaired.status, "the rules were put back" in repaired.stdout) == (0, True), repaired
    assert "table ip imds-guard-forward" in tables()
    assert _inside(guard, "stop").status == 0
    assert "imds" not in tables()


def test_iptables_restore_loads_an_export(guard: Guard) -> None:
    """The text loads unchanged."""
    done = command.imds_guard_command("export", "--format", "iptables", "--user", str(ONE), "--ip", SERVICE)
    assert done.status == 0, done

    def load() -> int:
        from imds_guard.kernel.run import run

        return run(["iptables-restore", "--test"], done.stdout).status

    assert guard.sandbox.call(load) == 0


def test_export_refuses_to_weaken() -> None:
    """nftables matches the primary group only: a member of a denied group would get through. --force prints it."""
    words = ("export", "--format", "nftables", "--deny-group", str(STAFF), "--ip", SERVICE)
    refused = command.imds_guard_command(*words)
    assert refused.status == 78
    assert "--force" in refused.sentence
    assert command.imds_guard_command(*words, "--force").status == 0
