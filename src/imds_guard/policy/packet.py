# SPDX-License-Identifier: Apache-2.0
"""What counts of an IP packet under strict mode: addresses, protocol, ports, TCP flags, and whether it is a fragment.

Written from the RFCs, so that it can be compared with bpf/egress.h. A packet is read as its receiver reads it. Length
fields and checksums are not read: by these a receiver can only take less of the packet, or discard it. Nor are the
addresses in source routes and routing headers, where it may go next: it is a packet to the address in its IP header.
"""

from __future__ import annotations

import enum
import ipaddress
import struct
from dataclasses import dataclass, replace

from imds_guard.policy.model import Address, Protocol, unmapped

ETHERTYPE_IPV4, ETHERTYPE_IPV6 = 0x0800, 0x86DD

HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION_OPTIONS = 0, 43, 44, 51, 60
"""Headers of IPv6 that another header follows: RFC 8200, section 4; RFC 4302."""
EXTENSION_HEADERS = frozenset((HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION_OPTIONS))
MAX_EXTENSION_HEADERS = 7
"""A packet with more is unreadable. No stack sends as many."""

SYN, RST, ACK = 0x02, 0x04, 0x10
"""RFC 9293, section 3.1."""

_TRANSPORTS = {6: Protocol.TCP, 17: Protocol.UDP}
_IPV4_HEADER, _IPV6_HEADER = 20, 40
_EXTENSION_HEAD = struct.Struct("!BBH")  # next header; length; of a Fragment header the offset and the M flag
_PORTS = struct.Struct("!HH")
_TCP_LENGTH_AT, _TCP_FLAGS_AT = 12, 13


class Fragment(enum.Enum):
    """How much of a datagram a packet is. An IPv6 packet whose Fragment header says "all" is WHOLE (RFC 6946)."""

    WHOLE = "whole"
    FIRST = "first"
    LATER = "later"


@dataclass(frozen=True)
class Packet:
    """What counts of one packet. Fields that can't be read, and those of a LATER fragment, have their defaults."""

    source: Address
    destination: Address
    fragment: Fragment = Fragment.WHOLE
    readable: bool = True
    """False when nobody can say for which port it is. No stack sends such a packet."""
    protocol: Protocol | None = None
    """None for any other protocol than TCP and UDP, which strict mode does not guard."""
    source_port: int = 0
    destination_port: int = 0
    tcp_flags: int = 0
    """0 for a packet that is not TCP, or too short to have flags."""
    has_data: bool = False
    """Something follows the TCP header. False for a packet without flags."""


def read_packet(ethertype: int, data: bytes) -> Packet | None:
    """Reads a packet from its IP header on. None when it has no address: no IP packet, or the header is cut short."""
    if ethertype == ETHERTYPE_IPV4 and len(data) >= _IPV4_HEADER:
        return _read_ipv4(data)
    if ethertype == ETHERTYPE_IPV6 and len(data) >= _IPV6_HEADER:
        return _read_ipv6(data)
    return None


def _read_ipv4(data: bytes) -> Packet:
    """RFC 791, section 3.1. A receiver discards other versions and shorter headers (RFC 1122, section 3.2.1.1)."""
    source, destination = ipaddress.IPv4Address(data[12:16]), ipaddress.IPv4Address(data[16:20])
    version, length = data[0] >> 4, (data[0] & 0x0F) * 4
    if version != 4 or length < _IPV4_HEADER:
        return Packet(source, destination, readable=False)
    (fragment,) = struct.unpack_from("!H", data, 6)
    if fragment & 0x1FFF:
        return Packet(source, destination, Fragment.LATER)
    kind = Fragment.FIRST if fragment & 0x2000 else Fragment.WHOLE
    return _with_transport(Packet(source, destination, kind), data, length, data[9])


def _read_ipv6(data: bytes) -> Packet:
    """RFC 8200, section 3, and the chain of extension headers: in any order, since receivers take any (section 4.1)."""
    source, destination = unmapped(ipaddress.IPv6Address(data[8:24])), unmapped(ipaddress.IPv6Address(data[24:40]))
    unreadable = Packet(source, destination, readable=False)
    if data[0] >> 4 != 6:
        return unreadable
    kind, header, at = Fragment.WHOLE, data[6], _IPV6_HEADER
    for _ in range(MAX_EXTENSION_HEADERS + 1):
        if header not in EXTENSION_HEADERS:
            return _with_transport(Packet(source, destination, kind), data, at, header)
        # In a receiver that does not obey RFC 5722 a later fragment overwrites all but the first 8 bytes of the
        # first one. That is the transport's ports, or another header: then the ports may be others.
        if kind is Fragment.FIRST or len(data) < at + _EXTENSION_HEAD.size:
            return unreadable
        following, length, offset = _EXTENSION_HEAD.unpack_from(data, at)
        if header == FRAGMENT:
            if offset >> 3:
                return Packet(source, destination, Fragment.LATER)
            kind = Fragment.FIRST if offset & 1 else Fragment.WHOLE
        at += _extension_length(header, length)
        header = following
    return unreadable


def _extension_length(header: int, length: int) -> int:
    """The length in bytes of an extension header, from its length field.

    RFC 8200 counts 8 bytes without the first 8 (section 4.2), and has no such field in a Fragment header (section
    4.5). RFC 4302 counts 4 bytes less 2 (section 2.2).
    """
    if header == FRAGMENT:
        return 8
    return (length + 2) * 4 if header == AUTHENTICATION else (length + 1) * 8


def _with_transport(packet: Packet, data: bytes, at: int, number: int) -> Packet:
    """The packet with what its transport header says, which begins at byte ``at``. ``number``: of the protocol."""
    protocol = _TRANSPORTS.get(number)
    if protocol is None:
        return packet
    if len(data) < at + _PORTS.size:
        return replace(packet, readable=False, protocol=protocol)
    source_port, destination_port = _PORTS.unpack_from(data, at)
    with_ports = replace(packet, protocol=protocol, source_port=source_port, destination_port=destination_port)
    if protocol is not Protocol.TCP or len(data) <= at + _TCP_FLAGS_AT:
        return with_ports
    header = (data[at + _TCP_LENGTH_AT] >> 4) * 4
    return replace(with_ports, tcp_flags=data[at + _TCP_FLAGS_AT], has_data=len(data) > at + header)
