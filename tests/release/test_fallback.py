# SPDX-License-Identifier: Apache-2.0
"""The fallback: this tree's commands over the rules and the state file of a release, and the way back."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests import command, tools
from tests.command import ONE, SERVICE, SERVICE_V6, STRANGER, TIMEOUT_S, TWO, Guard, Result
from tests.release.releases import Pair, Tree

_LOCK = ("--backend", "iptables", "--ip", SERVICE, "--ip", SERVICE_V6)


@pytest.fixture
def guard() -> Iterator[Guard]:
    """A network namespace that answers, with no rules in it."""
    if os.geteuid() != 0:
        pytest.skip("making namespaces and cgroups needs root")
    tools.need("iptables")
    with command.guard() as one:
        yield one


def _inside(guard: Guard, tree: Tree, *arguments: str) -> Result:
    """A command of a tree in the namespace, which must succeed."""
    result = guard.sandbox.call(lambda: tree(*arguments), timeout_s=TIMEOUT_S)
    assert result.status == 0, result
    return result


def _passing(guard: Guard) -> set[int]:
    """The users that get through; both addresses must agree."""
    seen = {uid: {guard.reach(uid, address) for address in (SERVICE, SERVICE_V6)} for uid in (ONE, TWO, STRANGER)}
    assert all(outcomes in ({"connected"}, {"ECONNREFUSED"}) for outcomes in seen.values()), seen
    return {uid for uid, outcomes in seen.items() if outcomes == {"connected"}}


def _rules(guard: Guard) -> list[str]:
    """The lines of our own rules and chains, for IPv4 and IPv6."""
    saved = [guard.sandbox.call(lambda name=name: command.run((name,))) for name in ("iptables-save", "ip6tables-save")]  # type: ignore[misc]
    assert all(result.status == 0 for result in saved), saved
    return [line for result in saved for line in result.stdout.splitlines() if "imds" in line.lower()]


def test_the_rules_of_a_release_are_taken_over(released: Pair, guard: Guard) -> None:
    """This tree finds them whole, changes them, puts its own in their place and removes them."""
    _inside(guard, released.old, "start", *_LOCK, "--user", str(ONE))
    status = _inside(guard, released.new, "status", "--json").values
    assert (status["state"], status["backend"], status["faults"]) == ("active", "iptables", [])
    _inside(guard, released.new, "allow", "--user", str(TWO))
    assert _passing(guard) == {ONE, TWO}
    _inside(guard, released.new, "start", *_LOCK, "--user", str(TWO))
    assert _passing(guard) == {TWO}
    assert _rules(guard)
    _inside(guard, released.new, "stop")
    assert (_passing(guard), _rules(guard)) == ({ONE, TWO, STRANGER}, [])


def test_a_release_that_knows_filter_alone_opens_nothing(released: Pair, guard: Guard) -> None:
    """After a downgrade the rules in mangle stay: who passes is let through by both. ``stop`` before it removes all."""
    _inside(guard, released.new, "start", *_LOCK, "--user", str(ONE))
    _inside(guard, released.old, "start", *_LOCK, "--user", str(ONE), "--user", str(TWO))
    assert _passing(guard) == {ONE}
    _inside(guard, released.new, "stop")
    assert (_passing(guard), _rules(guard)) == ({ONE, TWO, STRANGER}, [])
    _inside(guard, released.old, "start", *_LOCK, "--user", str(TWO))
    status = _inside(guard, released.old, "status", "--json").values
    assert (status["state"], status["backend"], status["faults"]) == ("active", "iptables", [])
    assert _passing(guard) == {TWO}
    _inside(guard, released.old, "stop")
    assert (_passing(guard), _rules(guard)) == ({ONE, TWO, STRANGER}, [])
