# SPDX-License-Identifier: Apache-2.0
"""What the machine promises to the tests that use it: tests/vm/__init__.py."""

from __future__ import annotations

import ipaddress
import struct

import pytest

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.policy.model import Endpoint, Identities, Lock, Policy, make_policy
from tests.vm.machine import Controls, Machine, failing
from tests.vm.programs import FORMS
from tests.vm.values import ESTABLISHED, LISTEN, Attempt, Packet, Socket, Task, packed

ADDRESS = "169.254.169.254"
LISTED, STRANGER = Task(1000, 100, (4, 27)), Task(1001, 101, (27,))
CONNECT = Attempt("connect4", packed(ADDRESS), 80)


def policy(strict: bool = False) -> Policy:
    """The fake service, locked for all but user 1000 and group 4711."""
    endpoint = Endpoint(ipaddress.ip_network(ADDRESS), tcp=((80, 80),))
    allowed = Identities(frozenset({1000}), frozenset({4711}))
    return make_policy([Lock("imds", (endpoint,), allowed)], strict=strict)


@pytest.fixture
def loaded(machine: Machine) -> Machine:
    """The policy is in force; task 0 is listed, task 1 is not."""
    machine.load(policy())
    machine.set_tasks([LISTED, STRANGER])
    return machine


@pytest.mark.parametrize("form", FORMS)
def test_a_listed_user_gets_through_and_another_one_leaves_a_record(loaded: Machine, form: str) -> None:
    allowed, denied = loaded.attempt(form, CONNECT, 0), loaded.attempt(form, CONNECT, 1)
    assert (allowed.returned, allowed.counts, allowed.events) == (1, {"allowed-user": (1, 0)}, 0)
    assert (denied.returned, denied.counts, denied.events, denied.rows) == (0, {"not-listed": (1, 0)}, 1, 1)
    assert not allowed.traps | denied.traps
    found = denied.record
    assert found is not None
    assert (found.fsuid, found.pid, found.tgid, found.comm, found.port) == (1001, 4243, 4242, b"curl", 80)


def test_cross_gives_what_single_runs_give(loaded: Machine) -> None:
    other = CONNECT._replace(port=81)
    whole = loaded.cross("better", [CONNECT, other], 2)
    size = len(whole) // 4
    returned = [struct.unpack_from("=Q", whole, size * n)[0] for n in range(4)]
    assert returned == [loaded.attempt("better", one, task).returned for one in (CONNECT, other) for task in (0, 1)]


def test_a_call_fails_on_demand(loaded: Machine) -> None:
    """The look-up of the list: without it nobody can tell whether the caller is allowed."""
    loaded.attempt("plain", CONNECT, 0)
    calls = [str(call) for call in loaded.trace()]
    outcome = loaded.attempt("plain", CONNECT, 0, failing(calls.index("map_lookup_elem(LISTS)") + 1))
    assert (outcome.returned, outcome.reason, outcome.traps) == (0, "unreadable", frozenset())


def test_a_full_ring_buffer_is_counted(loaded: Machine) -> None:
    outcome = loaded.attempt("plain", CONNECT, 1, Controls(ring_full=True))
    assert outcome.counts == {"not-listed": (1, 0), "lost-events": (1, 0)}


def test_something_happens_before_a_call_and_is_undone(loaded: Machine) -> None:
    """The user leaves the list just before it is looked at."""
    key = abi.MEMBER.pack(1, abi.USER, 0, 1000)
    loaded.attempt("loop", CONNECT, 0)
    at = [str(call) for call in loaded.trace()].index("map_lookup_elem(MEMBERS)") + 1
    controls = Controls(before_call=lambda _: loaded.map_delete(Map.MEMBERS, key), at_call=at)
    before = sorted(loaded.map_items(Map.MEMBERS))
    with loaded.rollback():
        assert loaded.attempt("loop", CONNECT, 0, controls).reason == "not-listed"
        assert loaded.map_lookup(Map.MEMBERS, key) is None
    assert sorted(loaded.map_items(Map.MEMBERS)) == before
    assert loaded.attempt("loop", CONNECT, 0).reason == "allowed-user"


def test_a_patched_instruction_is_executed_and_comes_back(loaded: Machine) -> None:
    with loaded.patched("plain", ["connect4"], 0, struct.pack("=BBhi", 0x95, 0, 0, 0)):  # exit, with junk in r0
        assert "return" in loaded.attempt("plain", CONNECT, 0).traps
    assert loaded.attempt("plain", CONNECT, 0).returned == 1


def test_coverage_counts_instructions_and_jumps(loaded: Machine) -> None:
    loaded.clear_coverage()
    loaded.attempt("plain", CONNECT, 0)
    seen = loaded.coverage("plain", "connect4")
    assert seen.executed[0] == 1
    assert 0 < sum(seen.taken) < sum(seen.executed) < len(seen.executed)
    assert not any(loaded.coverage("plain", "connect6").executed)


def test_a_packet_passes_when_its_socket_is_marked(machine: Machine) -> None:
    machine.load(policy(strict=True), serial=9)
    tcp = struct.pack(">HH9xB6x", 40000, 80, 0x10)
    data = bytes([0x45, *bytes(8), 6, 0, 0]) + packed("10.0.0.1") + packed(ADDRESS) + tcp
    mark = abi.MARK.pack(9, 1000, 0, 0, abi.MARK_USER, 0)
    for wanted, sockets in ((1, [Socket(mark=mark)]), (0, [Socket(mark=None)]), (0, [Socket(mark=mark, full=False)])):
        machine.set_sockets(sockets)
        outcome = machine.packet("better", Packet(data, socket=0))
        assert (outcome.returned, outcome.traps) == (wanted, frozenset())


def test_a_reply_passes_when_the_socket_that_gets_it_is_approved(machine: Machine) -> None:
    """The look-up compares the whole tuple: a socket with another port is not found."""
    machine.load(policy(strict=True), serial=9)
    tcp = struct.pack(">HH9xB6x", 80, 80, 0x10)
    data = bytes([0x45, *bytes(8), 6, 0, 0]) + packed(ADDRESS) * 2 + tcp
    mark = abi.MARK.pack(9, 1000, 0, 0, abi.MARK_USER, 0)
    client = Socket(packed(ADDRESS), packed(ADDRESS), 80, 80, ESTABLISHED, mark)
    for wanted, one in (
        (1, client),
        (0, client._replace(local_port=81)),
        (0, client._replace(state=LISTEN)),
        (0, client._replace(mark=None)),
    ):
        machine.set_sockets([Socket(), one])
        outcome = machine.packet("plain", Packet(data, interface=1, socket=0))
        assert (outcome.returned, outcome.traps) == (wanted, frozenset()), one
