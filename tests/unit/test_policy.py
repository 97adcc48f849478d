# SPDX-License-Identifier: Apache-2.0
"""The values of a policy, and decide(). The conformance suite tests what the kernel does with a policy."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imds_guard.errors import BadPolicy
from imds_guard.policy.decide import UNBOUND, Caller, Destination, Reason, Source, decide, resolve_unspecified
from imds_guard.policy.model import Address, Endpoint, Identities, Lock, Mode, Policy, Protocol, Verdict, make_policy
from imds_guard.policy.ports import ALL_PORTS, Ports, common_ports, has_port, minus_ports, normal_ports

LOCKED = ipaddress.ip_address("169.254.169.254")
USER, GROUP, EXTRA = 1001, 2002, 3003
HTTP: Ports = ((80, 80),)


def endpoint(network: str, tcp: Ports = ALL_PORTS, udp: Ports = ()) -> Endpoint:
    return Endpoint(ipaddress.ip_network(network), tcp, udp)


def lock(name: str = "a", *endpoints: Endpoint, **more: object) -> Lock:
    return Lock(name, endpoints or (endpoint("169.254.169.254"),), **more)  # type: ignore[arg-type]


def reason(policy: Policy, caller: Caller, address: Address = LOCKED, port: int = 80) -> Reason:
    return decide(policy, caller, Destination(address, port)).reason


# --- ports

ranges = st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 65535)).map(lambda r: (min(r), max(r))), max_size=6)


def is_in(listed: Iterable[tuple[int, int]], port: int) -> bool:
    return any(low <= port <= high for low, high in listed)


def edges(*lists: list[tuple[int, int]]) -> list[int]:
    """Every port at which membership can change, and its neighbours."""
    found = {0, 65535}
    for low, high in (one for listed in lists for one in listed):
        found |= {low - 1, low, high, high + 1}
    return sorted(port for port in found if 0 <= port <= 65535)


@given(ranges)
def test_normal_ports_are_the_same_ports_in_separate_ascending_ranges(listed: list[tuple[int, int]]) -> None:
    found = normal_ports(listed)
    for port in edges(listed):
        assert is_in(listed, port) == is_in(found, port)
    assert all(high + 1 < low for (_, high), (low, _) in zip(found, found[1:]))


@given(ranges, ranges)
def test_minus_and_common_ports_are_the_set_operations(
    one: list[tuple[int, int]], other: list[tuple[int, int]]
) -> None:
    left, right = normal_ports(one), normal_ports(other)
    for port in edges(one, other):
        assert (is_in(one, port) and not is_in(other, port)) == is_in(minus_ports(left, right), port)
        assert (is_in(one, port) and is_in(other, port)) == is_in(common_ports(left, right), port)


@given(ranges, st.integers(0, 65535))
def test_has_port_is_membership(listed: list[tuple[int, int]], port: int) -> None:
    assert is_in(listed, port) == has_port(normal_ports(listed), port)


@pytest.mark.parametrize("wrong", [(-1, 80), (80, 65536), (81, 80)])
def test_an_impossible_range_of_ports_is_refused(wrong: tuple[int, int]) -> None:
    with pytest.raises(BadPolicy, match="is not a range of ports"):
        normal_ports([wrong])


# --- make_policy


def test_two_spellings_of_a_policy_are_equal() -> None:
    """The order of locks, the order and splitting of endpoints, and mapped prefixes make no difference."""
    spelled = make_policy(
        [
            lock("b", endpoint("10.0.0.0/8")),
            lock("a", endpoint("::ffff:192.0.2.1", ((80, 90),)), endpoint("192.0.2.1", ((91, 100),)), endpoint("::1")),
        ]
    )
    plain = make_policy(
        [lock("a", endpoint("192.0.2.1", ((80, 100),)), endpoint("::1")), lock("b", endpoint("10.0.0.0/8"))]
    )
    assert plain == spelled


@pytest.mark.parametrize(
    ("locks", "message"),
    [
        ([lock("a"), lock("a", endpoint("10.0.0.1"))], "two locks have the name 'a'"),
        ([lock("a"), lock("b", endpoint("169.254.169.254", HTTP))], "both lock 169.254.169.254/32 tcp port 80"),
        ([lock(""), lock("b", endpoint("10.0.0.1"))], "is not a lock name"),
        ([lock("x" * 64)], "is not a lock name"),
        ([lock("new\nline")], "is not a lock name"),
        ([lock("a", endpoint("10.0.0.1", ()))], "has no ports"),
        ([Lock("a", ())], "has no endpoint"),
        ([lock("a", endpoint("0.0.0.0"))], "can't be locked"),
        ([lock("a", endpoint("::"))], "can't be locked"),
        ([lock(allow=Identities(frozenset({0xFFFFFFFF})))], "4294967295 is not a user or group ID"),
        ([lock(deny=Identities(groups=frozenset({-1})))], "-1 is not a user or group ID"),
    ],
)
def test_a_policy_that_contradicts_itself_is_refused(locks: list[Lock], message: str) -> None:
    with pytest.raises(BadPolicy) as caught:
        make_policy(locks)
    assert message in str(caught.value)


def test_two_locks_can_share_an_address_on_separate_ports_and_protocols() -> None:
    locks = [
        lock("a", endpoint("10.0.0.1", HTTP)),
        lock("b", endpoint("10.0.0.1", ((81, 81),), HTTP)),
        lock("c", endpoint("10.0.0.0/8", HTTP)),
    ]
    assert len(make_policy(locks).locks) == 3


# --- decide

ALLOWING = make_policy([lock(allow=Identities(frozenset({USER}), frozenset({GROUP})))])


@pytest.mark.parametrize(
    ("caller", "expected"),
    [
        (Caller(USER, 9), Reason.ALLOWED_USER),
        (Caller(9, GROUP), Reason.ALLOWED_GROUP),
        (Caller(9, 8, frozenset({7, GROUP})), Reason.ALLOWED_GROUP),
        (Caller(GROUP, USER), Reason.NOT_LISTED),
        (Caller(0, 0, frozenset({0})), Reason.NOT_LISTED),
        (Caller(USER, GROUP, pid_namespace_is_initial=False), Reason.CONTAINER),
        (Caller(USER, GROUP, user_namespace_is_initial=False), Reason.CONTAINER),
        (Caller(USER, GROUP, kernel_thread=True), Reason.KERNEL_THREAD),
    ],
)
def test_an_allowlist_checks_user_group_and_supplementary_groups(caller: Caller, expected: Reason) -> None:
    decision = decide(ALLOWING, caller, Destination(LOCKED, 80))
    assert (expected, expected.permits, "a") == (decision.reason, decision.allowed, decision.lock)


def test_an_empty_allowlist_means_nobody() -> None:
    assert reason(make_policy([lock()]), Caller(0, 0)) is Reason.NOT_LISTED


def test_deny_wins_over_allow() -> None:
    policy = make_policy([lock(allow=Identities(frozenset({USER})), deny=Identities(groups=frozenset({EXTRA})))])
    assert reason(policy, Caller(USER, GROUP)) is Reason.ALLOWED_USER
    assert reason(policy, Caller(USER, GROUP, frozenset({EXTRA}))) is Reason.DENIED_GROUP
    assert reason(policy, Caller(USER, EXTRA)) is Reason.DENIED_GROUP


def test_default_allow_holds_only_in_the_initial_user_namespace() -> None:
    lenient = lock(deny=Identities(frozenset({USER})), default=Verdict.ALLOW)
    policy = make_policy([lenient], containers=Verdict.ALLOW)
    assert reason(policy, Caller(USER, GROUP)) is Reason.DENIED_USER
    assert reason(policy, Caller(9, 8)) is Reason.DEFAULT_ALLOW
    assert reason(policy, Caller(9, 8, user_namespace_is_initial=False)) is Reason.USER_NAMESPACE


def test_with_containers_allow_ids_decide() -> None:
    policy = make_policy(ALLOWING.locks, containers=Verdict.ALLOW)
    assert reason(policy, Caller(USER, 8, pid_namespace_is_initial=False)) is Reason.ALLOWED_USER
    assert reason(policy, Caller(9, 8, pid_namespace_is_initial=False)) is Reason.NOT_LISTED


def test_audit_allows_and_keeps_the_reason() -> None:
    policy = make_policy(ALLOWING.locks, mode=Mode.AUDIT)
    decision = decide(policy, Caller(9, 8), Destination(LOCKED, 80))
    assert (decision.allowed, decision.reason) == (True, Reason.NOT_LISTED)


@pytest.mark.parametrize(
    ("address", "port", "expected"),
    [
        ("10.1.2.3", 80, Reason.ALLOWED_USER),
        ("10.1.2.3", 443, Reason.NOT_LISTED),
        ("10.1.2.4", 80, Reason.NOT_LISTED),
        ("::ffff:10.1.2.3", 80, Reason.ALLOWED_USER),
        ("11.0.0.1", 80, Reason.NOT_LOCKED),
        ("::10.1.2.3", 80, Reason.NOT_LOCKED),
    ],
)
def test_the_most_specific_endpoint_with_the_port_decides(address: str, port: int, expected: Reason) -> None:
    policy = make_policy(
        [
            lock("wide", endpoint("10.0.0.0/8")),
            lock("one", endpoint("10.1.2.3", HTTP), allow=Identities(frozenset({USER}))),
        ]
    )
    assert expected is reason(policy, Caller(USER, GROUP), ipaddress.ip_address(address), port)


def test_tcp_and_udp_are_locked_separately() -> None:
    policy = make_policy([lock("a", endpoint("10.0.0.1", tcp=(), udp=((53, 53),)))])
    target = ipaddress.ip_address("10.0.0.1")
    assert decide(policy, Caller(9, 8), Destination(target, 53, Protocol.UDP)).reason is Reason.NOT_LISTED
    assert decide(policy, Caller(9, 8), Destination(target, 53, Protocol.TCP)).reason is Reason.NOT_LOCKED


@pytest.mark.parametrize(
    ("listed", "held", "expected"),
    [
        (128, 65536, Reason.ALLOWED_GROUP),
        (129, 1024, Reason.ALLOWED_GROUP),
        (129, 1025, Reason.TOO_MANY_GROUPS),
    ],
)
def test_too_many_groups_on_both_sides_are_denied_with_a_reason_of_their_own(
    listed: int, held: int, expected: Reason
) -> None:
    policy = make_policy([lock(allow=Identities(groups=frozenset(range(100_000, 100_000 + listed))))])
    groups = frozenset(range(100_000, 100_000 + held))
    assert expected is reason(policy, Caller(9, 8, groups))
    assert reason(policy, Caller(9, 100_000, groups)) is Reason.ALLOWED_GROUP


@pytest.mark.parametrize(
    ("destination", "source", "expected"),
    [
        ("0.0.0.0", UNBOUND, "127.0.0.1"),
        ("::", UNBOUND, "::1"),
        ("0.0.0.0", Source(LOCKED), "169.254.169.254"),
        ("::", Source(ipaddress.ip_address("fd00:ec2::254")), "fd00:ec2::254"),
        ("::ffff:0.0.0.0", Source(ipaddress.ip_address("::ffff:169.254.169.254")), "169.254.169.254"),
        ("0.0.0.0", Source(ipaddress.ip_address("0.0.0.0")), "127.0.0.1"),
        ("0.0.0.0", Source(by_device=True), None),
        ("::", Source(by_device=True), "::1"),
        ("192.0.2.1", Source(LOCKED), "192.0.2.1"),
    ],
)
def test_the_unspecified_destination_is_the_sockets_own_address(
    destination: str, source: Source, expected: str
) -> None:
    found = resolve_unspecified(ipaddress.ip_address(destination), source)
    assert expected == (None if found is None else str(found))


def test_an_unspecified_destination_that_cannot_be_resolved_is_denied_where_its_port_is_locked() -> None:
    policy = make_policy([lock("a", endpoint("10.0.0.1", HTTP), allow=Identities(frozenset({USER})))])
    source = Source(by_device=True)
    anywhere = ipaddress.ip_address("0.0.0.0")
    locked = decide(policy, Caller(USER, GROUP), Destination(anywhere, 80), source)
    free = decide(policy, Caller(USER, GROUP), Destination(anywhere, 81), source)
    assert (locked.reason, locked.allowed) == (Reason.UNSPECIFIED_DESTINATION, False)
    assert free.reason is Reason.NOT_LOCKED
