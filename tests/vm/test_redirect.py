# SPDX-License-Identifier: Apache-2.0
"""Callers of filters: where the hooks send them, in which state of the listener, and what getpeername(2) shows."""

from __future__ import annotations

import ipaddress
import itertools

import pytest

from imds_guard.backends.ebpf import abi, program
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.filter_records import filter_bit
from imds_guard.backends.ebpf.render import render
from imds_guard.policy.filter_numbers import Numbered, Numbers, assigned, listeners_of
from imds_guard.policy.filters import FILTER_PORT, Filter, FilterRules, Target
from imds_guard.policy.model import NOBODY, Endpoint, Identities, Lock, Mode, Policy, Verdict, make_policy
from imds_guard.policy.ports import ALL_PORTS
from tests import packets
from tests.packets import Ipv4
from tests.vm.egress import egress_forms
from tests.vm.machine import CRED, Machine, failing
from tests.vm.programs import FORMS
from tests.vm.values import (
    ESTABLISHED,
    IPPROTO_MPTCP,
    IPPROTO_TCP,
    LISTEN,
    Attempt,
    Packet,
    Socket,
    Task,
    mapped,
    packed,
)

USER, SERIAL = 1001, 7
IPV4, IPV6 = "169.254.169.254", "fd00:ec2::254"
LOCK = Lock("imds", tuple(Endpoint(ipaddress.ip_network(one), ALL_PORTS) for one in (IPV4, IPV6)))
REGION = Filter("region", ("imds",), Identities(frozenset({USER})), rules=FilterRules(allow=("GET /**",)))
POLICY = make_policy([LOCK], filters=[REGION])
T4, T6, F = 9, 254, 200
NUMBERS = Numbers(
    {Target(ipaddress.ip_address(IPV4), 80): T4, Target(ipaddress.ip_address(IPV6), 80): T6}, {"region": F}
)
LISTENERS = {one.target_number: one for one in listeners_of(POLICY, NUMBERS)}
TASK = Task(USER, USER)


def load(machine: Machine, generation: int = 1, policy: Policy = POLICY) -> None:
    """The policy with other numbers than the first ones."""
    machine.load(policy, generation, SERIAL)
    for number in (Map.FILTERS, Map.TARGETS, Map.ENDPOINTS):
        for key, _ in machine.map_items(number):
            machine.map_delete(number, key)
    machine.fill(policy, render(policy, generation, NUMBERS), SERIAL)
    machine.set_tasks([TASK])


def listener(target: int) -> Socket:
    one = LISTENERS[target]
    return Socket(one.address.packed, local_port=FILTER_PORT, state=LISTEN, filter_mark=one.digest)


TRIED = {
    "ipv4": (Attempt("connect4", packed(IPV4), 80), T4, packed(f"127.169.{T4}.{F}").ljust(16, b"\0")),
    "mapped": (Attempt("connect6", mapped(packed(IPV4)), 80), T4, mapped(packed(f"127.169.{T4}.{F}"))),
    "ipv6": (Attempt("connect6", packed(IPV6), 80), T6, mapped(packed(f"127.169.{T6}.{F}"))),
}


@pytest.mark.parametrize(("form", "family"), [*itertools.product(FORMS, TRIED)])
def test_a_caller_is_sent_to_its_filter(machine: Machine, form: str, family: str) -> None:
    load(machine)
    tried, target, address = TRIED[family]
    outcome = machine.attempt(form, tried._replace(others=(listener(target),)))
    assert (outcome.allowed, outcome.counts, outcome.to) == (True, {"filtered": (1, 0)}, (address, FILTER_PORT))
    assert (outcome.events, outcome.rows, outcome.mark, outcome.traps) == (0, 0, None, frozenset())


_MEANT = listener(T4)
ELSEWHERE = {
    "nothing": (),
    "another-target": (listener(T6),),
    "another-filter": (_MEANT._replace(local=packed(f"127.169.{T4}.{F - 1}")),),
    "another-port": (_MEANT._replace(local_port=FILTER_PORT + 1),),
    "not-marked": (_MEANT._replace(filter_mark=None),),
    "zero-mark": (_MEANT._replace(filter_mark=0),),
    "marked-for-another-target": (_MEANT._replace(filter_mark=LISTENERS[T6].digest),),
    "lower-half-of-the-mark": (_MEANT._replace(filter_mark=LISTENERS[T4].digest & 0xFFFFFFFF),),
    "upper-half-of-the-mark": (_MEANT._replace(filter_mark=LISTENERS[T4].digest >> 32 << 32),),
    "connected": (_MEANT._replace(state=ESTABLISHED, remote=packed("127.0.0.1")),),
    "of-ipv6": (_MEANT._replace(local=mapped(_MEANT.local)),),
    "a-nearer-one-without-a-mark": (
        _MEANT._replace(local=bytes(4)),
        _MEANT._replace(filter_mark=None),
    ),
}
"""What the kernel has in place of the listener."""


@pytest.mark.parametrize(("form", "row"), [*itertools.product(FORMS, ELSEWHERE)])
def test_without_its_listener_the_caller_is_denied(machine: Machine, form: str, row: str) -> None:
    load(machine)
    outcome = machine.attempt(form, TRIED["ipv4"][0]._replace(others=ELSEWHERE[row]))
    assert (outcome.returned, outcome.reason, outcome.to, outcome.traps) == (0, "no-filter", None, frozenset())
    assert (outcome.events, outcome.rows) == (1, 1)


def nothing_stands_in_for_a_listener(machine: Machine) -> bool:
    """The same in one form, for planted.py."""
    load(machine)
    tried = [TRIED["ipv4"][0]._replace(others=others) for others in ELSEWHERE.values()]
    return not any(machine.attempt(machine.forms[0], one).allowed for one in tried)


@pytest.mark.parametrize(("form", "mode"), [*itertools.product(FORMS, Mode)])
def test_a_record_that_is_not_there_denies(machine: Machine, form: str, mode: Mode) -> None:
    """Under audit the caller reaches the endpoint, as every other caller does."""
    machine.load(POLICY._replace(mode=mode), serial=SERIAL)
    machine.set_tasks([TASK])
    for key, _ in machine.map_items(Map.FILTERS):
        machine.map_delete(Map.FILTERS, key)
    outcome = machine.attempt(form, TRIED["ipv4"][0]._replace(others=(listener(T4),)))
    assert (outcome.allowed, outcome.reason, outcome.to) == (mode is Mode.AUDIT, "not-served", None)


def test_the_key_of_a_record_has_the_bit_of_the_filter() -> None:
    (key, _), *_ = render(POLICY, 1).items[Map.FILTERS]
    assert abi.FILTER_KEY.unpack(key) == (1, 1, filter_bit(0))


# --- getpeername ----------------------------------------------------------------------------------------------------

_HERE4, _HERE6 = packed(f"127.169.{T4}.{F}"), mapped(packed(f"127.169.{T6}.{F}"))
SHOWN = {
    "ipv4": (Attempt("getpeername4", _HERE4, FILTER_PORT), (packed(IPV4).ljust(16, b"\0"), 80)),
    "mapped": (Attempt("getpeername6", mapped(_HERE4), FILTER_PORT), (mapped(packed(IPV4)), 80)),
    "ipv6": (Attempt("getpeername6", _HERE6, FILTER_PORT), (packed(IPV6), 80)),
    "another-port": (Attempt("getpeername4", _HERE4, 80), None),
    "another-port-ipv6": (Attempt("getpeername6", _HERE6, 80), None),
    "another-address": (Attempt("getpeername4", packed(f"127.168.{T4}.{F}"), FILTER_PORT), None),
    "another-address-mapped": (Attempt("getpeername6", mapped(packed(f"127.168.{T4}.{F}")), FILTER_PORT), None),
    "another-address-ipv6": (Attempt("getpeername6", packed("::1"), FILTER_PORT), None),
    "other-first-word": (Attempt("getpeername6", packed("1::ffff:127.169.9.200"), FILTER_PORT), None),
    "other-second-word": (Attempt("getpeername6", packed("0:0:1::ffff:127.169.9.200"), FILTER_PORT), None),
    "not-mapped": (Attempt("getpeername6", bytes(12) + _HERE4, FILTER_PORT), None),
    "no-target": (Attempt("getpeername4", packed(f"127.169.8.{F}"), FILTER_PORT), None),
    "no-target-ipv6": (Attempt("getpeername6", mapped(packed(f"127.169.8.{F}")), FILTER_PORT), None),
    "a-target-of-ipv6-on-a-socket-of-ipv4": (
        Attempt("getpeername4", packed(f"127.169.{T6}.{F}"), FILTER_PORT),
        None,
    ),
}
"""What the kernel would show, and what it shows in place of that."""


@pytest.mark.parametrize(("form", "row", "generation"), [*itertools.product(FORMS, SHOWN, abi.GENERATIONS)])
def test_getpeername_shows_the_endpoint(machine: Machine, form: str, row: str, generation: int) -> None:
    load(machine, generation)
    tried, shown = SHOWN[row]
    outcome = machine.attempt(form, tried)
    assert (outcome.returned, outcome.to, outcome.counts, outcome.traps) == (1, shown, {}, frozenset())


@pytest.mark.parametrize("form", FORMS)
def test_getpeername_changes_nothing_where_nothing_is_in_force(machine: Machine, form: str) -> None:
    load(machine)
    machine.map_update(Map.CONFIG, abi.ARRAY_KEY.pack(0), abi.CONFIG.pack(0))
    outcome = machine.attempt(form, SHOWN["ipv4"][0])
    assert (outcome.returned, outcome.to, outcome.traps) == (1, None, frozenset())


# --- sockets that are bound, strict mode, audit mode ----------------------------------------------------------------

BOUND = {
    "::": True,
    "::ffff:0.0.0.0": True,
    "::ffff:10.0.0.1": True,
    "::1": False,
    "::1:0:0": False,
    "::fffe:0:0": False,
    "0:1::": False,
    "1::": False,
    "0:0:1::": False,
    "0:0:1::ffff:10.0.0.1": False,
    "1::ffff:10.0.0.1": False,
    "::10.0.0.1": False,
}
"""Own address of an IPv6 socket -> whether it can be redirected to an address of IPv4."""


@pytest.mark.parametrize(("form", "own"), [*itertools.product(FORMS, BOUND)])
def test_a_socket_that_is_bound_to_ipv6_is_refused(machine: Machine, form: str, own: str) -> None:
    load(machine)
    outcome = machine.attempt(form, bound_to(own))
    assert (outcome.allowed, outcome.reason) == (BOUND[own], "filtered" if BOUND[own] else "not-served")


def bound_to(own: str) -> Attempt:
    return TRIED["ipv6"][0]._replace(source=packed(own), others=(listener(T6),))


@pytest.mark.parametrize(("form", "protocol"), [*itertools.product(FORMS, (IPPROTO_TCP, IPPROTO_MPTCP))])
def test_a_strict_policy_marks_the_socket_for_its_filter(machine: Machine, form: str, protocol: int) -> None:
    """An MPTCP socket can't be marked: its packets are those of other sockets."""
    load(machine, policy=POLICY._replace(strict=True))
    outcome = machine.attempt(form, TRIED["ipv4"][0]._replace(protocol=protocol, others=(listener(T4),)))
    if protocol == IPPROTO_MPTCP:
        assert (outcome.returned, outcome.reason, outcome.to) == (0, "unapproved-socket", None)
        return
    assert outcome.to == (TRIED["ipv4"][2], FILTER_PORT)
    assert outcome.mark == abi.MARK.pack(SERIAL, USER, T4 << 8 | F, abi.FILTER_LIST, abi.MARK_FILTER, 0)


@pytest.mark.parametrize("form", FORMS)
def test_audit_mode_redirects_nobody(machine: Machine, form: str) -> None:
    """Whether the filter is there or not; it is reported as what a policy that enforces would do."""
    load(machine, policy=POLICY._replace(mode=Mode.AUDIT))
    for others in ((listener(T4),), ()):
        outcome = machine.attempt(form, TRIED["ipv4"][0]._replace(others=others))
        assert (outcome.returned, outcome.counts, outcome.to) == (1, {"filtered": (0, 1)}, None)
        assert (outcome.events, outcome.rows) == (1, 1)


EVERYONE = make_policy([LOCK], containers=Verdict.ALLOW, filters=[REGION._replace(who=NOBODY, everyone=True)])


@pytest.mark.parametrize(("form", "level"), [*itertools.product(FORMS, (0, 1, None))])
def test_everyone_is_everyone_in_the_initial_user_namespace(machine: Machine, form: str, level: int | None) -> None:
    """None: the namespace can't be read."""
    load(machine, policy=EVERYONE)
    machine.set_tasks([TASK._replace(user_ns_level=level or 0)])
    if level is None:
        offset = dict(program.kernel_offsets())["IG_OFF_CRED_USER_NS"]
        machine.poke(0, CRED, offset, bytes(8))
    outcome = machine.attempt(form, TRIED["ipv4"][0]._replace(others=(listener(T4),)))
    assert outcome.reason == {0: "filtered", 1: "user-namespace", None: "unreadable"}[level]


MARKS = {
    "of-this-filter": (T4 << 8 | F, abi.MARK_FILTER, True),
    "of-another-filter": (T4 << 8 | F - 1, abi.MARK_FILTER, False),
    "of-another-target": (T6 << 8 | F, abi.MARK_FILTER, False),
    "beyond-both": (1 << 16 | T4 << 8 | F, abi.MARK_FILTER, False),
    "of-a-group": (T4 << 8 | F, abi.MARK_GROUP, False),
    "of-a-user": (T4 << 8 | F, abi.MARK_USER, False),
    "open": (T4 << 8 | F, abi.MARK_OPEN, False),
    "audited": (T4 << 8 | F, abi.MARK_AUDIT, False),
}
_TO_FILTER = Ipv4(packed("127.0.0.1"), _HERE4, packets.TCP).packet(packets.tcp(40_000, FILTER_PORT, packets.ACK))
_TO_ENDPOINT = Ipv4(packed("127.0.0.1"), packed(IPV4), packets.TCP).packet(packets.tcp(40_000, 80, packets.ACK))
_ANSWER = Ipv4(_HERE4, packed(IPV4), packets.TCP).packet(packets.tcp(FILTER_PORT, 40_000, packets.ACK))


def a_mark_is_for_its_filter(machine: Machine) -> bool:
    """A packet to a filter leaves if its socket was redirected there. Such a socket may send nowhere else.

    A client that is bound to a locked address gets the answers of its filter.
    """
    right = True
    for mode, (numbers, kind, passes) in itertools.product(Mode, MARKS.values()):
        load(machine, policy=POLICY._replace(strict=True, mode=mode))
        mark = abi.MARK.pack(SERIAL, USER, numbers, 0, kind, 0)
        client = Socket(packed(IPV4), _HERE4, 40_000, FILTER_PORT, ESTABLISHED, mark, earlier=mark * abi.EARLIER_MARKS)
        expected = passes or mode is Mode.AUDIT
        for form in egress_forms(machine):
            machine.set_sockets([client])
            to_filter = machine.packet(form, Packet(_TO_FILTER, socket=0))
            to_endpoint = machine.packet(form, Packet(_TO_ENDPOINT, socket=0))
            answer = machine.packet(form, Packet(_ANSWER, interface=1))
            right = right and (to_filter.allowed, answer.allowed) == (expected, expected)
            right = right and to_endpoint.allowed == (kind in (abi.MARK_USER, abi.MARK_GROUP) or mode is Mode.AUDIT)
    return right


def test_a_mark_is_for_its_filter(machine: Machine) -> None:
    assert a_mark_is_for_its_filter(machine)


# --- for coverage.py ------------------------------------------------------------------------------------------------

_TARGETS = (IPV6, "::1", "0:1::", "0:0:1::", "::ffff:10.0.0.1")


def test_without_its_code_a_filter_denies(bare: Machine) -> None:
    """User space never pairs the two. If it did, nobody may get more than the policy says, as by a default."""
    without_its_code_a_filter_denies(bare)


def without_its_code_a_filter_denies(machine: Machine) -> None:
    """In each form, a caller that a filter names, and a connect to the filter itself."""
    open_lock = LOCK._replace(default=Verdict.ALLOW)
    for one, everyone in itertools.product((LOCK, open_lock), (False, True)):
        named = REGION._replace(who=NOBODY, everyone=True) if everyone else REGION
        for form in machine.forms:
            load(machine, policy=make_policy([one], filters=[named]))
            for tried in (*(tried for tried, _, _ in TRIED.values()), Attempt("connect4", _HERE4, FILTER_PORT)):
                outcome = machine.attempt(form, tried._replace(others=(listener(T4), listener(T6))))
                assert (outcome.returned, outcome.reason, outcome.to) == (0, "unreadable", None)
                assert outcome.traps == frozenset()


def try_redirects(machine: Machine) -> None:
    """Every way through the redirect and the hooks of getpeername."""
    plain, tried = TRIED["ipv4"][0], [bound_to(own) for own in BOUND]
    tried += [plain._replace(others=others) for others in ELSEWHERE.values()]
    tried += [plain._replace(protocol=one, others=(listener(T4),)) for one in (IPPROTO_TCP, IPPROTO_MPTCP)]
    tried.append(plain._replace(port=443, protocol=IPPROTO_MPTCP))
    for policy in (POLICY, EVERYONE, *(one._replace(strict=True, mode=Mode.AUDIT) for one in (POLICY, EVERYONE))):
        for strict, form in itertools.product((False, True), machine.forms):
            load(machine, policy=policy._replace(strict=strict))
            machine.cross(form, tried, 1)
    for form in machine.forms:
        test_everyone_is_everyone_in_the_initial_user_namespace(machine, form, None)
        test_everyone_is_everyone_in_the_initial_user_namespace(machine, form, 1)
    a_mark_is_for_its_filter(machine)
    for address, form in itertools.product(_TARGETS, machine.forms):
        load(machine)
        value = abi.TARGET.pack(abi.address_bytes(ipaddress.ip_address(address)), 80)
        machine.map_update(Map.TARGETS, abi.SMALL_KEY.pack(1, T4), value)
        for shown, _ in SHOWN.values():
            machine.attempt(form, shown)
            machine.attempt(form, shown, controls=failing(1))


def test_numbers_are_stable() -> None:
    """What is unchanged keeps its number, and what changed gets one that was not in use."""
    first = assigned(POLICY)
    assert (sorted(first.targets.values()), first.filters) == ([1, 2], {"region": 1})
    before = Numbered(POLICY.filters, first)
    assert assigned(POLICY, before) == first
    changed = REGION._replace(rules=FilterRules(allow=("GET /x",)))
    another = REGION._replace(name="another")
    assert assigned(make_policy([LOCK], filters=[another, changed]), before).filters == {"another": 2, "region": 3}
    assert assigned(make_policy([LOCK], filters=[another, REGION]), before).filters == {"another": 2, "region": 1}
    (ipv4, _) = LOCK.endpoints
    more = Endpoint(ipaddress.ip_network("100.100.100.200"), ALL_PORTS)
    fewer = make_policy([LOCK._replace(endpoints=(ipv4, more))], filters=[REGION])
    assert assigned(fewer, before).targets == {
        Target(ipaddress.ip_address("100.100.100.200"), 80): 3,
        Target(ipaddress.ip_address(IPV4), 80): first.targets[Target(ipaddress.ip_address(IPV4), 80)],
    }


def test_numbers_are_used_again_where_all_are_in_use() -> None:
    """The digest of the listener still tells the old meaning from the new one."""
    old = Numbered(
        (),
        Numbers({Target(ipaddress.IPv4Address(n), 80): n for n in range(1, 255)}, {f"{n}": n for n in range(1, 255)}),
    )
    found = assigned(POLICY, old)
    assert (set(found.targets.values()), found.filters) == ({1, 2}, {"region": 1})
