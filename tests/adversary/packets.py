# SPDX-License-Identifier: Apache-2.0
"""Builds and parses IP packets, to send without a connected socket."""

from __future__ import annotations

import secrets
import socket
import struct
import time
from dataclasses import dataclass
from typing import Callable

from tests.adversary.scene import WAIT_S
from tests.adversary.talk import REQUEST

SYN, PUSH, ACK = 0x02, 0x08, 0x10  # RFC 9293 section 3.1
_MORE_FRAGMENTS = 0x2000  # RFC 791 section 3.1
_TCP, _UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP


@dataclass(frozen=True)
class Flow:
    """The two endpoints of forged packets."""

    source: str
    source_port: int
    destination: str
    destination_port: int


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _ipv4(flow: Flow, protocol: int, payload: bytes, options: bytes = b"", fragment: int = 0) -> bytes:
    length = 20 + len(options)
    head = struct.pack("!BBHHHBBH", 4 << 4 | length // 4, 0, length + len(payload), 7, fragment, 64, protocol, 0)
    head += socket.inet_aton(flow.source) + socket.inet_aton(flow.destination) + options
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def _pseudo_header(flow: Flow, protocol: int, length: int) -> bytes:
    family = socket.AF_INET6 if ":" in flow.source else socket.AF_INET
    ends = socket.inet_pton(family, flow.source) + socket.inet_pton(family, flow.destination)
    return ends + struct.pack("!II" if family == socket.AF_INET6 else "!HH", *_order(family, protocol, length))


def _order(family: int, protocol: int, length: int) -> tuple[int, int]:
    """The order of these fields in a pseudo-header: RFC 9293 section 3.1 for IPv4, RFC 8200 section 8.1 for IPv6."""
    return (length, protocol) if family == socket.AF_INET6 else (protocol, length)


def datagram(flow: Flow, payload: bytes) -> bytes:
    """A UDP datagram without its IP header."""
    head = struct.pack("!HHHH", flow.source_port, flow.destination_port, 8 + len(payload), 0)
    total = checksum(_pseudo_header(flow, _UDP, len(head) + len(payload)) + head + payload) or 0xFFFF
    return head[:6] + struct.pack("!H", total) + payload


def udp_packet(flow: Flow, payload: bytes) -> bytes:
    """An IPv4 packet with a UDP datagram."""
    return _ipv4(flow, _UDP, datagram(flow, payload))


def udp_packet_with_options(flow: Flow, payload: bytes) -> bytes:
    """An IPv4 packet with a UDP datagram and eight bytes of "no operation" options (RFC 791 section 3.1)."""
    return _ipv4(flow, _UDP, datagram(flow, payload), options=b"\x01" * 8)


def with_options(packet: bytes, options: bytes) -> bytes:
    """An IPv4 packet without options, with these."""
    head, payload = packet[:20], packet[20:]
    length = 20 + len(options)
    head = struct.pack("!BBH", 4 << 4 | length // 4, 0, length + len(payload)) + head[4:10] + bytes(2) + head[12:]
    return head[:10] + struct.pack("!H", checksum(head + options)) + head[12:] + options + payload


def fragments(packet: bytes, first: int) -> tuple[bytes, bytes]:
    """An IPv4 packet without options in two fragments. The first has so many bytes of the payload: eight times N."""
    head, payload = packet[:20], packet[20:]
    made = []
    for place, part in ((_MORE_FRAGMENTS, payload[:first]), (first // 8, payload[first:])):
        one = (
            head[:2] + struct.pack("!H", 20 + len(part)) + head[4:6] + struct.pack("!H", place) + head[8:10] + bytes(2)
        )
        one += head[12:]
        made.append(one[:10] + struct.pack("!H", checksum(one)) + one[12:] + part)
    return made[0], made[1]


def udp_fragments(flow: Flow, payload: bytes) -> tuple[bytes, bytes]:
    """A UDP datagram in two IPv4 fragments: the first has only the UDP header, the second only the payload."""
    body = datagram(flow, payload)
    return _ipv4(flow, _UDP, body[:8], fragment=_MORE_FRAGMENTS), _ipv4(flow, _UDP, body[8:], fragment=1)


_DESTINATION_OPTIONS, _FRAGMENT = 60, 44  # RFC 8200 section 4


def udp_packet_ipv6(flow: Flow, payload: bytes, options: int = 0, *, fragment: bool = False) -> bytes:
    """An IPv6 packet with ``options`` headers of destination options and, if wanted, a fragment header."""
    kinds = [_DESTINATION_OPTIONS] * options + [_FRAGMENT] * fragment
    body = datagram(flow, payload)
    for following, kind in zip([*kinds[1:], _UDP][::-1], kinds[::-1]):
        rest = bytes(6) if kind == _FRAGMENT else b"\x01\x04" + bytes(4)  # a whole datagram; padding
        body = struct.pack("!BB", following, 0) + rest + body
    head = struct.pack("!IHBB", 6 << 28, len(body), kinds[0] if kinds else _UDP, 64)
    ends = [socket.inet_pton(socket.AF_INET6, end) for end in (flow.source, flow.destination)]
    return head + ends[0] + ends[1] + body


def tcp_packet(flow: Flow, sequence: int, acknowledged: int, flags: int, payload: bytes = b"") -> bytes:
    """An IPv4 packet with a TCP segment."""
    head = struct.pack(
        "!HHIIBBHHH", flow.source_port, flow.destination_port, sequence, acknowledged, 5 << 4, flags, 64240, 0, 0
    )
    total = checksum(_pseudo_header(flow, _TCP, len(head) + len(payload)) + head + payload)
    return _ipv4(flow, _TCP, head[:16] + struct.pack("!H", total) + head[18:] + payload)


@dataclass(frozen=True)
class Segment:
    """A TCP segment that was received."""

    sequence: int
    flags: int
    payload: bytes


def parse_segment(packet: bytes, flow: Flow) -> Segment | None:
    """The TCP segment of an IPv4 packet that answers the flow, or None for any other packet."""
    if len(packet) < 40 or packet[0] >> 4 != 4 or packet[9] != _TCP:
        return None
    header = (packet[0] & 15) * 4
    ends = (socket.inet_ntoa(packet[12:16]), socket.inet_ntoa(packet[16:20]))
    source, destination, sequence = struct.unpack_from("!HHI", packet, header)
    if (*ends, source, destination) != (flow.destination, flow.source, flow.destination_port, flow.source_port):
        return None
    total = struct.unpack_from("!H", packet, 2)[0]
    return Segment(sequence, packet[header + 13], packet[header + (packet[header + 12] >> 4) * 4 : total])


def parse_datagram(packet: bytes, flow: Flow) -> bytes | None:
    """The payload of the UDP datagram of an IPv4 packet that answers the flow, or None for any other packet."""
    if len(packet) < 28 or packet[0] >> 4 != 4 or packet[9] != _UDP:
        return None
    header = (packet[0] & 15) * 4
    ports = struct.unpack_from("!HH", packet, header)
    if socket.inet_ntoa(packet[16:20]) != flow.source or ports != (flow.destination_port, flow.source_port):
        return None
    return packet[header + 8 :]


Send = Callable[[bytes], object]
Receive = Callable[[], bytes]
"""Returns the next packet. Raises OSError when none arrives."""


def shake_hands_and_ask(flow: Flow, send: Send, receive: Receive) -> bytes:
    """Makes a TCP connection packet by packet and sends a request. Returns the answer of the service."""
    sequence = secrets.randbits(31)
    send(tcp_packet(flow, sequence, 0, SYN))
    opened = _wait_for(flow, receive, lambda segment: segment.flags & (SYN | ACK) == SYN | ACK)
    send(tcp_packet(flow, sequence + 1, opened.sequence + 1, ACK | PUSH, REQUEST))
    return _wait_for(flow, receive, lambda segment: bool(segment.payload)).payload.strip()


def _wait_for(flow: Flow, receive: Receive, wanted: Callable[[Segment], bool]) -> Segment:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        segment = parse_segment(receive(), flow)
        if segment is not None and wanted(segment):
            return segment
    raise TimeoutError("no answer to what was sent by hand")


def ask_by_datagram(flow: Flow, send: Send, receive: Receive) -> bytes:
    """Sends a datagram. Returns the answer of the service."""
    send(udp_packet(flow, b"?"))
    return _wait_for_datagram(flow, receive)


def ask_with_options(flow: Flow, send: Send, receive: Receive) -> bytes:
    """Sends a datagram with IP options. Returns the answer of the service."""
    send(udp_packet_with_options(flow, b"?"))
    return _wait_for_datagram(flow, receive)


def ask_in_fragments(flow: Flow, send: Send, receive: Receive) -> bytes:
    """Sends a datagram in two fragments, the second without ports. Returns the answer of the service."""
    for packet in udp_fragments(flow, b"? and more"):
        send(packet)
    return _wait_for_datagram(flow, receive)


def _wait_for_datagram(flow: Flow, receive: Receive) -> bytes:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        payload = parse_datagram(receive(), flow)
        if payload is not None:
            return payload.strip()
    raise TimeoutError("no answer to what was sent by hand")
