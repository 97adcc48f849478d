# SPDX-License-Identifier: Apache-2.0
"""Listeners that tell what reached them without sending a packet back.

An answer over UDP would go to the caller's address, which on one machine is often the locked one, and be judged itself.
Abstract UNIX sockets belong to the network namespace (unix(7)), so every namespace of the table has its own names.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
from types import TracebackType

from imds_guard.kernel import listeners
from tests.conformance.families import ADDRESSES, LOOPBACK, PORTS

_WAIT_S = 5.0


class Token:
    """A payload that no other datagram has; ``wait()`` returns when a listener got it."""

    def __init__(self) -> None:
        self.payload = secrets.token_hex(8).encode()
        self._news = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._news.settimeout(_WAIT_S)
        self._news.bind(b"\0" + self.payload)

    def __enter__(self) -> Token:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._news.close()

    def wait(self) -> None:
        """Raises OSError (ETIMEDOUT) when the datagram does not come."""
        try:
            self._news.recv(1)
        except socket.timeout as error:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from error


def listen() -> list[socket.socket]:
    """Sockets for every address and port of the table, in the namespace of the caller."""
    return listeners.listen((*ADDRESSES, *LOOPBACK), PORTS)


def testify_forever(sockets: list[socket.socket]) -> None:
    """Takes connections, and sends a datagram's payload's owner the news that it came."""
    news = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def act(one: socket.socket) -> None:
        if one.type == socket.SOCK_STREAM:
            _take(one.accept()[0])
        else:
            news.sendto(b".", b"\0" + one.recv(64))

    listeners.each_ready(sockets, act)


def _take(peer: socket.socket) -> None:
    """Reads what came with the SYN, then closes. Closed unread, it is answered with a reset (RFC 2525, 2.17).

    On one processor that reset may reach the caller before its connect has returned.
    """
    with peer, contextlib.suppress(BlockingIOError):
        peer.setblocking(False)
        peer.recv(64)
