# SPDX-License-Identifier: Apache-2.0
"""A namespace with a fake metadata service and iptables of one kind, and callers that try to connect."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Callable, TypeVar

from imds_guard.backends.iptables import IptablesBackend
from imds_guard.backends.iptables.form import Form
from imds_guard.backends.iptables.probe import ProbeResult
from imds_guard.kernel.credentials import become
from imds_guard.kernel.listeners import family, sockaddr
from imds_guard.kernel.run import run
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.model import Endpoint, Identities, Lock, Mode, Policy, Verdict, make_policy
from imds_guard.policy.ports import ALL_PORTS, Ports

T = TypeVar("T")

V4, V6 = "169.254.169.254", "fd00:ec2::254"
OTHER = "169.254.170.2"
SERVED = (V4, V6, OTHER, "127.0.0.1", "::1")
PORTS = (80, 8080)

FOO, BAR, STRANGER = 41_001, 41_002, 41_003
STAFF, NO_GROUP = 51_001, 51_009

KINDS: dict[str, tuple[str, str]] = {
    "nf_tables": ("iptables-nft", "ip6tables-nft"),
    "legacy": ("iptables-legacy", "ip6tables-legacy"),
}


@contextmanager
def one_legacy_at_a_time(kind: str) -> Iterator[None]:
    """While the block runs, no other test uses iptables-legacy.

    All network namespaces share one xtables lock (/run/xtables.lock), which some tests hold, or measure the wait for.
    """
    if kind != "legacy":
        yield
        return
    with open("/run/imds-guard-tests-legacy.lock", "w", encoding="ascii") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


class Machine:
    """A sandbox with iptables of one kind. Every method works inside it.

    ``form`` is that of the rules, as if no better one worked here; None: the one that the probe finds.
    """

    def __init__(self, sandbox: Sandbox, kind: str, state_folder: str, form: Form | None = None) -> None:
        self.sandbox = sandbox
        self.form = form
        self.kind = kind
        self.commands = KINDS[kind]
        self.state_folder = state_folder

    def backend(self, *, resolve_groups: bool = False, lock_wait_s: int = 10) -> IptablesBackend:
        """The backend for this kind of iptables."""
        made = IptablesBackend(
            self.commands, resolve_groups=resolve_groups, state_folder=self.state_folder, lock_wait_s=lock_wait_s
        )
        if self.form is not None:
            made._probes.update(dict.fromkeys((False, True), ProbeResult(True, True, form=self.form)))
        return made

    def call(self, fn: Callable[[], T]) -> T:
        """The result of ``fn`` inside."""
        return self.sandbox.call(fn, timeout_s=120)

    def apply(self, policy: Policy) -> tuple[str, ...]:
        """Applies a policy and returns Change.done."""
        return self.call(lambda: self.backend().apply(policy)).done

    def faults(self) -> list[str]:
        """The faults that the backend reports."""
        return self.call(lambda: self.backend().faults())

    def rules(self, version: int, table: str = "filter") -> str:
        """The chains and rules that iptables-save shows for a table."""
        command = self.commands[0 if version == 4 else 1]
        saved = self.call(lambda: run([f"{command}-save", "-t", table]))
        assert saved.status == 0, saved.complaint
        return "\n".join(line for line in saved.stdout.splitlines() if line and line[0] in ":-")

    def iptables(self, *arguments: str, version: int = 4) -> None:
        """Runs iptables as somebody else would."""
        command = self.commands[0 if version == 4 else 1]
        done = self.call(lambda: run([command, "-w", *arguments]))
        assert done.status == 0, done.complaint

    def nft(self, text: str) -> None:
        """Runs nft as somebody else would."""
        done = self.call(lambda: run(["nft", "-f", "/proc/self/fd/0"], stdin=text))
        assert done.status == 0, done.complaint

    def reach(self, uid: int, to: str = V4, port: int = 80, *, gid: int = NO_GROUP, groups: Sequence[int] = ()) -> str:
        """``connected``, or the name of the errno that a new process with these IDs gets over TCP."""
        return self.call(lambda: connect(uid, to, port, gid=gid, groups=groups))

    def send(self, uid: int, to: str = V4, port: int = 80) -> str:
        """The outcome of sending one datagram: ``connected``, or the name of the errno."""

        def send() -> str:
            become((uid,) * 3, (NO_GROUP,) * 3, ())
            with socket.socket(family(to), socket.SOCK_DGRAM) as one:
                return _errno_of(lambda: one.sendto(b"?", sockaddr(to, port)))

        return self.call(send)


def connect(
    uid: int, to: str, port: int, *, gid: int = NO_GROUP, groups: Sequence[int] = (), timeout_s: float = 10.0
) -> str:
    """Takes the IDs and connects over TCP. Returns ``connected``, or the name of the errno."""
    become((uid,) * 3, (gid,) * 3, groups)
    with socket.socket(family(to), socket.SOCK_STREAM) as one:
        one.settimeout(timeout_s)
        return _errno_of(lambda: one.connect(sockaddr(to, port)))


def _errno_of(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, repr(error))
    return "connected"


def policy_for(
    users: Sequence[int] = (),
    groups: Sequence[int] = (),
    *,
    deny: Sequence[int] = (),
    to: Sequence[str] = (V4, V6),
    tcp: Ports = ALL_PORTS,
    udp: Ports = (),
    mode: Mode = Mode.ENFORCE,
    default: Verdict = Verdict.DENY,
) -> Policy:
    """One lock on the IPv4 and the IPv6 address."""
    endpoints = tuple(Endpoint(ipaddress.ip_network(one), tcp, udp) for one in to)
    allow = Identities(frozenset(users), frozenset(groups))
    return make_policy([Lock("imds", endpoints, allow, Identities(frozenset(deny)), default)], mode)
