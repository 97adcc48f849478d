# SPDX-License-Identifier: Apache-2.0
"""Lists the sockets of a network namespace, and ends one of them, by NETLINK_SOCK_DIAG (sock_diag(7)).

Numbers and layouts: include/uapi/linux/inet_diag.h and sock_diag.h, include/net/tcp_states.h in Linux.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Callable, NamedTuple

from imds_guard.kernel import netlink, netns
from imds_guard.kernel.namespaces import OWN_PATH, Namespace

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY, _SOCK_DESTROY = 20, 21
_INET_DIAG_INFO, _INET_DIAG_CGROUP_ID = 2, 21

ESTABLISHED, SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING = 1, 2, 4, 5, 8, 9, 10, 11
CONNECTED = (ESTABLISHED, SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING)
"""States in which a peer can be read from or written to.

A half-closed socket can still be read. SYN_RECV is missing: it is the state of an incoming connection. A connected UDP
socket is ESTABLISHED, any other UDP socket is CLOSE (udp_diag in Linux).
"""

_REQUEST = struct.Struct("=BBBxI48s")  # struct inet_diag_req_v2
_MESSAGE = struct.Struct("=BBxx48s12xII")  # struct inet_diag_msg
_IDENTITY = struct.Struct("!HH16s16s12x")  # struct inet_diag_sockid: ports and addresses in network order
_REMOTE = struct.Struct("!6xH16x16s")  # the remote half of inet_diag_sockid, at its offset in inet_diag_msg
_ANY_SOCKET = bytes(48)
_ANY_STATE = 0xFFFFFFFF
_NO_INTERFACE_OR_COOKIE = bytes(4) + b"\xff" * 8  # INET_DIAG_NOCOOKIE, twice

_RECEIVE_BYTES = 1 << 18
_TIMEOUT = struct.pack("=qq", 10, 0)  # struct timeval: the kernel answers within sendto(2), or never


class Socket(NamedTuple):
    """One socket. Addresses are packed: 4 bytes for AF_INET, 16 for AF_INET6, IPv4-mapped addresses included."""

    family: int
    protocol: int
    state: int
    local: bytes
    local_port: int
    remote: bytes
    remote_port: int
    uid: int
    """The user who made the socket, as an ID of the initial user namespace."""
    inode: int
    """0 when the socket has no file: its last holder has closed it, or nobody has accepted it yet."""
    cgroup_id: int | None
    """The cgroup2 directory in which the socket was made; None before v5.8 ("inet_diag: add cgroup id attribute")."""
    identity: bytes
    """struct inet_diag_sockid with the cookie, which no later socket has."""


Wanted = Callable[[bytes, int], bool]


def open_sock_diag(namespace: Namespace) -> SockDiag:
    """Raises OSError; FileNotFoundError when the process whose path leads to the namespace has ended."""
    if namespace.path == OWN_PATH:
        return SockDiag()  # our own namespace needs no privilege
    fd = os.open(namespace.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return SockDiag(fd)
    finally:
        os.close(fd)


class SockDiag:
    """A netlink socket for one network namespace: that of ``namespace_fd``, or the calling thread's."""

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
        """All that each_socket() gives."""
        return list(self.each_socket(family, protocol, states, wanted))

    def each_socket(
        self, family: int, protocol: int, states: tuple[int, ...], wanted: Wanted | None = None
    ) -> Iterator[Socket]:
        """The sockets of one address family and protocol (IPPROTO_TCP, IPPROTO_UDP) in these states. Take them all.

        ``wanted`` is called with the packed remote address and the remote port of each, and selects. The subflows of
        MPTCP are listed as TCP. Raises OSError: ENOENT where the kernel has no module for the protocol.
        """
        mask = sum(1 << state for state in states)
        body = _REQUEST.pack(family, protocol, 0, mask, _ANY_SOCKET)
        size = 4 if family == socket.AF_INET else 16
        for answer in self._ask(_SOCK_DIAG_BY_FAMILY, netlink.DUMP, body):
            if answer.type == _SOCK_DIAG_BY_FAMILY and (wanted is None or wanted(*_remote(answer.body, size))):
                yield _parse(protocol, answer.body)

    def find_tcp(self, local: tuple[str, int], remote: tuple[str, int]) -> Socket | None:
        """The TCP socket with this pair of IPv4 addresses and ports, also one of AF_INET6; None where there is none.

        Where there is none the kernel answers with a listener at ``local``: inet_diag_find_one_icsk() in Linux
        net/ipv4/inet_diag.c. Anybody may have one at a caller's port.
        """
        ports = struct.pack("!HH", local[1], remote[1])
        addresses = b"".join(socket.inet_aton(address).ljust(16, b"\0") for address, _ in (local, remote))
        body = _REQUEST.pack(
            socket.AF_INET, socket.IPPROTO_TCP, 0, _ANY_STATE, ports + addresses + _NO_INTERFACE_OR_COOKIE
        )
        try:
            answers = list(self._ask(_SOCK_DIAG_BY_FAMILY, netlink.ACK, body))
        except FileNotFoundError:
            return None
        found = (_parse(socket.IPPROTO_TCP, answer.body) for answer in answers)
        return next((one for one in found if one.state != LISTEN), None)

    def destroy(self, one: Socket) -> bool:
        """Ends a connection: its holders get ECONNABORTED, its peer a reset. False when it was gone already.

        It waits for whoever has locked the socket, in state D, and an unprivileged process can lock one of its own
        forever: tcp_abort() in net/ipv4/tcp.c, lock_sock(). So sock_destroy.py calls it. Needs CAP_NET_ADMIN. Raises
        OSError: EOPNOTSUPP where the kernel is built without CONFIG_INET_DIAG_DESTROY.
        """
        body = _REQUEST.pack(one.family, one.protocol, 0, 0, one.identity)
        try:
            for _ in self._ask(_SOCK_DESTROY, netlink.ACK, body):
                pass
        except FileNotFoundError:
            return False
        return True

    def tcp_info(self, one: Socket) -> bytes | None:
        """struct tcp_info (include/uapi/linux/tcp.h) of a TCP socket; None when it is gone. Raises OSError.

        Like destroy() it waits for whoever has locked the socket: tcp_get_info() in Linux.
        """
        body = _REQUEST.pack(one.family, one.protocol, 1 << _INET_DIAG_INFO - 1, 0, one.identity)
        try:
            answers = list(self._ask(_SOCK_DIAG_BY_FAMILY, netlink.ACK, body))
        except FileNotFoundError:
            return None
        found = [netlink.attributes(answer.body[_MESSAGE.size :]).get(_INET_DIAG_INFO) for answer in answers]
        return next((bytes(info) for info in found if info is not None), None)

    def _ask(self, kind: int, flags: int, body: bytes) -> Iterator[netlink.Message]:
        """The messages of an answer, up to its end. Raises OSError with the kernel's errno."""
        self._sequence += 1
        self._socket.send(netlink.request(kind, flags, self._sequence, body))
        while True:
            received = memoryview(self._socket.recv(_RECEIVE_BYTES))
            for answer in netlink.messages(received):
                if answer.sequence != self._sequence:
                    continue  # the rest of an answer that was given up
                if answer.type in (netlink.ERROR, netlink.DONE):
                    netlink.check(answer.body, f"sock_diag request {kind}")
                    return
                yield answer


def _open() -> socket.socket:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT)
    return opened


def _open_in(namespace_fd: int) -> socket.socket:
    """A socket stays in the namespace in which it was made, so a thread enters the namespace, opens it and ends."""
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


def _remote(message: memoryview, size: int) -> tuple[bytes, int]:
    port, address = _REMOTE.unpack_from(message)
    return address[:size], port


def _parse(protocol: int, message: memoryview) -> Socket:
    family, state, identity, uid, inode = _MESSAGE.unpack_from(message)
    local_port, remote_port, local, remote = _IDENTITY.unpack(identity)
    if family == socket.AF_INET:
        local, remote = local[:4], remote[:4]
    cgroup = netlink.attributes(message[_MESSAGE.size :]).get(_INET_DIAG_CGROUP_ID)
    cgroup_id = None if cgroup is None else struct.unpack("=Q", cgroup)[0]
    return Socket(
        family, protocol, state, local, local_port, remote, remote_port, uid, inode, cgroup_id, bytes(identity)
    )
