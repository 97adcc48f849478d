# SPDX-License-Identifier: Apache-2.0
"""Listening sockets for a sandbox: TCP ones accept every connection, UDP ones send back every datagram."""

from __future__ import annotations

import contextlib
import ipaddress
import selectors
import socket
from collections.abc import Iterable, Sequence
from typing import Any, Callable

from imds_guard.kernel.netns import LOOPBACK_INDEX

SocketAddress = tuple[Any, ...]


def sockaddr(address: str, port: int) -> SocketAddress:
    """The address as the socket module takes it. A link-local address is one of lo."""
    parsed = ipaddress.ip_address(address)
    if parsed.version == 4:
        return (address, port)
    return (address, port, 0, LOOPBACK_INDEX if parsed.is_link_local else 0)


def family(address: str) -> socket.AddressFamily:
    """AF_INET or AF_INET6, which an IPv4-mapped address is."""
    return socket.AF_INET if ipaddress.ip_address(address).version == 4 else socket.AF_INET6


def listen(addresses: Iterable[str], ports: Sequence[int]) -> list[socket.socket]:
    """A listening TCP socket and a UDP socket for each address and port."""
    sockets = []
    for address in addresses:
        for port in ports:
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                one = socket.socket(family(address), kind)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if one.family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind(sockaddr(address, port))
                if kind == socket.SOCK_STREAM:
                    one.listen(64)
                sockets.append(one)
    return sockets


def answer_forever(sockets: Iterable[socket.socket]) -> None:
    """Accepts and closes TCP connections and echoes datagrams, until the process is killed."""
    each_ready(sockets, _answer)


def each_ready(sockets: Iterable[socket.socket], act: Callable[[socket.socket], object]) -> None:
    """Calls ``act`` with each socket that is readable, until the process is killed."""
    selector = selectors.DefaultSelector()
    for one in sockets:
        one.setblocking(False)
        selector.register(one, selectors.EVENT_READ, one)
    while True:
        for key, _ in selector.select():
            # A peer that is gone or a filter that rejects the answer must not end the listener.
            with contextlib.suppress(OSError):
                act(key.data)


def _answer(one: socket.socket) -> None:
    if one.type == socket.SOCK_STREAM:
        one.accept()[0].close()
    else:
        message, sender = one.recvfrom(65536)
        one.sendto(message, sender)
