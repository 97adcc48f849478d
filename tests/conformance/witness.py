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
from collections.abc import Sequence
from types import TracebackType
from typing import Callable

from imds_guard.kernel import listeners
from imds_guard.policy.filter_address import Listener
from imds_guard.policy.filters import FILTER_PORT
from tests.conformance.families import ADDRESSES, LOOPBACK, PORTS

_WAIT_S = 5.0

DEAD, FOREIGN, OTHER_RULES = "dead", "foreign listener", "other rules"
BROKEN = frozenset((DEAD, FOREIGN, OTHER_RULES))
"""Names of filters whose listener is not there, has no mark, or has the mark of other rules."""


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


# --- filters --------------------------------------------------------------------------------------------------------


def listen_as_filters(wanted: Sequence[Listener], mark: Callable[[int, int], object] | None) -> list[socket.socket]:
    """Listening sockets where filters should listen, as their names say. Without ``mark`` none is marked."""
    sockets = []
    for one in wanted:
        if one.filter == DEAD:
            continue
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((str(one.address), FILTER_PORT))
        if mark is not None and one.filter != FOREIGN:
            mark(made.fileno(), one.digest ^ (one.filter == OTHER_RULES))
        made.listen()
        sockets.append(made)
    return sockets


def greet_forever(sockets: list[socket.socket]) -> None:
    """Accepts connections, and sends each the address at which it was accepted: 127.169.T.F."""

    def act(one: socket.socket) -> None:
        with one.accept()[0] as peer:
            peer.send(peer.getsockname()[0].encode())
            _take(peer)

    listeners.each_ready(sockets, act)
