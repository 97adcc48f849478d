# SPDX-License-Identifier: Apache-2.0
"""Netlink messages and attributes: several in one piece, with lengths that are no multiple of four."""

from __future__ import annotations

import errno
import struct

import pytest

from imds_guard.kernel import netlink
from imds_guard.kernel.netlink import Message


def message(kind: int, sequence: int, body: bytes, padding: bytes = b"") -> bytes:
    """struct nlmsghdr and a body. The length in the header is without the padding."""
    return struct.pack("=IHHII", 16 + len(body), kind, 0, sequence, 0) + body + padding


def test_messages_end_where_their_header_says() -> None:
    """The body has no padding and nothing of the next message, which begins at a multiple of four."""
    received = message(20, 7, b"first", b"\xaa" * 3) + message(21, 8, b"") + message(netlink.DONE, 9, b"last")
    assert [(one.type, one.sequence, bytes(one.body)) for one in netlink.messages(memoryview(received))] == [
        (20, 7, b"first"),
        (21, 8, b""),
        (netlink.DONE, 9, b"last"),
    ]


def test_a_request_is_a_message() -> None:
    (one,) = netlink.messages(memoryview(netlink.request(20, netlink.DUMP, 5, b"body")))
    assert one == Message(20, 5, memoryview(b"body"))
    assert struct.unpack_from("=IHH", netlink.request(20, netlink.DUMP, 5, b"body")) == (20, 20, 0x301)


def test_attributes_are_padded_and_read_without_padding() -> None:
    text = netlink.attribute(1, b"lo\0") + netlink.attribute(2, b"") + netlink.attribute(3, b"12345")
    assert len(text) == 8 + 4 + 12
    found = {kind: bytes(value) for kind, value in netlink.attributes(memoryview(text)).items()}
    assert found == {1: b"lo\0", 2: b"", 3: b"12345"}


def test_a_negative_errno_is_an_error_with_the_request() -> None:
    netlink.check(memoryview(struct.pack("=i", 0)), "RTM_NEWADDR")
    netlink.check(memoryview(b""), "RTM_NEWADDR")
    with pytest.raises(PermissionError) as caught:
        netlink.check(memoryview(struct.pack("=i", -errno.EPERM)), "RTM_NEWADDR")
    assert (caught.value.errno, caught.value.filename) == (errno.EPERM, "RTM_NEWADDR")
