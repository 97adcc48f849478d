# SPDX-License-Identifier: Apache-2.0
"""A metadata service: whoever asks gets the secret, over TCP as often as it asks, over UDP one datagram for one."""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections.abc import Sequence

from imds_guard.kernel.listeners import family, sockaddr

IPPROTO_UDPLITE = 136


def listen(addresses: Sequence[str], ports: Sequence[int]) -> list[socket.socket]:
    """Sockets that listen, in the namespace of the caller; that of UDP-Lite only where there is such a thing."""
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
    """Serves until the process is killed."""
    selector = selectors.DefaultSelector()
    for one in sockets:
        one.setblocking(False)
        role = "datagram" if one.type == socket.SOCK_DGRAM else "listening"
        selector.register(one, selectors.EVENT_READ, (one, role))
    while True:
        for key, _ in selector.select():
            one, role = key.data
            # The peer is gone, or a filter keeps the answer back: that must not end the service.
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
    """One request is whatever came at once."""
    try:
        if one.recv(65536):
            one.send(secret + b"\n")
            return
    except OSError:
        pass
    selector.unregister(one)
    one.close()
