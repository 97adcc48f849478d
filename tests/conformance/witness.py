# SPDX-License-Identifier: Apache-2.0
"""Listeners that confirm over a UNIX socket which datagrams reached them.

An answer over UDP would itself be judged: it goes to the caller's address, which on one machine is often locked.
Abstract UNIX sockets belong to the network namespace (unix(7)), so names don't clash between namespaces.
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
    """A unique payload. ``wait()`` returns when a listener has received it."""

    def __init__(self) -> None:
        self.payload = secrets.token_hex(8).encode()
        self._inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._inbox.settimeout(_WAIT_S)
        self._inbox.bind(b"\0" + self.payload)

    def __enter__(self) -> Token:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inbox.close()

    def wait(self) -> None:
        """Raises OSError (ETIMEDOUT) when the datagram does not arrive."""
        try:
            self._inbox.recv(1)
        except socket.timeout as error:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from error


def listen() -> list[socket.socket]:
    """Listening sockets for every address and port of the table, in the network namespace of the caller."""
    return listeners.listen((*ADDRESSES, *LOOPBACK), PORTS)


def confirm_forever(sockets: list[socket.socket]) -> None:
    """Accepts connections, and confirms each token to its sender."""
    confirmations = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def act(one: socket.socket) -> None:
        if one.type == socket.SOCK_STREAM:
            _take(one.accept()[0])
        else:
            confirmations.sendto(b".", b"\0" + one.recv(64))

    listeners.each_ready(sockets, act)


def _take(peer: socket.socket) -> None:
    """Reads the data that came with the SYN, then closes.

    Closing with unread data sends a reset (RFC 2525, 2.17). On a machine with one processor that reset may reach the
    caller before its connect has returned.
    """
    with peer, contextlib.suppress(BlockingIOError):
        peer.setblocking(False)
        peer.recv(64)
