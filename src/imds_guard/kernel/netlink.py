# SPDX-License-Identifier: Apache-2.0
"""Netlink messages (netlink(7)): headers, attributes, and the errno in an answer.

Numbers and layouts: include/uapi/linux/netlink.h in Linux.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

REQUEST, ACK, DUMP, REPLACE, CREATE = 0x1, 0x4, 0x300, 0x100, 0x400
"""NLM_F_*."""
ERROR, DONE = 2, 3
"""NLMSG_*. A request with ACK is answered by ERROR, with errno 0 on success."""

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence number, port
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type


class Message(NamedTuple):
    """A message of an answer: its type, the sequence number of the request, and what follows the header."""

    type: int
    sequence: int
    body: memoryview


def request(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    """A message to the kernel. REQUEST is added to its flags."""
    return _HEADER.pack(_HEADER.size + len(body), kind, flags | REQUEST, sequence, 0) + body


def messages(received: memoryview) -> Iterator[Message]:
    """The messages in what was received in one piece."""
    while len(received) >= _HEADER.size:
        length, kind, _, sequence, _ = _HEADER.unpack_from(received)
        yield Message(kind, sequence, received[_HEADER.size : length])
        received = received[_aligned(length) :]


def check(body: memoryview, what: str) -> None:
    """Raises the OSError in the body of an ERROR or DONE message: both begin with a negative errno, or 0.

    ``what`` is the request, which the error names where others name a file.
    """
    number = -struct.unpack_from("=i", body)[0] if len(body) >= 4 else 0
    if number:
        raise OSError(number, os.strerror(number), what)


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value.ljust(_aligned(len(value)), b"\0")


def attributes(rest: memoryview) -> dict[int, memoryview]:
    """Type and value of each attribute."""
    found = {}
    while len(rest) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(rest)
        found[kind] = rest[_ATTRIBUTE.size : length]
        rest = rest[_aligned(length) :]
    return found


def _aligned(length: int) -> int:
    return length + 3 & ~3
