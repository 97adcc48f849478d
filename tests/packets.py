# SPDX-License-Identifier: Apache-2.0
"""Builds IP packets, right ones and wrong ones, as bytes from the IP header on. Checksums are 0."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from imds_guard.policy.packet import AUTHENTICATION, FRAGMENT

TCP, UDP, ICMP, IPV6_ICMP, NO_NEXT_HEADER, SCTP = 6, 17, 1, 58, 59, 132
"""IANA's registry of protocol numbers."""
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
"""RFC 9293, section 3.1."""
DONT_FRAGMENT, MORE_FRAGMENTS = 0x4000, 0x2000
"""RFC 791, section 3.1; in the same 16 bits as the offset."""


def tcp(source_port: int, port: int, flags: int = ACK, data: bytes = b"") -> bytes:
    """A TCP segment without options."""
    return struct.pack("!HHIIBBHHH", source_port, port, 1, 1, 5 << 4, flags, 1024, 0, 0) + data


def udp(source_port: int, port: int, data: bytes = b"") -> bytes:
    """A UDP datagram."""
    return struct.pack("!HHHH", source_port, port, 8 + len(data), 0) + data


class Ipv4(NamedTuple):
    """The fields of an IPv4 header (RFC 791, section 3.1)."""

    source: bytes
    destination: bytes
    protocol: int
    fragment: int = 0
    """Flags, and the offset in units of 8 bytes."""
    options: bytes = b""
    version: int = 4
    words: int | None = None
    """The length of the header in units of 4 bytes; None: as it is."""

    def packet(self, payload: bytes) -> bytes:
        """The header and what follows it."""
        words = 5 + len(self.options) // 4 if self.words is None else self.words
        length = 20 + len(self.options) + len(payload)
        head = struct.pack(
            "!BBHHHBBH", self.version << 4 | words, 0, length & 0xFFFF, 7, self.fragment, 64, self.protocol, 0
        )
        return head + self.source + self.destination + self.options + payload


class Extension(NamedTuple):
    """An extension header of IPv6. ``body`` is what follows the next header and the length."""

    number: int
    length: int = 0
    """The length field, in units that the kind of header has."""
    body: bytes = bytes(6)


def extension(number: int, length: int = 0, first: bytes = b"") -> Extension:
    """An extension header as long as its length says. ``first``: how its body begins."""
    size = (length + 2) * 4 if number == AUTHENTICATION else (length + 1) * 8
    return Extension(number, length, first.ljust(size - 2, b"\0")[: size - 2])


def fragment_header(offset: int, *, more: bool, reserved: int = 0, bits: int = 0) -> Extension:
    """RFC 8200, section 4.5; the offset in units of 8 bytes.

    ``reserved`` is the second byte, which is no length; ``bits`` are those between the offset and the M flag.
    """
    return Extension(FRAGMENT, reserved, struct.pack("!HI", offset << 3 | bits | more, 7))


class Ipv6(NamedTuple):
    """The fields of an IPv6 header (RFC 8200, section 3), and the extension headers behind it."""

    source: bytes
    destination: bytes
    protocol: int
    """Of the last header."""
    extensions: Sequence[Extension] = ()
    version: int = 6

    def packet(self, payload: bytes) -> bytes:
        """The headers and what follows them."""
        numbers = [*(one.number for one in self.extensions), self.protocol]
        chain = b"".join(
            bytes((following, one.length)) + one.body for following, one in zip(numbers[1:], self.extensions)
        )
        head = struct.pack("!IHBB", self.version << 28, (len(chain) + len(payload)) & 0xFFFF, numbers[0], 64)
        return head + self.source + self.destination + chain + payload
