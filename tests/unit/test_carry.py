# SPDX-License-Identifier: Apache-2.0
"""Which rows of the report stay through a change of policy, and the index that finds their locks."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.carry import Carrier, merged, shares_of
from imds_guard.policy.decide import Reason, find_lock
from imds_guard.policy.endpoint_syntax import endpoint_argument, parse_endpoint
from imds_guard.policy.lock_index import LockIndex
from imds_guard.policy.model import Identities, Lock, Policy, Protocol, Verdict, make_policy
from tests import strategies

IMDS = "169.254.169.254"
USER, OTHER = 61_001, 61_002


def lock(name: str, *endpoints: str, users: tuple[int, ...] = (), deny: tuple[int, ...] = ()) -> Lock:
    who, denied = Identities(frozenset(users)), Identities(frozenset(deny))
    return Lock(name, tuple(map(parse_endpoint, endpoints)), who, denied)


def record(address: str = IMDS, port: int = 80, count: int = 1, first: int = 5, last: int = 9) -> bytes:
    packed = ipaddress.IPv6Address(f"::ffff:{address}").packed
    return abi.REPORT.pack(count, first, last, packed, port, abi.TCP, b"curl")


def key(reason: Reason, uid: int = USER, who: int = abi.WHO_USER, number: int = 0, generation: int = 1) -> bytes:
    return abi.REPORT_KEY.pack(generation, reason, number, who, uid)


def stays(policy: Policy, reason: Reason, uid: int = USER, who: int = abi.WHO_USER, address: str = IMDS) -> bool:
    numbers = {one.name: 7 + number for number, one in enumerate(policy.locks)}
    return bool(Carrier(policy, numbers, 2).carried(((key(reason, uid, who), record(address)),)))


ONE = make_policy([lock("a", IMDS, users=(OTHER,))])


@pytest.mark.parametrize(
    ("policy", "reason", "expected"),
    [
        (ONE, Reason.NOT_LISTED, True),
        (make_policy([lock("a", IMDS, users=(USER,))]), Reason.NOT_LISTED, False),
        (make_policy([lock("a", IMDS, users=(USER,))]), Reason.TOO_MANY_GROUPS, False),
        (make_policy([lock("a", IMDS)._replace(default=Verdict.ALLOW)]), Reason.NOT_LISTED, False),
        (make_policy([lock("a", IMDS, users=(USER,), deny=(USER,))]), Reason.DENIED_USER, True),
        (make_policy([lock("a", IMDS, users=(USER,))]), Reason.DENIED_USER, False),
        (make_policy([lock("a", "10.0.0.1")]), Reason.NOT_LISTED, False),
        (make_policy([lock("a", "169.254.0.0/16")]), Reason.NOT_LISTED, True),
        (make_policy([lock("a", IMDS, users=(USER,))]), Reason.CONTAINER, True),
        (make_policy([lock("a", IMDS, users=(USER,))], containers=Verdict.ALLOW), Reason.CONTAINER, False),
        (make_policy([lock("a", IMDS, users=(USER,))]), Reason.KERNEL_THREAD, True),
        (ONE, Reason.UNAPPROVED_SOCKET, False),
        (ONE._replace(strict=True), Reason.UNAPPROVED_SOCKET, True),
    ],
)
def test_a_row_stays_while_its_caller_is_denied(policy: Policy, reason: Reason, expected: bool) -> None:
    assert stays(policy, reason) is expected


def test_of_a_user_namespace_only_its_owner_is_known() -> None:
    """Its processes have any ID that is mapped there: that the owner is allowed says nothing."""
    allowed = make_policy([lock("a", IMDS, users=(USER,))], containers=Verdict.ALLOW)
    assert stays(allowed, Reason.NOT_LISTED, who=abi.WHO_NAMESPACES)


def test_rows_of_no_lock_stay() -> None:
    one = ((key(Reason.NOT_LISTED, who=abi.WHO_OTHERS, number=abi.NO_LOCK), record()),)
    assert list(Carrier(ONE, {"a": 3}, 2).carried(one)) == [
        key(Reason.NOT_LISTED, who=abi.WHO_OTHERS, number=abi.NO_LOCK, generation=2)
    ]


def test_rows_that_meet_under_one_lock_are_one_row() -> None:
    items = ((key(Reason.NOT_LISTED, number=0), record(count=2)), (key(Reason.NOT_LISTED, number=1), record(count=3)))
    ((new, value),) = Carrier(ONE, {"a": 3}, 2).carried(items).items()
    assert abi.REPORT_KEY.unpack(new) == (2, Reason.NOT_LISTED, 3, abi.WHO_USER, USER)
    assert abi.REPORT.unpack(value)[0] == 5


def test_the_earlier_row_gives_address_and_program() -> None:
    early, late = record("10.0.0.1", count=1, first=3, last=4), record(count=2, first=8, last=11)
    for one, other in ((early, late), (late, early)):
        assert abi.REPORT.unpack(merged(one, other))[:4] == (3, 3, 11, ipaddress.IPv6Address("::ffff:10.0.0.1").packed)


def test_rows_count_in_the_share_of_their_id() -> None:
    """A row of "others" takes none."""
    sub_ids = [key(Reason.NOT_LISTED, uid, generation=2) for uid in (70_000, 70_001)]
    others = key(Reason.NOT_LISTED, 65_536, abi.WHO_OTHERS, abi.NO_LOCK, 2)
    found = shares_of([*sub_ids, key(Reason.NOT_LISTED, 1, generation=2), others], 2)
    assert found == {abi.SHARE_KEY.pack(2, 65_536): 2, abi.SHARE_KEY.pack(2, 1): 1}


@given(st.data(), strategies.policies())
def test_the_index_finds_what_decide_finds(data: st.DataObject, policy: Policy) -> None:
    to = data.draw(strategies.destinations(policy))
    if to.address.version == 6 and getattr(to.address, "ipv4_mapped", None):
        return
    found, expected = LockIndex(policy).find(*to), find_lock(policy, to)
    assert (None if found is None else found[0]) == (None if expected is None else expected.name)


@pytest.mark.parametrize(
    ("address", "port", "protocol", "expected"),
    [
        (IMDS, 80, Protocol.TCP, IMDS),
        (IMDS, 53, Protocol.TCP, f"{IMDS}:53,tcp"),
        ("fd00:ec2::254", 53, Protocol.UDP, "[fd00:ec2::254]:53,udp"),
        ("10.0.0.1", 53, Protocol.UDP, "10.0.0.1"),
    ],
)
def test_the_argument_for_an_address_has_the_port(address: str, port: int, protocol: Protocol, expected: str) -> None:
    argument = endpoint_argument(ipaddress.ip_address(address), port, protocol)
    assert argument == expected
    assert any(low <= port <= high for low, high in parse_endpoint(argument).ports(protocol))
