# SPDX-License-Identifier: Apache-2.0
"""The specification of strict mode: ``decide_packet()`` says whether a packet may leave, and why.

bpf/egress.h is compared with it. Nothing here touches the system.

A connect is judged by who makes it; a packet by the socket that sends it. The connect hooks mark each socket that they
let through with the reason. A packet to a locked endpoint leaves when the reason still holds. Few others leave: what
belongs to a connection that others made, resets, and what the kernel says for a connection that is closed.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Union

from imds_guard.policy.decide import Destination, find_lock, is_locked_anywhere
from imds_guard.policy.filter_address import is_filter_address, numbers_in
from imds_guard.policy.filters import FILTER_NETWORK
from imds_guard.policy.model import Address, Lock, Mode, Policy, Protocol, Verdict
from imds_guard.policy.packet import ACK, RST, SYN, Fragment, Packet

# --- the question ---------------------------------------------------------------------------------------------------


class MarkKind(enum.IntEnum):
    """Why a socket's last connect or sendmsg was let through. The numbers are ABI (bpf/imds_guard.h)."""

    USER = 1
    GROUP = 2
    DEFAULT = 3
    AUDIT = 4
    """It would have been denied, but the mode was audit."""
    OPEN = 5
    """A TCP connect to a locked address, to a port that is not locked."""
    ACCEPTED = 6
    """Others made the connection. It is the only mark that decide_packet() itself leaves."""
    FILTER = 7
    """A connect that was redirected to a filter."""


@dataclass(frozen=True)
class Mark:
    """What the connect hooks left on a socket."""

    kind: MarkKind
    serial: int = 0
    """The number of the policy of that moment. Each change of policy has another one."""
    lock: str | None = None
    """The lock whose lists let it through. Only read where the serial is that of the policy."""
    fsuid: int = 0
    gid: int = 0
    """The allowed group, for GROUP. For ACCEPTED it is Socket.first. For FILTER it is T * 256 + F of the filter's
    address."""
    containers_unchecked: bool = False
    """Containers were allowed then, so nobody asked whether the caller was in one."""


class State(enum.IntEnum):
    """States of a TCP socket that count here. Source: include/net/tcp_states.h in Linux."""

    ESTABLISHED = 1
    SYN_SENT = 2
    SYN_RECV = 3
    TIME_WAIT = 6
    LISTEN = 10
    NEW_SYN_RECV = 12


@dataclass(frozen=True)
class Socket:
    """A socket of this machine, or what the kernel keeps in place of one.

    A connection in TIME_WAIT, and one that a listener has not accepted yet (NEW_SYN_RECV), are no whole sockets: they
    have no mark. Source: sk_fullsock() in Linux include/net/sock.h.
    """

    state: State = State.ESTABLISHED
    mark: Mark | None = None
    """Of its last connect or sendmsg that was let through."""
    earlier: tuple[Mark, ...] = ()
    """Of calls before it, where they were let through by other lists: a UDP socket may be connected to one lock and
    send to another one. The kernel keeps at least the last one of each of 8 lists."""
    is_tcp: bool = True
    """False for UDP and for raw sockets, whatever their protocol."""
    acked: int = 1
    """Bytes that the peer has acknowledged. The SYN of a connect counts as one: kernel/tcp_birth.py."""
    first: int = 0
    """The sequence number where ``acked`` began to count. It is random, and so another one for each connection."""

    @property
    def approval(self) -> Mark | None:
        """The mark, where the kernel can have one."""
        return None if self.state in (State.TIME_WAIT, State.NEW_SYN_RECV) else self.mark

    @property
    def approvals(self) -> tuple[Mark, ...]:
        """All marks, where the kernel can have any."""
        return () if self.approval is None else (self.approval, *self.earlier)


@dataclass(frozen=True)
class Ends:
    """The sockets of this machine that a packet has to do with.

    ``sending`` is the socket that it belongs to. Raw sockets have no mark. The kernel's own answers belong to a socket
    of the kernel; a SYN-ACK to the listener. The hook runs for no packet without a whole socket, and is written for
    such a packet all the same: BPF_CGROUP_RUN_PROG_INET_EGRESS() in Linux include/linux/bpf-cgroup.h. The other two
    are what the kernel's TCP tables have for the packet's addresses and ports, as for one that arrives: at the end
    where it comes from, and at the end where it goes.
    """

    sending: Socket | None = None
    at_source: Socket | None = None
    at_destination: Socket | None = None
    by_loopback: bool = False
    """It leaves by the loopback interface. So do all packets to an address of this machine."""


# --- the answer -----------------------------------------------------------------------------------------------------


class PacketReason(enum.Enum):
    """Why a packet may leave or may not. Checked in this order; the first that applies decides."""

    NOT_IP = "it has no IP address"
    LATER_FRAGMENT = "a later fragment: without the first one nobody can put it together"
    OTHER_PROTOCOL = "neither TCP nor UDP"
    NOT_LOCKED = "not locked"
    NOT_STRICT = "the policy is not strict"
    APPROVED_SOCKET = "the reason that let the socket through still holds"
    INCOMING = "it belongs to a connection that others made to a service of this machine"
    REPLY = "a service of this machine answers an approved client"
    RESET = "a reset: it ends a connection"
    CLOSED = "it belongs to a closed connection, which the kernel keeps for a while"
    UNAPPROVED_SOCKET = "no hook has approved the socket, or its right has ended since"


@dataclass(frozen=True)
class PacketDecision:
    """The outcome for one packet. Only UNAPPROVED_SOCKET is counted and reported."""

    allowed: bool
    reason: PacketReason
    lock: str | None = None
    """None also where nobody can say which lock it is: the packet is unreadable, or goes to 0.0.0.0."""
    mark: Mark | None = None
    """What is left on the sending socket, in place of its mark."""


# --- the decision ---------------------------------------------------------------------------------------------------


def decide_packet(policy: Policy, serial: int, packet: Packet | None, ends: Ends) -> PacketDecision:
    """Whether a packet may leave under the policy with this serial number, and why."""
    if packet is None:
        return PacketDecision(True, PacketReason.NOT_IP)
    if packet.fragment is Fragment.LATER:
        return PacketDecision(True, PacketReason.LATER_FRAGMENT)
    if packet.readable and packet.protocol is None:
        return PacketDecision(True, PacketReason.OTHER_PROTOCOL)
    target = _target_of(policy, packet)
    if target is Unlocked.PORT:
        return PacketDecision(True, PacketReason.NOT_LOCKED)
    lock = target.name if isinstance(target, Lock) else None
    reason = _reason(policy, serial, packet, ends, target) if policy.strict else PacketReason.NOT_STRICT
    dropped = reason is PacketReason.UNAPPROVED_SOCKET and policy.mode is Mode.ENFORCE
    mark = _new_mark(packet, ends.sending) if reason is PacketReason.INCOMING else None
    return PacketDecision(not dropped, reason, lock, mark)


class Unlocked(enum.Enum):
    """In place of a lock."""

    PORT = "nothing is locked there"
    UNKNOWN = "something is locked there; nobody can say what"


@dataclass(frozen=True)
class FilterListener:
    """In place of a lock: the address of a filter, where only the connects lead that were redirected there."""

    numbers: tuple[int, int]
    """T and F."""


Target = Union[Lock, Unlocked, FilterListener]


def _target_of(policy: Policy, packet: Packet) -> Target:
    """The lock that the packet is for."""
    if packet.readable and packet.protocol is not None:
        return _target(policy, packet.destination, packet.destination_port, packet.protocol)
    return Unlocked.UNKNOWN if _has_locked_port(policy, packet.destination) else Unlocked.PORT


def _target(policy: Policy, address: Address, port: int, protocol: Protocol) -> Target:
    """The lock of an address as it is in a packet: there 0.0.0.0 leads nowhere, so nobody knows where it should go."""
    destination = Destination(address, port, protocol)
    if address.version == 4 and int(address) == 0:
        return Unlocked.UNKNOWN if is_locked_anywhere(policy, destination) else Unlocked.PORT
    if policy.filters and is_filter_address(address, port, protocol):
        return FilterListener(numbers_in(address))
    return find_lock(policy, destination) or Unlocked.PORT


def _has_locked_port(policy: Policy, address: Address) -> bool:
    """An unreadable packet counts as one for every port of its address. For 0.0.0.0, of every IPv4 address."""
    anywhere = address.version == 4 and int(address) == 0
    networks = [endpoint.network for lock in policy.locks for endpoint in lock.endpoints]
    networks += [FILTER_NETWORK] if policy.filters else []
    return any(one.version == 4 if anywhere else one.version == address.version and address in one for one in networks)


def _reason(policy: Policy, serial: int, packet: Packet, ends: Ends, target: Target) -> PacketReason:
    """The reason for a packet to a locked endpoint under a strict policy."""
    approvals = () if ends.sending is None else ends.sending.approvals
    if isinstance(target, FilterListener):
        approvals = approvals[:1]  # only TCP is redirected, and a TCP socket has one connection
    if any(_approves(policy, serial, target, mark) for mark in approvals):
        return PacketReason.APPROVED_SOCKET
    if ends.sending is not None and _is_of_incoming(packet, ends.sending):
        return PacketReason.INCOMING
    if packet.tcp_flags and ends.by_loopback and _is_for_approved(policy, serial, packet, ends.at_destination):
        return PacketReason.REPLY
    # The kernel sends what follows in one piece. In a fragment the flags may be overwritten (RFC 1858, section 3).
    if packet.fragment is Fragment.FIRST:
        return PacketReason.UNAPPROVED_SOCKET
    if packet.tcp_flags & RST:
        return PacketReason.RESET
    if packet.tcp_flags and not packet.tcp_flags & SYN:
        states = [end.state for end in (ends.at_source, ends.at_destination) if end is not None]
        if State.TIME_WAIT in states:
            return PacketReason.CLOSED
    return PacketReason.UNAPPROVED_SOCKET


def _is_of_incoming(packet: Packet, sending: Socket) -> bool:
    """Whether the packet belongs to a connection that others made.

    A connection whose handshake is over, without an acknowledged byte, was accepted. A SYN-ACK belongs to the socket
    that listens; with Fast Open to the accepted one, which can send data before the handshake is over. No other can.
    """
    is_whole = sending.state not in (State.TIME_WAIT, State.NEW_SYN_RECV)
    if not (is_whole and sending.is_tcp and packet.fragment is Fragment.WHOLE and packet.tcp_flags & ACK):
        return False
    if packet.tcp_flags & SYN:
        return sending.state in (State.LISTEN, State.SYN_RECV)
    if _is_marked_accepted(sending):
        return True
    handshake_is_over = sending.state is not State.SYN_RECV or packet.has_data
    return sending.acked == 0 and sending.state is not State.SYN_SENT and handshake_is_over


def _is_marked_accepted(sending: Socket) -> bool:
    """A socket that was used again, with connect(), has another connection now."""
    mark = sending.approval
    return mark is not None and mark.kind is MarkKind.ACCEPTED and mark.gid == sending.first


def _new_mark(packet: Packet, sending: Socket | None) -> Mark | None:
    """The first packet of a service marks its socket: later ones show nothing of who made the connection."""
    if sending is None or packet.tcp_flags & SYN or _is_marked_accepted(sending):
        return None
    return Mark(MarkKind.ACCEPTED, gid=sending.first)


def _is_for_approved(policy: Policy, serial: int, packet: Packet, client: Socket | None) -> bool:
    """Whether the receiver is a client that was approved for the service that the packet comes from.

    A listening socket is not a client, whatever it was approved for before. Only the last mark counts: a TCP socket has
    one connection.
    """
    if client is None or client.state is State.LISTEN:
        return False
    service = _target(policy, packet.source, packet.source_port, Protocol.TCP)
    if service is Unlocked.PORT:
        # Everybody may connect to it. The mark shows that the socket is the client: it made the connect.
        return client.approval is not None and client.approval.kind is not MarkKind.ACCEPTED
    return _approves(policy, serial, service, client.approval)


def _approves(policy: Policy, serial: int, target: Target, mark: Mark | None) -> bool:
    """Whether the reason of a mark lets packets to a lock through now."""
    if mark is None or isinstance(target, Unlocked) or mark.kind in (MarkKind.OPEN, MarkKind.ACCEPTED):
        return False
    if mark.kind is MarkKind.AUDIT:
        return policy.mode is Mode.AUDIT
    if isinstance(target, FilterListener) or mark.kind is MarkKind.FILTER:
        return target == FilterListener(divmod(mark.gid, 256)) and mark.kind is MarkKind.FILTER
    if mark.serial == serial and _lists_of(policy, mark.lock) == _lists(policy, target):
        return True
    return _is_still_allowed(policy, target, mark)


def _is_still_allowed(policy: Policy, lock: Lock, mark: Mark) -> bool:
    """Whether another policy, or another lock, lets through what the mark says of the caller.

    A mark does not have the caller's groups, so a lock that denies groups can't be asked.
    """
    if lock.deny.groups or mark.fsuid in lock.deny.users:
        return False
    if mark.containers_unchecked and policy.containers is Verdict.DENY:
        return False
    if mark.kind is MarkKind.USER:
        return mark.fsuid in lock.allow.users or (mark.fsuid == policy.filter_uid and _has_filter(policy, lock))
    if mark.kind is MarkKind.GROUP:
        return mark.gid in lock.allow.groups
    return lock.default is Verdict.ALLOW


def _has_filter(policy: Policy, lock: Lock) -> bool:
    return any(lock.name in one.locks for one in policy.filters)


def _lists(policy: Policy, lock: Lock) -> tuple[object, ...]:
    return lock.allow, lock.deny, lock.default, [one.name for one in policy.filters if lock.name in one.locks]


def _lists_of(policy: Policy, name: str | None) -> tuple[object, ...] | None:
    return next((_lists(policy, lock) for lock in policy.locks if lock.name == name), None)
