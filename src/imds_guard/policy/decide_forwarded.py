# SPDX-License-Identifier: Apache-2.0
"""The specification of the rules for forwarded packets: ``decide_forwarded()`` says if a packet passes, and why.

The rules of nft and of iptables are compared with it. Nothing here touches the system.

Nobody knows the owner of a packet that this machine forwards. So none may begin a connection to a locked endpoint,
whoever the policy allows. What answers a connection that the other side has begun passes: load balancers probe
containers from locked addresses.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from imds_guard.policy.decide import Destination, find_lock
from imds_guard.policy.model import Address, Mode, Policy, Protocol
from imds_guard.policy.packet import SYN, Fragment

ACK = 0x10
"""RFC 9293, section 3.1."""


class Direction(enum.Enum):
    """Where a packet belongs in its connection, as conntrack sees it."""

    ORIGINAL = "original"
    REPLY = "reply"
    UNKNOWN = "unknown"
    """Conntrack is not in use here, does not track the packet, or found it invalid."""


@dataclass(frozen=True)
class ForwardedPacket:
    """What counts of a forwarded packet. It is one that a receiver can read, unless it is a fragment.

    A fragment of IPv6 may end before the header of its protocol: then neither side can tell the protocol from it.
    """

    destination: Address
    protocol: Protocol | None
    """None for any other protocol, and where the fragment does not tell."""
    port: int = 0
    tcp_flags: int = 0
    fragment: Fragment = Fragment.WHOLE
    is_cut_short: bool = False
    """A first fragment that does not reach as far as the port, or a fragment that does not tell its protocol."""
    direction: Direction = Direction.UNKNOWN


class ForwardReason(enum.Enum):
    """Why a packet passes or does not. Checked in this order; the first that applies decides."""

    FRAGMENT = "a fragment to a locked address, which may hide the beginning of a connection"
    OTHER_PROTOCOL = "neither TCP nor UDP"
    LATER_FRAGMENT = "a later fragment of UDP: without the first one nobody can put it together"
    NOT_LOCKED = "not locked"
    ANSWER = "it belongs to a connection that the other side has begun"
    REJECTED = "it goes to a locked endpoint"


@dataclass(frozen=True)
class ForwardDecision:
    """The outcome for one packet. FRAGMENT and REJECTED are counted, in audit mode, too."""

    passes: bool
    reason: ForwardReason
    lock: str | None = None


def decide_forwarded(policy: Policy, packet: ForwardedPacket) -> ForwardDecision:
    """Whether the machine forwards a packet under this policy, and why."""
    enforced = policy.mode is Mode.ENFORCE
    if packet.fragment is not Fragment.WHOLE and _may_hide(policy, packet):
        return ForwardDecision(not enforced, ForwardReason.FRAGMENT)
    if packet.protocol is None:
        return ForwardDecision(True, ForwardReason.OTHER_PROTOCOL)
    if packet.fragment is Fragment.LATER:
        return ForwardDecision(True, ForwardReason.LATER_FRAGMENT)
    lock = find_lock(policy, Destination(packet.destination, packet.port, packet.protocol))
    if lock is None:
        return ForwardDecision(True, ForwardReason.NOT_LOCKED)
    if _is_answer(packet):
        return ForwardDecision(True, ForwardReason.ANSWER, lock.name)
    return ForwardDecision(not enforced, ForwardReason.REJECTED, lock.name)


def _may_hide(policy: Policy, packet: ForwardedPacket) -> bool:
    """Whether a fragment may be a part of what must not pass.

    A TCP header can be cut in two between its port and its flags, and a later fragment may overwrite the flags of the
    first one (RFC 1858, RFC 3128). A UDP header comes in one piece, unless headers of IPv6 stand before it.
    """
    networks = [endpoint for lock in policy.locks for endpoint in lock.endpoints if endpoint.covers(packet.destination)]
    if packet.is_cut_short:
        return bool(networks)
    return packet.protocol is Protocol.TCP and any(endpoint.tcp for endpoint in networks)


def _is_answer(packet: ForwardedPacket) -> bool:
    """A packet of TCP that does not begin a connection, unless conntrack knows that its sender has begun it.

    SYN without ACK begins one, whatever else is set. No answer has that, not even where conntrack calls it a reply:
    who forges a source can make the first packet that conntrack sees, in the other direction. A datagram can't be told
    from an answer for the same reason, so each one is rejected.
    """
    if packet.protocol is not Protocol.TCP or packet.tcp_flags & (SYN | ACK) == SYN:
        return False
    return packet.direction is not Direction.ORIGINAL
