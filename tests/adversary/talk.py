# SPDX-License-Identifier: Apache-2.0
"""How the attacker connects to the service and asks for its secret."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from typing import Any

from imds_guard.kernel.listeners import family, sockaddr
from imds_guard.kernel.netns import LOOPBACK_INDEX
from tests.adversary.scene import IPV4, PORT, WAIT_S

REQUEST = b"GET /latest/meta-data/iam/security-credentials/ HTTP/1.0\r\n\r\n"


def make_socket(address: str = IPV4, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
    """A blocking socket of the address's family with a timeout."""
    one = socket.socket(family(address), kind, protocol)
    set_timeouts(one)
    return one


def set_timeouts(one: socket.socket) -> None:
    """Sets a timeout of WAIT_S for each call of a blocking socket (SO_RCVTIMEO in socket(7))."""
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        one.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(WAIT_S), 0))


def ask(one: socket.socket) -> bytes:
    """The answer to one request on a connected socket."""
    one.sendall(REQUEST)
    return answer(one)


def answer(one: socket.socket) -> bytes:
    """The line that the service sends."""
    line = one.recv(256)
    if not line:
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    return line.strip()


def fetch(address: str = IPV4, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> bytes:
    """Connects and sends one request. Returns the answer."""
    with make_socket(address, kind, protocol) as one:
        one.connect(sockaddr(address, PORT))
        return ask(one)


def fetch_named(host: str) -> bytes:
    """The answer to a program that gets the address as text: it calls getaddrinfo(3), then connects."""
    error: OSError | None = None
    for number, kind, protocol, _, target in socket.getaddrinfo(host, PORT, type=socket.SOCK_STREAM):
        with socket.socket(number, kind, protocol) as one:
            set_timeouts(one)
            try:
                one.connect(target)
                return ask(one)
            except OSError as reason:
                error = reason
    raise error or OSError(errno.ENOENT, f"{host} is not an address")


def there(address: str = IPV4) -> tuple[Any, ...]:
    """The address of the service for the socket module."""
    return sockaddr(address, PORT)


def packed(address: str = IPV4, port: int = PORT) -> bytes:
    """The address of the service as a struct sockaddr_in or sockaddr_in6 (ip(7), ipv6(7))."""
    parsed = ipaddress.ip_address(address)
    if parsed.version == 4:
        return struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + parsed.packed + bytes(8)
    scope = LOOPBACK_INDEX if parsed.is_link_local else 0
    return struct.pack("=H", socket.AF_INET6) + struct.pack("!HI", port, 0) + parsed.packed + struct.pack("=I", scope)


def connected() -> socket.socket:
    """A TCP connection to the service."""
    one = make_socket()
    one.connect(there())
    return one
