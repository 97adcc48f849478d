# SPDX-License-Identifier: Apache-2.0
"""Processes with open connections in a sandbox, for tests of the search for such connections."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import select
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Callable

import pytest

from imds_guard.connections.find import Scope
from imds_guard.connections.values import Connection
from imds_guard.kernel.credentials import become
from imds_guard.kernel.listeners import family, listen, sockaddr
from imds_guard.kernel.namespaces import INITIAL_PID_NAMESPACE, namespace_inode
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.kernel.sock_diag import CONNECTED, SockDiag
from imds_guard.policy.model import Endpoint, Identities, Lock, Mode, Policy, Verdict, make_policy
from tests.command import SERVICE, SERVICE_V6, STRANGER
from tests.kernel.rules_in_a_sandbox import NO_GROUP

NEEDS_THE_HOST = [
    pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces and cgroups needs root"),
    pytest.mark.skipif(namespace_inode("pid") != INITIAL_PID_NAMESPACE, reason="in a container all callers are denied"),
]
"""Marks of tests that make sandboxes and judge the host's processes in them."""

WITHIN_S = 20.0
UNLOCKED = "192.0.2.9"
PORT = 80
WEB = ((PORT, PORT),)


def locked(
    *users: int, groups: Sequence[int] = (), mode: Mode = Mode.ENFORCE, containers: Verdict = Verdict.DENY
) -> Policy:
    """Locks port 80 of the service, TCP and UDP. Only these users and groups are allowed."""
    endpoints = tuple(Endpoint(ipaddress.ip_network(one), WEB, WEB) for one in (SERVICE, SERVICE_V6))
    lock = Lock("web", endpoints, Identities(frozenset(users), frozenset(groups)))
    return make_policy([lock], mode, containers)


Open = Callable[[], list[socket.socket]]


def opening(to: str = SERVICE, kind: int = socket.SOCK_STREAM, protocol: int = 0, port: int = PORT) -> Open:
    """Makes one connected socket."""

    def made() -> list[socket.socket]:
        one = socket.socket(family(to), kind, protocol)
        one.settimeout(WITHIN_S)
        one.connect(sockaddr(to, port))
        return [one]

    return made


class Client:
    """A process with connections. It is controlled through a pair of sockets."""

    def __init__(self, pid: int, line: socket.socket) -> None:
        self.pid = pid
        self._line = line

    def write(self) -> list[str]:
        """Writes to each of its sockets. Returns ``sent`` or the errno for each."""
        self._line.send(b"w")
        return self._line.recv(4096).decode().split()


def _serve(line: socket.socket, sockets: list[socket.socket]) -> None:
    line.send(b".")
    while line.recv(1):
        line.send(" ".join(map(written, sockets)).encode() or b"-")


def written(one: socket.socket) -> str:
    """The pending error of a socket; else the result of a write."""
    pending = one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if pending:
        return errno.errorcode[pending]
    try:
        one.send(b"x")
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "sent"


class Stage:
    """A sandbox with a service, and clients in it."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.scope = Scope(sandbox.cgroup)
        self._lines: list[socket.socket] = []

    def client(
        self,
        made: Open,
        *,
        uid: int = STRANGER,
        gid: int = NO_GROUP,
        groups: Sequence[int] = (),
        before: Callable[[], object] = lambda: None,
    ) -> Client:
        """A process with these IDs. Its sockets are connected when this returns."""
        ours, theirs = socket.socketpair()
        ours.settimeout(WITHIN_S)
        self._lines.append(ours)

        def work() -> None:
            ours.close()
            before()
            become((uid,) * 3, (gid,) * 3, groups)
            _serve(theirs, made())

        pid = self.sandbox.spawn(work)
        theirs.close()
        assert ours.recv(1) == b"."
        return Client(pid, ours)

    def open_to(self, address: str = SERVICE, port: int = PORT) -> int:
        """How many TCP sockets in the namespace are connected to this address and port."""
        wanted = (ipaddress.ip_address(address).packed, port)
        with SockDiag(self.sandbox.netns_fd) as diag:
            found = diag.sockets(family(address), socket.IPPROTO_TCP, CONNECTED)
        return sum((one.remote, one.remote_port) == wanted for one in found)

    def close(self) -> None:
        """Lets the clients end."""
        for line in self._lines:
            line.close()


def keep_forever(listening: list[socket.socket]) -> None:
    """Accepts every connection and closes none."""
    kept = []
    streams = {one.fileno(): one for one in listening if one.type == socket.SOCK_STREAM}
    poll = select.poll()
    for fd in streams:
        poll.register(fd, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            kept.append(streams[fd].accept()[0])


@contextlib.contextmanager
def stage(addresses: Sequence[str] = (SERVICE, SERVICE_V6, UNLOCKED)) -> Iterator[Stage]:
    with Sandbox(addresses) as sandbox:
        sandbox.serve_with(lambda: listen(addresses, (PORT,)), keep_forever)
        one = Stage(sandbox)
        try:
            yield one
        finally:
            one.close()


def pids(several: Sequence[Connection]) -> list[int]:
    return sorted(holder.pid for one in several for holder in one.holders)


def wait_until(true: Callable[[], bool], within_s: float = WITHIN_S) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "the condition did not become true"
        select.select([], [], [], 0.005)
