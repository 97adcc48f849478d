# SPDX-License-Identifier: Apache-2.0
"""The scene of an attack: a network namespace with a metadata service, with or without a guard above it.

A way of an attack runs in the process of the test. It runs functions in the scene: as root to prepare, as the attacker
to attack.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, TypeVar

from imds_guard.kernel import children
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.decide import Reason
from imds_guard.policy.model import Endpoint, Identities, Lock, Policy, Verdict, make_policy
from imds_guard.policy.ports import normal_ports
from tests.adversary import privileges, service
from tests.adversary.model import Guard, Run
from tests.adversary.privileges import in_child, or_refused
from tests.conformance.enforcers import Enforcer

T = TypeVar("T")

IPV4, IPV6, LINK_LOCAL = "169.254.169.254", "fd00:ec2::254", "fe80::a9fe:a9fe"
MAPPED = f"::ffff:{IPV4}"
NAT64, NAT64_LISTED = "64:ff9b::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe"
OPEN4, OPEN6 = "10.66.0.1", "fd66::1"
DENY_LISTED = "169.254.42.42"
"""The address of a lock that denies only the attacker's user and DENIED_GROUP."""
ATTACKERS_OWN = "169.254.43.43"
"""The address of a lock that allows only the attacker."""
PORT = 80
ADDRESSES = (IPV4, IPV6, LINK_LOCAL, NAT64, NAT64_LISTED, OPEN4, OPEN6, DENY_LISTED, ATTACKERS_OWN)

ALLOWED, ATTACKER, BYSTANDER = 61_101, 61_102, 61_103
ALLOWED_GID, ATTACKER_GID, BYSTANDER_GID = 61_201, 61_202, 61_203
ALLOWED_GROUP, DENIED_GROUP, OTHER_GROUP = 61_301, 61_302, 61_303

_LONGEST_S = 300.0
WAIT_S = 3.0
"""Timeout of the attacker. The service is on this machine, so an answer comes at once or never."""


# --- policies -------------------------------------------------------------------------------------------------------


def policy(*users: int, locked: Sequence[str] = (IPV4, IPV6, LINK_LOCAL, NAT64_LISTED)) -> Policy:
    """Locks the service for all but these users and ALLOWED_GROUP. Two more addresses have their own lists."""
    web = normal_ports([(PORT, PORT)])
    endpoints = tuple(Endpoint(ipaddress.ip_network(address), tcp=web, udp=web) for address in locked)
    denied = Identities(frozenset({ATTACKER}), frozenset({DENIED_GROUP}))
    listed, own = (
        (Endpoint(ipaddress.ip_network(address), tcp=web, udp=web),) for address in (DENY_LISTED, ATTACKERS_OWN)
    )
    return make_policy(
        [
            Lock("service", endpoints, Identities(frozenset(users), frozenset({ALLOWED_GROUP}))),
            Lock("others", listed, deny=denied, default=Verdict.ALLOW),
            Lock("own", own, Identities(frozenset({ATTACKER}))),
        ]
    )


USUAL = policy(0, ALLOWED)
ATTACKER_TOO = policy(0, ALLOWED, ATTACKER)
ELSEWHERE = policy(ALLOWED, locked=("169.254.170.2",))
"""Locks an address that is not in the scene, so the service is open to everyone."""


# --- the scene ------------------------------------------------------------------------------------------------------


class Scene:
    """A sandbox with the service. Everyone can read ``folder``."""

    def __init__(self, sandbox: Sandbox, apply: Callable[[Policy], object] | None, folder: Path, secret: bytes) -> None:
        self.sandbox = sandbox
        self.folder = folder
        self._apply = apply
        self._secret = secret

    @property
    def guard_cgroup(self) -> str:
        """The path of the cgroup that the guard is attached to: the parent of the sandbox's."""
        return os.path.dirname(self.sandbox.cgroup)

    def inside(self, fn: Callable[[], T]) -> T:
        """What ``fn`` returns as root in the sandbox. Raises Refused where it raised OSError."""
        return self.sandbox.call(lambda: or_refused(fn), timeout_s=_LONGEST_S)

    def attacker(self, fn: Callable[[], T], *capabilities: int) -> T:
        """What ``fn`` returns in the sandbox as the attacker, who has only these capabilities."""
        return self.inside(lambda: _attack(fn, capabilities))

    def serve(self, sockets: Sequence[socket.socket]) -> None:
        """Answers like the service on these sockets, until the process is killed."""
        service.answer_forever(sockets, self._secret)

    @contextmanager
    def another_service(self, address: str) -> Iterator[int]:
        """A second service in the network namespace of the calling process, until the block ends."""
        sockets = service.listen((address,), (PORT,))
        with alongside(lambda: self.serve(sockets)) as pid:
            for one in sockets:
                one.close()
            yield pid

    def across_a_change(
        self, first: Policy, then: Policy, attack: Callable[[Callable[[], None]], bytes], user: int = ATTACKER
    ) -> bytes:
        """What ``attack`` gets as the user. It is called with a function that changes the policy and then returns."""
        ours, theirs = socket.socketpair()
        self._change_to(first)
        changer = children.fork(lambda: self._change_on_demand(ours, theirs, then))
        ours.close()

        def pause() -> None:
            theirs.send(b".")
            if theirs.recv(1) != b".":
                raise AssertionError("the policy was not changed")

        def as_user() -> bytes:
            privileges.become_user(user, ATTACKER_GID)
            return attack(pause)

        try:
            with theirs:
                return self.inside(as_user)
        finally:
            children.end(changer)
            self._change_to(USUAL)

    def _change_on_demand(self, ours: socket.socket, theirs: socket.socket, then: Policy) -> None:
        theirs.close()
        if ours.recv(1):
            self._change_to(then)
            ours.send(b".")

    def _change_to(self, wanted: Policy) -> None:
        if self._apply is not None:
            self._apply(wanted)


def _attack(fn: Callable[[], T], capabilities: Sequence[int]) -> T:
    privileges.become_user(ATTACKER, ATTACKER_GID, capabilities=capabilities)
    return fn()


def by_attacker(fn: Callable[[], T], *capabilities: int) -> T:
    """What ``fn`` returns as the attacker, in a child of the calling process, which stays root."""
    return in_child(lambda: _attack(fn, capabilities))


@contextmanager
def alongside(fn: Callable[[], object]) -> Iterator[int]:
    """Runs ``fn`` in a child of the calling process until the block ends. Yields its process ID."""
    pid = children.fork(fn)
    try:
        yield pid
    finally:
        children.end(pid)


def as_attacker(fn: Callable[[], bytes], *capabilities: int) -> Run:
    """A way that runs one function as the attacker."""
    return lambda scene: scene.attacker(fn, *capabilities)


def as_root(fn: Callable[[], bytes]) -> Run:
    """A way that runs one function as root, which itself becomes the attacker."""
    return lambda scene: scene.inside(fn)


# --- stages: scenes under one guard -----------------------------------------------------------------------------------


class Stage:
    """Makes scenes under one guard, or under none. ``secret`` is the answer of their services."""

    def __init__(self, guard: Guard, enforcer: Enforcer, secret: bytes) -> None:
        self.guard = guard
        self._enforcer = enforcer
        self._secret = secret

    def apply(self, sandbox: Sandbox, wanted: Policy) -> None:
        """Applies a policy, as a strict one if the guard of this stage is strict."""
        self._enforcer.apply(sandbox, wanted._replace(strict=True) if self.guard is Guard.STRICT else wanted)

    def reasons(self) -> set[Reason] | None:
        """The reasons of verdicts since the last call or apply()."""
        return self._enforcer.reasons()

    @contextmanager
    def scene(self) -> Iterator[Scene]:
        """A new network namespace and cgroup with the service."""
        sandbox = self._enforcer.sandbox()
        sandbox.addresses = ADDRESSES
        guarded = self.guard is not Guard.NONE
        with sandbox, tempfile.TemporaryDirectory(prefix="imds-guard-adversary-") as folder:
            os.chmod(folder, 0o755)
            if guarded:
                self.apply(sandbox, USUAL)
            sandbox.call(privileges.prepare_network)
            secret = self._secret
            sandbox.serve_with(
                lambda: service.listen((*ADDRESSES, "127.0.0.1", "::1"), (PORT,)),
                lambda sockets: service.answer_forever(sockets, secret),
            )
            apply = (lambda wanted: self.apply(sandbox, wanted)) if guarded else None
            yield Scene(sandbox, apply, Path(folder), secret)
