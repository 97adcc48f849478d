# SPDX-License-Identifier: Apache-2.0
"""decide_packet(): strict mode, row by row. tests/vm compares the compiled program with it."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imds_guard.policy.decide_packet import (
    Ends,
    Mark,
    MarkKind,
    PacketDecision,
    PacketReason,
    Socket,
    State,
    decide_packet,
)
from imds_guard.policy.model import NOBODY, Endpoint, Identities, Lock, Mode, Policy, Protocol, Verdict, make_policy
from imds_guard.policy.packet import RST, SYN, Fragment, Packet
from tests.strategies import patient, policies

IMDS, DNS, ELSEWHERE = (ipaddress.ip_address(one) for one in ("169.254.169.254", "10.0.0.53", "192.0.2.1"))
USER, OTHER_USER, GROUP, OTHER_GROUP = 1001, 1002, 2001, 2002
SERIAL, EARLIER = 77, 76
ACK, FIN = 0x10, 0x01


def lock(name: str, address: str, port: int, allow: Identities = NOBODY, **more: object) -> Lock:
    endpoint = Endpoint(ipaddress.ip_network(address), tcp=((port, port),), udp=((port, port),))
    return Lock(name, (endpoint,), allow, **more)  # type: ignore[arg-type]


ONE_USER, ONE_GROUP = Identities(frozenset({USER})), Identities(groups=frozenset({GROUP}))
TWO_LOCKS = make_policy(
    [lock("imds", "169.254.169.254", 80, ONE_USER), lock("dns", "10.0.0.53", 80, ONE_GROUP)], strict=True
)
TWINS = make_policy(
    [lock("imds", "169.254.169.254", 80, ONE_USER), lock("twin", "10.0.0.53", 80, ONE_USER)], strict=True
)


def one_lock(allow: Identities = ONE_USER, containers: Verdict = Verdict.DENY, **more: object) -> Policy:
    return make_policy([lock("imds", "169.254.169.254", 80, allow, **more)], containers=containers, strict=True)


PACKET = Packet(ELSEWHERE, IMDS, protocol=Protocol.TCP, source_port=40_000, destination_port=80, tcp_flags=ACK)
"""From a client to the service."""
ANSWER = Packet(IMDS, IMDS, protocol=Protocol.TCP, source_port=80, destination_port=80, tcp_flags=ACK)
"""From the service to a client, both at the locked address."""
UNREADABLE = replace(PACKET, readable=False, protocol=None, source_port=0, destination_port=0, tcp_flags=0)
TO_NOWHERE = replace(PACKET, destination=ipaddress.ip_address("0.0.0.0"))

BY_USER = Mark(MarkKind.USER, SERIAL, "imds", USER, 5)
BY_GROUP = Mark(MarkKind.GROUP, SERIAL, "dns", 5, GROUP)
BY_DEFAULT = Mark(MarkKind.DEFAULT, EARLIER, None, USER)
OPEN, AUDITED = Mark(MarkKind.OPEN), Mark(MarkKind.AUDIT, SERIAL, "imds", USER)


def sent_by(mark: Mark | None, state: State = State.ESTABLISHED, earlier: tuple[Mark, ...] = ()) -> Ends:
    return Ends(sending=Socket(state, mark, earlier))


def earlier(mark: Mark) -> Mark:
    return replace(mark, serial=EARLIER, lock=None)


class Row(NamedTuple):
    """A packet and the outcome."""

    policy: Policy
    packet: Packet | None
    ends: Ends
    expected: PacketReason


R = PacketReason
NO_SOCKET = Ends()
LOOSE = TWO_LOCKS._replace(strict=False)
DENYING_GROUPS = one_lock(deny=Identities(groups=frozenset({9})))
TO_DNS = replace(PACKET, destination=DNS)

WHAT_IS_GUARDED = {
    "no address": Row(TWO_LOCKS, None, NO_SOCKET, R.NOT_IP),
    "another address": Row(TWO_LOCKS, replace(PACKET, destination=ELSEWHERE), NO_SOCKET, R.NOT_LOCKED),
    "another port": Row(TWO_LOCKS, replace(PACKET, destination_port=81), NO_SOCKET, R.NOT_LOCKED),
    "another protocol": Row(TWO_LOCKS, replace(PACKET, protocol=None), NO_SOCKET, R.OTHER_PROTOCOL),
    "UDP": Row(TWO_LOCKS, replace(PACKET, protocol=Protocol.UDP), NO_SOCKET, R.UNAPPROVED_SOCKET),
    "a first fragment": Row(TWO_LOCKS, replace(PACKET, fragment=Fragment.FIRST), NO_SOCKET, R.UNAPPROVED_SOCKET),
    "a later fragment": Row(TWO_LOCKS, Packet(ELSEWHERE, IMDS, Fragment.LATER), NO_SOCKET, R.LATER_FRAGMENT),
    "unreadable": Row(TWO_LOCKS, UNREADABLE, NO_SOCKET, R.UNAPPROVED_SOCKET),
    "unreadable, of an approved socket": Row(TWO_LOCKS, UNREADABLE, sent_by(BY_USER), R.UNAPPROVED_SOCKET),
    "unreadable, to another address": Row(
        TWO_LOCKS, replace(UNREADABLE, destination=ELSEWHERE), NO_SOCKET, R.NOT_LOCKED
    ),
    "to 0.0.0.0": Row(TWO_LOCKS, TO_NOWHERE, sent_by(BY_USER), R.UNAPPROVED_SOCKET),
    "to 0.0.0.0, a port that nobody locks": Row(
        TWO_LOCKS, replace(TO_NOWHERE, destination_port=81), NO_SOCKET, R.NOT_LOCKED
    ),
    "unreadable, to 0.0.0.0": Row(
        TWO_LOCKS, replace(UNREADABLE, destination=TO_NOWHERE.destination), NO_SOCKET, R.UNAPPROVED_SOCKET
    ),
    "the policy is not strict": Row(LOOSE, PACKET, NO_SOCKET, R.NOT_STRICT),
    "nothing is locked": Row(make_policy([], strict=True), PACKET, NO_SOCKET, R.NOT_LOCKED),
}

THE_SENDING_SOCKET = {
    "no socket": Row(TWO_LOCKS, PACKET, NO_SOCKET, R.UNAPPROVED_SOCKET),
    "no mark: raw, from before, rewritten": Row(TWO_LOCKS, PACKET, sent_by(None), R.UNAPPROVED_SOCKET),
    "approved": Row(TWO_LOCKS, PACKET, sent_by(BY_USER), R.APPROVED_SOCKET),
    "approved, a first fragment": Row(
        TWO_LOCKS, replace(PACKET, fragment=Fragment.FIRST), sent_by(BY_USER), R.APPROVED_SOCKET
    ),
    "approved for another lock": Row(TWO_LOCKS, TO_DNS, sent_by(BY_USER), R.UNAPPROVED_SOCKET),
    "approved for a lock with the same lists": Row(
        TWINS, TO_DNS, sent_by(replace(BY_USER, fsuid=5)), R.APPROVED_SOCKET
    ),
    "approved by an earlier call, too": Row(
        TWO_LOCKS, PACKET, sent_by(BY_GROUP, earlier=(BY_USER,)), R.APPROVED_SOCKET
    ),
    "approved by the last call, too": Row(TWO_LOCKS, TO_DNS, sent_by(BY_GROUP, earlier=(BY_USER,)), R.APPROVED_SOCKET),
    "an earlier call at another lock": Row(TWO_LOCKS, TO_DNS, sent_by(OPEN, earlier=(BY_USER,)), R.UNAPPROVED_SOCKET),
    "an earlier audited call, enforced now": Row(
        TWO_LOCKS, PACKET, sent_by(BY_GROUP, earlier=(AUDITED,)), R.UNAPPROVED_SOCKET
    ),
    "an earlier mark where the kernel has none": Row(
        TWO_LOCKS, PACKET, sent_by(BY_USER, State.TIME_WAIT, (BY_USER,)), R.UNAPPROVED_SOCKET
    ),
    "a mark where the kernel has none": Row(TWO_LOCKS, PACKET, sent_by(BY_USER, State.TIME_WAIT), R.UNAPPROVED_SOCKET),
    "an open port approves nothing": Row(TWO_LOCKS, PACKET, sent_by(OPEN), R.UNAPPROVED_SOCKET),
    "an audited connect, enforced now": Row(TWO_LOCKS, PACKET, sent_by(AUDITED), R.UNAPPROVED_SOCKET),
    "an audited connect, in audit mode": Row(
        TWO_LOCKS._replace(mode=Mode.AUDIT), PACKET, sent_by(AUDITED), R.APPROVED_SOCKET
    ),
}

A_MARK_OF_AN_EARLIER_POLICY = {
    "the user of an earlier call is listed": Row(
        one_lock(), PACKET, sent_by(BY_GROUP, earlier=(earlier(BY_USER),)), R.APPROVED_SOCKET
    ),
    "the user of an earlier call is not listed any more": Row(
        one_lock(Identities(frozenset({OTHER_USER}))),
        PACKET,
        sent_by(earlier(BY_GROUP), earlier=(earlier(BY_USER),)),
        R.UNAPPROVED_SOCKET,
    ),
    "the user is listed": Row(one_lock(), PACKET, sent_by(earlier(BY_USER)), R.APPROVED_SOCKET),
    "the user is not listed any more": Row(
        one_lock(Identities(frozenset({OTHER_USER}))), PACKET, sent_by(earlier(BY_USER)), R.UNAPPROVED_SOCKET
    ),
    "the lock has the same name, and that says nothing": Row(
        one_lock(Identities(frozenset({OTHER_USER}))),
        PACKET,
        sent_by(replace(BY_USER, serial=EARLIER)),
        R.UNAPPROVED_SOCKET,
    ),
    "the group is listed": Row(one_lock(ONE_GROUP), PACKET, sent_by(earlier(BY_GROUP)), R.APPROVED_SOCKET),
    "another group is listed": Row(
        one_lock(Identities(groups=frozenset({OTHER_GROUP}))), PACKET, sent_by(earlier(BY_GROUP)), R.UNAPPROVED_SOCKET
    ),
    "a user ID is no group ID": Row(
        one_lock(Identities(groups=frozenset({USER}))), PACKET, sent_by(earlier(BY_USER)), R.UNAPPROVED_SOCKET
    ),
    "the group let it through, not the listed user": Row(
        one_lock(Identities(frozenset({5}))), PACKET, sent_by(earlier(BY_GROUP)), R.UNAPPROVED_SOCKET
    ),
    "the default still allows": Row(
        one_lock(NOBODY, default=Verdict.ALLOW), PACKET, sent_by(BY_DEFAULT), R.APPROVED_SOCKET
    ),
    "the default denies now": Row(one_lock(), PACKET, sent_by(BY_DEFAULT), R.UNAPPROVED_SOCKET),
    "the user is denied now": Row(
        one_lock(NOBODY, default=Verdict.ALLOW, deny=ONE_USER), PACKET, sent_by(BY_DEFAULT), R.UNAPPROVED_SOCKET
    ),
    "the user is denied now, the group is allowed": Row(
        one_lock(ONE_GROUP, deny=Identities(frozenset({5}))), PACKET, sent_by(earlier(BY_GROUP)), R.UNAPPROVED_SOCKET
    ),
    "some group is denied now": Row(DENYING_GROUPS, PACKET, sent_by(earlier(BY_USER)), R.UNAPPROVED_SOCKET),
    "some group is denied, and was then": Row(DENYING_GROUPS, PACKET, sent_by(BY_USER), R.APPROVED_SOCKET),
    "containers were allowed then": Row(
        one_lock(), PACKET, sent_by(replace(earlier(BY_USER), containers_unchecked=True)), R.UNAPPROVED_SOCKET
    ),
    "containers were allowed then, and are now": Row(
        one_lock(containers=Verdict.ALLOW),
        PACKET,
        sent_by(replace(earlier(BY_USER), containers_unchecked=True)),
        R.APPROVED_SOCKET,
    ),
}


def accepted(mark: Mark | None = None, state: State = State.ESTABLISHED, acked: int = 0, **more: object) -> Ends:
    """A socket with the numbers that only a connection of others has; ``mark`` is what a packet before has left."""
    return Ends(sending=Socket(state, mark, acked=acked, first=7, **more))  # type: ignore[arg-type]


ACCEPTED = Mark(MarkKind.ACCEPTED, gid=7)
SYN_ACK, DATA = replace(PACKET, tcp_flags=SYN | ACK), replace(PACKET, has_data=True)

A_CONNECTION_OF_OTHERS = {
    "the listener answers a SYN": Row(TWO_LOCKS, SYN_ACK, accepted(state=State.LISTEN), R.INCOMING),
    "the accepted socket answers a SYN with Fast Open": Row(
        TWO_LOCKS, SYN_ACK, accepted(state=State.SYN_RECV), R.INCOMING
    ),
    "a socket that connects answers no SYN": Row(
        TWO_LOCKS, SYN_ACK, accepted(state=State.SYN_SENT), R.UNAPPROVED_SOCKET
    ),
    "a SYN alone": Row(TWO_LOCKS, replace(PACKET, tcp_flags=SYN), accepted(ACCEPTED), R.UNAPPROVED_SOCKET),
    "the first packet": Row(TWO_LOCKS, PACKET, accepted(), R.INCOMING),
    "it closes at once": Row(TWO_LOCKS, replace(PACKET, tcp_flags=FIN | ACK), accepted(), R.INCOMING),
    "a later packet": Row(TWO_LOCKS, PACKET, accepted(ACCEPTED, acked=20), R.INCOMING),
    "a later packet without a mark": Row(TWO_LOCKS, PACKET, accepted(acked=20), R.UNAPPROVED_SOCKET),
    "the SYN of a connect was acknowledged": Row(TWO_LOCKS, PACKET, accepted(acked=1), R.UNAPPROVED_SOCKET),
    "the mark is of another connection of the socket": Row(
        TWO_LOCKS, PACKET, accepted(replace(ACCEPTED, gid=8), acked=1), R.UNAPPROVED_SOCKET
    ),
    "Fast Open: data before the handshake is over": Row(TWO_LOCKS, DATA, accepted(state=State.SYN_RECV), R.INCOMING),
    "both ends have connected: no data before the handshake is over": Row(
        TWO_LOCKS, PACKET, accepted(state=State.SYN_RECV), R.UNAPPROVED_SOCKET
    ),
    "its connect is not answered yet": Row(TWO_LOCKS, DATA, accepted(state=State.SYN_SENT), R.UNAPPROVED_SOCKET),
    "a raw socket": Row(TWO_LOCKS, PACKET, accepted(is_tcp=False), R.UNAPPROVED_SOCKET),
    "an answer over UDP": Row(
        TWO_LOCKS, replace(PACKET, protocol=Protocol.UDP, tcp_flags=0), accepted(is_tcp=False), R.UNAPPROVED_SOCKET
    ),
    "a first fragment of it": Row(TWO_LOCKS, replace(PACKET, fragment=Fragment.FIRST), accepted(), R.UNAPPROVED_SOCKET),
    "without flags": Row(TWO_LOCKS, replace(PACKET, tcp_flags=0), accepted(), R.UNAPPROVED_SOCKET),
    "no whole socket": Row(TWO_LOCKS, SYN_ACK, accepted(state=State.NEW_SYN_RECV), R.UNAPPROVED_SOCKET),
    "an accepted socket is no client of an open port": Row(
        TWO_LOCKS,
        replace(ANSWER, source_port=53),
        Ends(Socket(), None, Socket(mark=ACCEPTED), True),
        R.UNAPPROVED_SOCKET,
    ),
}


def test_the_first_packet_of_a_service_marks_its_socket() -> None:
    """Once; a SYN-ACK leaves no mark, since the listener has other connections, too."""
    after = [
        decide_packet(TWO_LOCKS, SERIAL, packet, ends).mark
        for packet, ends in (
            (PACKET, accepted()),
            (PACKET, accepted(BY_GROUP)),
            (PACKET, accepted(ACCEPTED, acked=20)),
            (SYN_ACK, accepted(state=State.LISTEN)),
            (PACKET, accepted(acked=1)),
            (PACKET, sent_by(BY_USER)),
        )
    ]
    assert after == [ACCEPTED, ACCEPTED, None, None, None, None]


def answered(client: Socket | None, *, by_loopback: bool = True) -> Ends:
    return Ends(sending=Socket(), at_destination=client, by_loopback=by_loopback)


CLIENT = Socket(State.ESTABLISHED, BY_USER)
FROM_OPEN_PORT = replace(ANSWER, source_port=53)
AT_TIME_WAIT = Socket(State.TIME_WAIT)

WITHOUT_AN_APPROVED_SOCKET = {
    "a service answers": Row(TWO_LOCKS, ANSWER, answered(CLIENT), R.REPLY),
    "a service opens": Row(
        TWO_LOCKS, replace(ANSWER, tcp_flags=SYN | ACK), answered(Socket(State.SYN_SENT, BY_USER)), R.REPLY
    ),
    "not by loopback": Row(TWO_LOCKS, ANSWER, answered(CLIENT, by_loopback=False), R.UNAPPROVED_SOCKET),
    "a UDP service is judged by its own right": Row(
        TWO_LOCKS, replace(ANSWER, protocol=Protocol.UDP, tcp_flags=0), answered(CLIENT), R.UNAPPROVED_SOCKET
    ),
    "a segment without flags": Row(TWO_LOCKS, replace(ANSWER, tcp_flags=0), answered(CLIENT), R.UNAPPROVED_SOCKET),
    "nobody receives it": Row(TWO_LOCKS, ANSWER, answered(None), R.UNAPPROVED_SOCKET),
    "the receiver is not approved": Row(TWO_LOCKS, ANSWER, answered(Socket()), R.UNAPPROVED_SOCKET),
    "the receiver is approved for another lock": Row(
        TWO_LOCKS, ANSWER, answered(Socket(State.ESTABLISHED, BY_GROUP)), R.UNAPPROVED_SOCKET
    ),
    "the receiver listens": Row(TWO_LOCKS, ANSWER, answered(Socket(State.LISTEN, BY_USER)), R.UNAPPROVED_SOCKET),
    "a connection that is not accepted yet": Row(
        TWO_LOCKS, ANSWER, answered(Socket(State.NEW_SYN_RECV, BY_USER)), R.UNAPPROVED_SOCKET
    ),
    "from a port that is not locked": Row(
        TWO_LOCKS, FROM_OPEN_PORT, answered(Socket(State.ESTABLISHED, OPEN)), R.REPLY
    ),
    "from a port that is not locked any more": Row(TWO_LOCKS, FROM_OPEN_PORT, answered(CLIENT), R.REPLY),
    "from a port that is not locked, to no client": Row(
        TWO_LOCKS, FROM_OPEN_PORT, answered(Socket()), R.UNAPPROVED_SOCKET
    ),
    "from a locked port, to a client of an open one": Row(
        TWO_LOCKS, ANSWER, answered(Socket(State.ESTABLISHED, OPEN)), R.UNAPPROVED_SOCKET
    ),
    "from 0.0.0.0": Row(
        TWO_LOCKS, replace(ANSWER, source=TO_NOWHERE.destination), answered(CLIENT), R.UNAPPROVED_SOCKET
    ),
    "a reset": Row(TWO_LOCKS, replace(PACKET, tcp_flags=RST | ACK), NO_SOCKET, R.RESET),
    "a reset with SYN": Row(TWO_LOCKS, replace(PACKET, tcp_flags=RST | SYN), NO_SOCKET, R.RESET),
    "the first fragment of a reset": Row(
        TWO_LOCKS, replace(PACKET, tcp_flags=RST, fragment=Fragment.FIRST), NO_SOCKET, R.UNAPPROVED_SOCKET
    ),
    "closed here": Row(TWO_LOCKS, PACKET, Ends(at_source=AT_TIME_WAIT), R.CLOSED),
    "closed here, and both ends are here": Row(TWO_LOCKS, PACKET, Ends(at_destination=AT_TIME_WAIT), R.CLOSED),
    "closed here, and the other end closes, too": Row(
        TWO_LOCKS, replace(PACKET, tcp_flags=FIN | ACK), Ends(at_source=AT_TIME_WAIT), R.CLOSED
    ),
    "closed, and opened again": Row(
        TWO_LOCKS, replace(PACKET, tcp_flags=SYN), Ends(at_source=AT_TIME_WAIT), R.UNAPPROVED_SOCKET
    ),
    "closed, without flags": Row(
        TWO_LOCKS, replace(PACKET, tcp_flags=0), Ends(at_source=AT_TIME_WAIT), R.UNAPPROVED_SOCKET
    ),
    "closed, the first fragment": Row(
        TWO_LOCKS, replace(PACKET, fragment=Fragment.FIRST), Ends(at_source=AT_TIME_WAIT), R.UNAPPROVED_SOCKET
    ),
    "not closed": Row(TWO_LOCKS, PACKET, Ends(at_source=Socket()), R.UNAPPROVED_SOCKET),
    "a UDP datagram is not of a TCP connection": Row(
        TWO_LOCKS,
        replace(PACKET, protocol=Protocol.UDP, tcp_flags=0),
        Ends(at_source=AT_TIME_WAIT),
        R.UNAPPROVED_SOCKET,
    ),
}

TABLE = {
    **WHAT_IS_GUARDED,
    **THE_SENDING_SOCKET,
    **A_MARK_OF_AN_EARLIER_POLICY,
    **A_CONNECTION_OF_OTHERS,
    **WITHOUT_AN_APPROVED_SOCKET,
}


@pytest.mark.parametrize("name", TABLE)
def test_row(name: str) -> None:
    policy, packet, ends, expected = TABLE[name]
    decision = decide_packet(policy, SERIAL, packet, ends)
    assert (decision.reason, decision.allowed) == (expected, expected is not R.UNAPPROVED_SOCKET)


def test_no_row_hides_another() -> None:
    parts = (
        WHAT_IS_GUARDED,
        THE_SENDING_SOCKET,
        A_MARK_OF_AN_EARLIER_POLICY,
        A_CONNECTION_OF_OTHERS,
        WITHOUT_AN_APPROVED_SOCKET,
    )
    assert len(TABLE) == sum(map(len, parts))


def test_the_table_has_every_reason() -> None:
    assert {row.expected for row in TABLE.values()} == set(PacketReason)


@pytest.mark.parametrize("name", TABLE)
def test_audit_mode_lets_every_packet_through_and_says_the_same(name: str) -> None:
    """But an audited connect's packets are not audited once more: the connect was counted."""
    policy, packet, ends, expected = TABLE[name]
    decision = decide_packet(policy._replace(mode=Mode.AUDIT), SERIAL, packet, ends)
    assert decision.allowed
    audited = ends.sending is not None and AUDITED in ends.sending.approvals
    if not audited:
        assert decision.reason is expected


@pytest.mark.parametrize(
    ("packet", "expected"), [(PACKET, "imds"), (TO_DNS, "dns"), (UNREADABLE, None), (TO_NOWHERE, None)]
)
def test_the_lock_is_named_where_it_is_known(packet: Packet, expected: str | None) -> None:
    decision = decide_packet(TWO_LOCKS, SERIAL, packet, NO_SOCKET)
    assert decision == PacketDecision(False, PacketReason.UNAPPROVED_SOCKET, expected)


marks = st.builds(
    Mark,
    st.sampled_from(MarkKind),
    st.sampled_from((SERIAL, EARLIER)),
    st.sampled_from((None, "default", "imds")),
    st.sampled_from((0, 1, 512, 1001)),
    st.sampled_from((0, 1, 512, 1001)),
    st.booleans(),
)
sockets = st.builds(
    Socket,
    st.sampled_from(State),
    st.none() | marks,
    st.lists(marks, max_size=2).map(tuple),
    st.booleans(),
    st.sampled_from((0, 1, 2)),
    st.sampled_from((0, 1)),
)
ends_of_packets = st.builds(Ends, st.none() | sockets, st.none() | sockets, st.none() | sockets, st.booleans())
packets = st.builds(
    Packet,
    st.ip_addresses(),
    st.ip_addresses() | st.just(IMDS),
    st.sampled_from(Fragment),
    st.booleans(),
    st.none() | st.sampled_from(Protocol),
    st.integers(0, 65535),
    st.integers(0, 65535),
    st.integers(0, 255),
    st.booleans(),
)


@patient
@given(policies(also_strict=True), packets, ends_of_packets)
def test_only_a_strict_policy_that_is_enforced_drops_packets(policy: Policy, packet: Packet, ends: Ends) -> None:
    decision = decide_packet(policy, SERIAL, packet, ends)
    assert decision.allowed or (policy.strict and policy.mode is Mode.ENFORCE and bool(policy.locks))
    assert decision.allowed or decision.reason is PacketReason.UNAPPROVED_SOCKET


@patient
@given(policies(also_strict=True), packets, ends_of_packets)
def test_a_mark_never_makes_a_packet_worse(policy: Policy, packet: Packet, ends: Ends) -> None:
    without = replace(ends, sending=None)
    if decide_packet(policy, SERIAL, packet, without).allowed:
        assert decide_packet(policy, SERIAL, packet, ends).allowed
