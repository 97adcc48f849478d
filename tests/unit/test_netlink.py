# SPDX-License-Identifier: Apache-2.0
"""Netlink messages: headers, attributes and errors."""

from __future__ import annotations

import errno
import struct

import pytest

from imds_guard.kernel import netlink
from imds_guard.kernel.netlink import Message, attribute, attributes, check, messages, request


def test_a_request_is_a_header_and_its_body() -> None:
    """struct nlmsghdr: length, type, flags, sequence number, port."""
    assert request(20, netlink.DUMP, 7, b"body") == struct.pack("=IHHII", 20, 20, 0x301, 7, 0) + b"body"


def test_messages_are_split_at_multiples_of_four() -> None:
    received = request(1, 0, 5, b"abcde") + bytes(3) + request(2, 0, 6, b"")
    assert list(messages(memoryview(received))) == [Message(1, 5, memoryview(b"abcde")), Message(2, 6, memoryview(b""))]


@pytest.mark.parametrize("received", [b"", bytes(15)])
def test_less_than_a_header_is_no_message(received: bytes) -> None:
    assert list(messages(memoryview(received))) == []


def test_attributes_are_padded_to_four_bytes() -> None:
    packed = attribute(3, b"abcde") + attribute(4, b"")
    assert len(packed) == 16
    assert attributes(memoryview(packed)) == {3: b"abcde", 4: b""}


@pytest.mark.parametrize("body", [b"", struct.pack("=i", 0)])
def test_an_errno_of_zero_is_success(body: bytes) -> None:
    """The end of a dump may have no body."""
    check(memoryview(body), "a request")


def test_the_errno_of_an_error_is_raised() -> None:
    with pytest.raises(PermissionError, match="Operation not permitted: 'a request'"):
        check(memoryview(struct.pack("=i", -errno.EPERM)), "a request")
