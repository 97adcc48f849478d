# SPDX-License-Identifier: Apache-2.0
"""Packets, and what counts of each: right ones, odd ones and wrong ones."""

from __future__ import annotations

import ipaddress

from imds_guard.policy.packet import (
    AUTHENTICATION,
    DESTINATION_OPTIONS,
    HOP_BY_HOP,
    MAX_EXTENSION_HEADERS,
    ROUTING,
)
from tests.packets import (
    DONT_FRAGMENT,
    ICMP,
    IPV6_ICMP,
    MORE_FRAGMENTS,
    NO_NEXT_HEADER,
    SCTP,
    SYN,
    TCP,
    UDP,
    Extension,
    Ipv4,
    Ipv6,
    extension,
    fragment_header,
    tcp,
    udp,
)

FROM4, TO4 = ipaddress.IPv4Address("10.1.2.3"), ipaddress.IPv4Address("169.254.169.254")
FROM6, TO6 = ipaddress.IPv6Address("fd00::1"), ipaddress.IPv6Address("fd00:ec2::254")
SEGMENT, DATAGRAM = tcp(40_000, 80, SYN), udp(40_000, 53)

LATER, UNREADABLE, OTHER = "later fragment", "unreadable", "other protocol"
WHOLE = "tcp 40000 > 80, flags 0x02"
FIRST = f"first fragment: {WHOLE}"
WHOLE_UDP = "udp 40000 > 53"


def ipv4(protocol: int = TCP, payload: bytes = SEGMENT, **fields: object) -> bytes:
    return Ipv4(FROM4.packed, TO4.packed, protocol, **fields).packet(payload)  # type: ignore[arg-type]


def ipv6(*extensions: Extension, protocol: int = TCP, payload: bytes = SEGMENT, version: int = 6) -> bytes:
    return Ipv6(FROM6.packed, TO6.packed, protocol, extensions, version).packet(payload)


IPV4 = {
    "a TCP segment": (ipv4(), WHOLE),
    "a UDP datagram": (ipv4(UDP, DATAGRAM), WHOLE_UDP),
    "ICMP": (ipv4(ICMP), OTHER),
    "SCTP has its ports in the same place": (ipv4(SCTP), OTHER),
    "an authentication header is a protocol of its own": (ipv4(AUTHENTICATION), OTHER),
    "another protocol, cut short": (ipv4(ICMP, b""), OTHER),
    "options": (ipv4(options=bytes(8)), WHOLE),
    "as many options as there can be": (ipv4(options=bytes(40)), WHOLE),
    "an odd length field": (ipv4()[:2] + b"\0\1" + ipv4()[4:], WHOLE),
    "don't fragment": (ipv4(fragment=DONT_FRAGMENT), WHOLE),
    "the reserved flag": (ipv4(fragment=0x8000), WHOLE),
    "a first fragment": (ipv4(fragment=MORE_FRAGMENTS), FIRST),
    "a middle fragment": (ipv4(fragment=MORE_FRAGMENTS | 0x100), LATER),
    "a last fragment": (ipv4(fragment=0x100), LATER),
    "the smallest offset": (ipv4(fragment=1), LATER),
    "the largest offset": (ipv4(fragment=0x1FFF), LATER),
    "the low byte of the offset alone": (ipv4(fragment=0x80), LATER),
    "the high bits of the offset alone": (ipv4(fragment=0x1000), LATER),
    "a first fragment without ports": (ipv4(fragment=MORE_FRAGMENTS, payload=b""), UNREADABLE),
    "a later fragment without ports": (ipv4(fragment=1, payload=b""), LATER),
    "ports alone": (ipv4(payload=SEGMENT[:4]), "tcp 40000 > 80, flags 0x00"),
    "ports cut short": (ipv4(payload=SEGMENT[:3]), UNREADABLE),
    "flags just there": (ipv4(payload=SEGMENT[:14]), WHOLE),
    "flags cut off": (ipv4(payload=SEGMENT[:13]), "tcp 40000 > 80, flags 0x00"),
    "UDP has no flags": (ipv4(UDP, SEGMENT), "udp 40000 > 80"),
    "options that are cut off": (ipv4(words=15), UNREADABLE),
    "a header shorter than a header": (ipv4(words=4), UNREADABLE),
    "no header at all": (ipv4(words=0), UNREADABLE),
    "another protocol and a short header": (ipv4(ICMP, words=4), UNREADABLE),
    "a later fragment and a short header": (ipv4(fragment=1, words=4), UNREADABLE),
    "version 6": (ipv4(version=6), UNREADABLE),
    "version 0": (ipv4(version=0), UNREADABLE),
    "an address cut short": (ipv4()[:19], "no IP packet"),
    "a header and nothing else": (ipv4()[:20], UNREADABLE),
}
"""Name -> the packet, and what counts of it (described() in tests/unit/test_packet.py)."""

HOP, DESTINATION = extension(HOP_BY_HOP), extension(DESTINATION_OPTIONS)
WHOLE_HEADER, FIRST_HEADER = fragment_header(0, more=False), fragment_header(0, more=True)
MOST = [DESTINATION] * MAX_EXTENSION_HEADERS
SEGMENT_ROUTING = TO6.packed.rjust(22, b"\4")

IPV6 = {
    "a TCP segment": (ipv6(), WHOLE),
    "a UDP datagram": (ipv6(protocol=UDP, payload=DATAGRAM), WHOLE_UDP),
    "ICMPv6": (ipv6(protocol=IPV6_ICMP), OTHER),
    "no next header": (ipv6(protocol=NO_NEXT_HEADER), OTHER),
    "an unknown header": (ipv6(protocol=253), OTHER),
    "mobility, which nothing follows": (ipv6(protocol=135), OTHER),
    "ESP, which nobody can read": (ipv6(protocol=50), OTHER),
    "hop-by-hop options": (ipv6(HOP), WHOLE),
    "long hop-by-hop options": (ipv6(extension(HOP_BY_HOP, 3)), WHOLE),
    "destination options": (ipv6(DESTINATION), WHOLE),
    "the longest destination options": (ipv6(extension(DESTINATION_OPTIONS, 255)), WHOLE),
    "routing header, type 0": (ipv6(extension(ROUTING, 2, b"\0\1")), WHOLE),
    "routing header, type 2": (ipv6(extension(ROUTING, 2, b"\2\1")), WHOLE),
    "routing header, type 3": (ipv6(extension(ROUTING, 2, b"\3\1")), WHOLE),
    "routing header, type 4, with an address in it": (ipv6(extension(ROUTING, 2, SEGMENT_ROUTING)), WHOLE),
    "an authentication header": (ipv6(extension(AUTHENTICATION, 4)), WHOLE),
    "the shortest authentication header": (ipv6(extension(AUTHENTICATION, 0)), WHOLE),
    "the longest authentication header": (ipv6(extension(AUTHENTICATION, 255)), WHOLE),
    "a whole datagram with a fragment header": (ipv6(WHOLE_HEADER), WHOLE),
    "the reserved byte is no length": (ipv6(fragment_header(0, more=False, reserved=255)), WHOLE),
    "the reserved bits are no offset": (ipv6(fragment_header(0, more=False, bits=6)), WHOLE),
    "a first fragment": (ipv6(FIRST_HEADER), FIRST),
    "a middle fragment": (ipv6(fragment_header(0x100, more=True)), LATER),
    "a last fragment": (ipv6(fragment_header(0x100, more=False)), LATER),
    "the smallest offset": (ipv6(fragment_header(1, more=False)), LATER),
    "the largest offset": (ipv6(fragment_header(0x1FFF, more=False)), LATER),
    "the low byte of the offset alone": (ipv6(fragment_header(0x1F, more=False)), LATER),
    "the high byte of the offset alone": (ipv6(fragment_header(0x20, more=False)), LATER),
    "a later fragment is not read further": (ipv6(fragment_header(1, more=False), payload=b""), LATER),
    "options in front of a first fragment": (ipv6(HOP, DESTINATION, FIRST_HEADER), FIRST),
    "options in a first fragment": (ipv6(FIRST_HEADER, DESTINATION), UNREADABLE),
    "options in a whole datagram": (ipv6(WHOLE_HEADER, DESTINATION), WHOLE),
    "a fragment in a first fragment": (ipv6(FIRST_HEADER, fragment_header(1, more=False)), UNREADABLE),
    "a whole datagram in a first fragment": (ipv6(FIRST_HEADER, WHOLE_HEADER), UNREADABLE),
    "a later fragment in a whole datagram": (ipv6(WHOLE_HEADER, fragment_header(1, more=False)), LATER),
    "every kind, in the order of the RFC": (
        ipv6(HOP, DESTINATION, extension(ROUTING), WHOLE_HEADER, extension(AUTHENTICATION, 4), DESTINATION),
        WHOLE,
    ),
    "every kind, in another order": (ipv6(DESTINATION, extension(AUTHENTICATION, 1), extension(ROUTING), HOP), WHOLE),
    "as many headers as are read": (ipv6(*MOST), WHOLE),
    "one more": (ipv6(*MOST, DESTINATION), UNREADABLE),
    "one more before another protocol": (ipv6(*MOST, DESTINATION, protocol=IPV6_ICMP), UNREADABLE),
    "a header cut short": (ipv6(DESTINATION)[:43], UNREADABLE),
    "a header that is not there": (ipv6(DESTINATION)[:40], UNREADABLE),
    "a header longer than the packet": (ipv6(Extension(DESTINATION_OPTIONS, 9)), UNREADABLE),
    "ports cut short": (ipv6(payload=SEGMENT[:3]), UNREADABLE),
    "ports alone": (ipv6(payload=SEGMENT[:4]), "tcp 40000 > 80, flags 0x00"),
    "a first fragment without ports": (ipv6(FIRST_HEADER, payload=b""), UNREADABLE),
    "version 4": (ipv6(version=4), UNREADABLE),
    "version 4 and another protocol": (ipv6(protocol=IPV6_ICMP, version=4), UNREADABLE),
    "an address cut short": (ipv6()[:39], "no IP packet"),
    "a header and nothing else": (ipv6()[:40], UNREADABLE),
}
