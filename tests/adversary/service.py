# SPDX-License-Identifier: Apache-2.0
"""A metadata service that answers every request with the secret, over TCP, UDP and UDP-Lite."""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections.abc import Sequence

from imds_guard.kernel.listeners import family, sockaddr

IPPROTO_UDPLITE = 136


def listen(addresses: Sequence[str], ports: Sequence[int]) -> list[socket.socket]:
    """Listening sockets in the network namespace of the caller, those for UDP-Lite only where the kernel has it."""
    sockets = []
    for address in addresses:
        for port in ports:
            sockets.append(_listening(address, port, socket.SOCK_STREAM))
            sockets.append(_listening(address, port, socket.SOCK_DGRAM))
            with contextlib.suppress(OSError):
                sockets.append(_listening(address, port, socket.SOCK_DGRAM, IPPROTO_UDPLITE))
    return sockets


def _listening(address: str, port: int, kind: int, protocol: int = 0) -> socket.socket:
    one = socket.socket(family(address), kind, protocol)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if one.family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(sockaddr(address, port))
        if kind == socket.SOCK_STREAM:
            one.listen(64)
    except OSError:
        one.close()
        raise
    return one


def answer_forever(sockets: Sequence[socket.socket], secret: bytes) -> None:
    """Answers until the process is killed."""
    selector = selectors.DefaultSelector()
    for one in sockets:
        one.setblocking(False)
        role = "datagram" if one.type == socket.SOCK_DGRAM else "listening"
        selector.register(one, selectors.EVENT_READ, (one, role))
    while True:
        for key, _ in selector.select():
            one, role = key.data
            # The service goes on when the peer is gone or a filter drops the answer.
            with contextlib.suppress(OSError):
                _serve(selector, one, role, secret)


def _serve(selector: selectors.BaseSelector, one: socket.socket, role: str, secret: bytes) -> None:
    if role == "datagram":
        _, sender = one.recvfrom(65536)
        one.sendto(secret + b"\n", sender)
    elif role == "listening":
        taken = one.accept()[0]
        taken.setblocking(False)
        selector.register(taken, selectors.EVENT_READ, (taken, "connection"))
    else:
        _answer(selector, one, secret)


def _answer(selector: selectors.BaseSelector, one: socket.socket, secret: bytes) -> None:
    """Answers one request: whatever one recv(2) returns."""
    try:
        if one.recv(65536):
            one.send(secret + b"\n")
            return
    except OSError:
        pass
    selector.unregister(one)
    one.close()
