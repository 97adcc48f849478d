# SPDX-License-Identifier: Apache-2.0
"""The sockets of a network namespace, and the end of one of them, by NETLINK_SOCK_DIAG (sock_diag(7)).

Numbers and layouts: include/uapi/linux/inet_diag.h, sock_diag.h and netlink.h, include/net/tcp_states.h in Linux.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Callable, NamedTuple

from imds_guard.kernel import netns

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY, _SOCK_DESTROY = 20, 21
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_DUMP = 0x1, 0x4, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_INET_DIAG_CGROUP_ID = 21

ESTABLISHED, SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING = 1, 2, 4, 5, 8, 9, 10, 11
CONNECTED = (ESTABLISHED, SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING)
"""A peer can be read from or written to. A half-closed socket still reads; SYN_RECV is how one comes in, not goes out.

A connected UDP socket is ESTABLISHED, any other one CLOSE (udp_diag in Linux).
"""

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_REQUEST = struct.Struct("=BBBxI48s")  # struct inet_diag_req_v2
_MESSAGE = struct.Struct("=BBxx48s12xII")  # struct inet_diag_msg
_IDENTITY = struct.Struct("!HH16s16s12x")  # struct inet_diag_sockid: ports and addresses as on the wire
_REMOTE = struct.Struct("!6xH16x16s")  # the remote half of it, from the beginning of the message
_ATTRIBUTE = struct.Struct("=HH")
_ANY_SOCKET = bytes(48)

_AT_ONCE = 1 << 18
_PATIENCE = struct.pack("=qq", 10, 0)  # struct timeval: the kernel answers within the call, or it never will


class Socket(NamedTuple):
    """One socket. Addresses are packed: 4 octets for AF_INET, 16 for AF_INET6, whose IPv4-mapped ones stay so."""

    family: int
    protocol: int
    state: int
    local: bytes
    local_port: int
    remote: bytes
    remote_port: int
    uid: int
    """Of who made it, in the initial user namespace."""
    inode: int
    """0 when no file leads to it: its last holder has closed it, or nobody has accepted it yet."""
    cgroup_id: int | None
    """Of the cgroup2 directory that it was made in; None before Linux v5.8 ("inet_diag: add cgroup id attribute")."""
    identity: bytes
    """struct inet_diag_sockid, with the cookie: no later socket has the same."""


Wanted = Callable[[bytes, int], bool]


class SockDiag:
    """A netlink socket that asks about one network namespace: that of ``namespace_fd``, or the calling thread's."""

    def __init__(self, namespace_fd: int | None = None) -> None:
        self._socket = _open() if namespace_fd is None else _open_in(namespace_fd)
        self._sequence = 0

    def __enter__(self) -> SockDiag:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def sockets(
        self, family: int, protocol: int, states: tuple[int, ...], wanted: Wanted | None = None
    ) -> list[Socket]:
        """The sockets of one address family and protocol (IPPROTO_TCP, IPPROTO_UDP) in these states.

        ``wanted`` is asked about each one's packed remote address and its port. MPTCP's subflows are among those of
        TCP. Raises OSError: ENOENT where the kernel has no module for it.
        """
        mask = sum(1 << state for state in states)
        body = _REQUEST.pack(family, protocol, 0, mask, _ANY_SOCKET)
        size = 4 if family == socket.AF_INET else 16
        return [
            _parse(protocol, message)
            for kind, message in self._ask(_SOCK_DIAG_BY_FAMILY, _NLM_F_DUMP, body)
            if kind == _SOCK_DIAG_BY_FAMILY and (wanted is None or wanted(*_remote(message, size)))
        ]

    def destroy(self, one: Socket) -> bool:
        """Ends a connection: its holders get ECONNABORTED, the peer a reset. False when it was gone already.

        Takes CAP_NET_ADMIN. Raises OSError: EOPNOTSUPP where the kernel is built without CONFIG_INET_DIAG_DESTROY.
        """
        body = _REQUEST.pack(one.family, one.protocol, 0, 0, one.identity)
        try:
            for _ in self._ask(_SOCK_DESTROY, _NLM_F_ACK, body):
                pass
        except FileNotFoundError:
            return False
        return True

    def _ask(self, kind: int, flags: int, body: bytes) -> Iterator[tuple[int, memoryview]]:
        """The messages of an answer, up to its end. Raises OSError with the kernel's errno."""
        self._sequence += 1
        header = _HEADER.pack(_HEADER.size + len(body), kind, flags | _NLM_F_REQUEST, self._sequence, 0)
        self._socket.send(header + body)
        while True:
            received = memoryview(self._socket.recv(_AT_ONCE))
            for answer, message in _messages(received, self._sequence):
                if answer in (_NLMSG_ERROR, _NLMSG_DONE):
                    _check(message)
                    return
                yield answer, message


def _open() -> socket.socket:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _PATIENCE)
    return opened


def _open_in(namespace_fd: int) -> socket.socket:
    """A socket belongs to the namespace it was made in for good, so a thread goes there, and ends (setns(2))."""
    opened: list[socket.socket] = []
    failed: list[OSError] = []

    def work() -> None:
        try:
            netns.enter(namespace_fd)
            opened.append(_open())
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return opened[0]


def _messages(received: memoryview, sequence: int) -> Iterator[tuple[int, memoryview]]:
    """Type and body of each netlink message (netlink(7)) that answers request ``sequence``."""
    while len(received) >= _HEADER.size:
        length, kind, _, answered, _ = _HEADER.unpack_from(received)
        if answered == sequence:
            yield kind, received[_HEADER.size : length]
        received = received[_aligned(length) :]


def _aligned(length: int) -> int:
    return length + 3 & ~3


def _check(message: memoryview) -> None:
    """An error message begins with an errno, and so does the end of a dump."""
    number = -struct.unpack_from("=i", message)[0] if len(message) >= 4 else 0
    if number:
        raise OSError(number, os.strerror(number))


def _remote(message: memoryview, size: int) -> tuple[bytes, int]:
    port, address = _REMOTE.unpack_from(message)
    return address[:size], port


def _parse(protocol: int, message: memoryview) -> Socket:
    family, state, identity, uid, inode = _MESSAGE.unpack_from(message)
    local_port, remote_port, local, remote = _IDENTITY.unpack(identity)
    if family == socket.AF_INET:
        local, remote = local[:4], remote[:4]
    cgroup = _attributes(message[_MESSAGE.size :]).get(_INET_DIAG_CGROUP_ID)
    cgroup_id = None if cgroup is None else struct.unpack("=Q", cgroup)[0]
    return Socket(
        family, protocol, state, local, local_port, remote, remote_port, uid, inode, cgroup_id, bytes(identity)
    )


def _attributes(rest: memoryview) -> dict[int, memoryview]:
    found = {}
    while len(rest) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(rest)
        found[kind] = rest[_ATTRIBUTE.size : length]
        rest = rest[_aligned(length) :]
    return found
