# SPDX-License-Identifier: Apache-2.0
"""Random forwarded packets, for ``decide_forwarded()`` and for what is compared with it."""

from __future__ import annotations

from random import Random

from imds_guard.policy.decide_forwarded import ACK, Direction, ForwardedPacket
from imds_guard.policy.model import Policy, Protocol, unmapped
from imds_guard.policy.packet import RST, SYN, Fragment
from tests import generate

FIN, PSH, URG = 0x01, 0x08, 0x20
"""RFC 9293, section 3.1."""
_USUAL = (SYN, ACK, SYN | ACK, PSH | ACK, FIN | ACK, RST)
FLAG_BITS = {"FIN": FIN, "SYN": SYN, "RST": RST, "PSH": PSH, "ACK": ACK, "URG": URG}


def packet(random: Random, policy: Policy) -> ForwardedPacket:
    """Mostly to a locked address, and mostly whole."""
    to = generate.destination(random, policy)
    address = unmapped(to.address)
    protocol = None if random.random() < 0.05 else to.protocol
    one = ForwardedPacket(
        address,
        protocol,
        to.port if protocol is not None else 0,
        _flags(random) if protocol is Protocol.TCP else 0,
        direction=random.choice(tuple(Direction)),
    )
    return _fragment(random, one) if random.random() < 0.3 else one


def _flags(random: Random) -> int:
    if random.random() < 0.6:
        return random.choice(_USUAL)
    return sum(random.sample(sorted(FLAG_BITS.values()), random.randint(0, len(FLAG_BITS))))


def _fragment(random: Random, whole: ForwardedPacket) -> ForwardedPacket:
    """A fragment of a packet. Conntrack puts them together before they are forwarded, so it knows none."""
    kind = random.choice((Fragment.FIRST, Fragment.LATER))
    is_cut_short = whole.destination.version == 6 and random.random() < 0.4
    protocol, port, flags = whole.protocol, whole.port, whole.tcp_flags
    if is_cut_short and (kind is Fragment.LATER or random.random() < 0.5):
        protocol = None  # the next header is not that of the protocol
    if kind is Fragment.LATER or is_cut_short or protocol is None:
        port, flags = 0, 0
    elif protocol is Protocol.UDP:
        port = max(port, 1)  # rules take port 0 for one that is not there
    is_cut_short = is_cut_short and (protocol is None or (protocol is Protocol.UDP and kind is Fragment.FIRST))
    return ForwardedPacket(whole.destination, protocol, port, flags, kind, is_cut_short)
