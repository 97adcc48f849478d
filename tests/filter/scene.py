# SPDX-License-Identifier: Apache-2.0
"""A namespace with a metadata service, filters in force by either backend, and callers of each kind."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import time
from collections.abc import Sequence
from typing import Callable, TypeVar

from imds_guard.commands import filter_places, filter_service
from imds_guard.kernel.credentials import become
from imds_guard.kernel.listeners import family
from imds_guard.kernel.name_service import User
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.filters import Filter, FilterRules
from imds_guard.policy.model import Identities, Lock, Policy, make_policy
from tests.kernel import guards
from tests.kernel.rules_in_a_sandbox import Machine

T = TypeVar("T")

METADATA = "169.254.169.254"
ACCOUNT = User("imds-guard-filter", 41_990, 51_990)
ALLOWED, BY_USER, BY_GROUP, STRANGER = 61_001, 61_002, 61_003, 61_004
GROUP, OTHER_GROUP = 62_007, 62_001
REGION = "/latest/meta-data/placement/region"
SECRET = "/latest/meta-data/iam/security-credentials/role"
RESET = "reset"
"""The connection was there, and ended without an answer."""
TIMED_OUT = "timed out"


def policy_of(*allow: str, users: Sequence[int] = (BY_USER,), deny: tuple[str, ...] = ()) -> Policy:
    """One lock that lets ALLOWED through, and one filter for these users and for GROUP."""
    lock = Lock("default", guards.OLD_POLICY.locks[0].endpoints[:1], Identities(frozenset((ALLOWED,))))
    who = Identities(frozenset(users), frozenset((GROUP,)))
    return make_policy(
        [lock], filters=[Filter("region", ("default",), who, rules=FilterRules(allow, deny))], filter_uid=ACCOUNT.uid
    )


POLICY = policy_of("GET /*/meta-data/placement/**")


def wait_until(is_true: Callable[[], bool], within_s: float = 15.0) -> None:
    """Asks again every 50 ms, and fails after ``within_s``."""
    deadline = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.05)


def serve_metadata(address: str = METADATA, backlog: int = 16) -> None:
    """A metadata service: the body of each response is the path."""
    server = socket.socket(family(address))
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((address, 80))
    server.listen(backlog)
    while True:
        one, _ = server.accept()
        with one:
            head = one.recv(65536)
            if not head:
                continue
            body = head.split(b" ")[1]
            one.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


class Scene:
    """A guarded namespace. ``cgroup``: what the commands guard; None: the machine, by iptables."""

    def __init__(self, sandbox: Sandbox, cgroup: str | None, denied: str, change: Callable[[Policy], object]) -> None:
        self.sandbox = sandbox
        self.cgroup = cgroup
        self.denied = denied
        """The errno of a connect that is denied."""
        self.change = change
        """Puts another policy in force. Nobody tells the service."""
        self.service = self.metadata = 0

    def call(self, fn: Callable[[], T]) -> T:
        """The result of ``fn`` inside."""
        return self.sandbox.call(fn, timeout_s=120)

    def start(self) -> None:
        """Starts the service, and returns when it serves."""
        self.service = self.sandbox.spawn(lambda: filter_service.serve(self.cgroup, _require_none))
        wait_until(lambda: self.faults() == [])

    def kill(self, pid: int) -> None:
        """Ends a process of the scene by SIGKILL."""
        os.kill(pid, signal.SIGKILL)
        self.sandbox.end(pid)

    def serve_metadata(self) -> None:
        """The metadata service."""
        self.metadata = self.sandbox.spawn(serve_metadata)
        wait_until(lambda: self.ask(ALLOWED, SECRET) == "200")

    def reload(self) -> list[str]:
        """What a command does after a change of the policy."""
        return self.call(lambda: filter_service.reload(self.cgroup))

    def faults(self) -> list[str]:
        """What status says of the filters."""
        return self.call(lambda: filter_places.faults(self.cgroup))

    def ask(
        self, user: int, path: str, group: int = OTHER_GROUP, to: tuple[str, int] = (METADATA, 80), port: int = 0
    ) -> str:
        """The status that a GET of this user gets, RESET, or the errno of its connect. ``port`` is its own."""
        return self.call(lambda: ask(user, path, group, to, port))


class FallbackScene(Scene):
    """By iptables. No policy is in force yet, and there is no metadata service."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine.sandbox, None, "ECONNREFUSED", self._change)
        self.machine = machine

    def _change(self, policy: Policy) -> None:
        self.machine.call(lambda: self.machine.backend().change(policy))


def _require_none(warnings: list[str]) -> None:
    assert warnings == []


def become_caller(user: int, group: int = OTHER_GROUP) -> None:
    """Takes the IDs of a caller."""
    become(uids=(user,) * 3, gids=(OTHER_GROUP,) * 3, groups=(group,))


def ask(user: int, path: str, group: int, to: tuple[str, int], port: int) -> str:
    """Scene.ask(), from inside, in a process of its own."""
    become_caller(user, group)
    with socket.socket() as one:
        one.settimeout(5)
        if port:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((METADATA, port))
        return ask_on(one, path, to)


def request_for(path: str) -> bytes:
    """A GET that ends the connection."""
    return f"GET {path} HTTP/1.1\r\nHost: {METADATA}\r\nConnection: close\r\n\r\n".encode()


def ask_on(one: socket.socket, path: str, to: tuple[str, int] = (METADATA, 80)) -> str:
    """The same on a socket that is not connected."""
    try:
        one.connect(to)
        assert one.getpeername()[:2] == to
        one.sendall(request_for(path))
        answer = one.recv(65536)
        return answer.split(b" ")[1].decode() if answer else RESET
    except socket.timeout:
        return TIMED_OUT
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):
            return RESET
        return errno.errorcode[error.errno or 0]
