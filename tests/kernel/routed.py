# SPDX-License-Identifier: Apache-2.0
"""Three namespaces: a client, a router with our rules, and a server that has the locked addresses."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, TypeVar

import pytest

from imds_guard.backends import Change
from imds_guard.backends.forwarded import Forwarded, ForwardingState
from imds_guard.kernel.listeners import each_ready, family, sockaddr
from imds_guard.kernel.netns import enter
from imds_guard.kernel.run import run
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.model import Policy
from tests.kernel.rules_in_a_sandbox import KINDS, V4, V6, connect, one_legacy_at_a_time
from tests.tools import need

T = TypeVar("T")

REFUSED, TIMED_OUT = "ECONNREFUSED", "TimeoutError('timed out')"
CLIENT = {4: "10.0.1.2", 6: "fd00:1::2"}
PUBLISHED = 8080
"""A port of the client that the server connects to, as a load balancer does with a container's."""

WAYS: dict[str, tuple[tuple[str, ...], str]] = {
    "nft": (("nft",), "nf_tables"),
    "iptables-nft": (("iptables",), "nf_tables"),
    "iptables-legacy": (("iptables",), "legacy"),
}
"""The program that writes the rules, and the kind of iptables that the machine has."""

TRACKING = "table inet others { chain forward { type filter hook forward priority 10; ct state new accept; }; }"
"""Somebody else's rules that use conntrack."""


class Routed:
    """The three namespaces. ``router`` has forwarding switched on."""

    def __init__(self, boxes: dict[str, Sandbox], way: str, folder: str) -> None:
        self.boxes = boxes
        self.way = way
        self.writers, self.kind = WAYS[way]
        self._folder = folder

    @property
    def refusal(self) -> str:
        """The outcome of a connect that the rules stop: iptables can't reject in table mangle."""
        return REFUSED if self.way == "nft" else TIMED_OUT

    def rules(self) -> Forwarded:
        """The rules for forwarded packets, for use in the router."""
        return Forwarded(KINDS[self.kind], state_folder=self._folder, writers=self.writers)

    def on_router(self, fn: Callable[[], T]) -> T:
        """What ``fn`` returns in the router."""
        return self.boxes["router"].call(fn, timeout_s=60)

    def command(self, *argv: str, stdin: str = "") -> str:
        """Runs a program in the router, which must succeed; its output."""
        done = self.on_router(lambda: run(argv, stdin=stdin))
        assert done.status == 0, f"{argv}: {done.complaint}"
        return done.stdout

    def iptables(self, *arguments: str) -> str:
        """Runs both iptables in the router, as somebody else would."""
        return "".join(self.command(command, "-w", *arguments) for command in KINDS[self.kind])

    def enforce(self, policy: Policy, option: str | None = None) -> Change:
        """Forwarded.enforce() in the router."""
        return self.on_router(lambda: self.rules().enforce(policy, option))

    def describe(self, policy: Policy | None) -> ForwardingState:
        """Forwarded.describe() in the router."""
        return self.on_router(lambda: self.rules().describe(policy))

    def faults(self, policy: Policy | None) -> list[str]:
        """Forwarded.faults() in the router."""
        return self.on_router(lambda: self.rules().faults(policy))

    def track(self) -> None:
        """Somebody in the router begins to use conntrack."""
        self.command("nft", "-f", "-", stdin=TRACKING)

    def reach(self, to: str, port: int = 80, *, of: str = "client") -> str:
        """The outcome of a connect by a root process of a machine."""
        return self.boxes[of].call(lambda: connect(0, to, port, gid=1, timeout_s=1.0))

    def reach_both(self, port: int = 80) -> list[str]:
        """The outcomes of connects of the client to both locked addresses, at the same time."""
        return self._both(lambda to: connect(0, to, port, gid=1, timeout_s=1.0))

    def echo(self, to: str, port: int = 80) -> str:
        """``answered``, or the name of the error that a datagram of the client gets."""
        return self.boxes["client"].call(lambda: _echo(to, port))

    def echo_both(self, port: int = 80) -> list[str]:
        """echo() of both locked addresses, at the same time."""
        return self._both(lambda to: _echo(to, port))

    def _both(self, fn: Callable[[str], str]) -> list[str]:
        def inside() -> list[str]:
            with ThreadPoolExecutor(2) as pool:
                return list(pool.map(fn, (V4, V6)))

        return self.boxes["client"].call(inside)

    def probe(self, version: int) -> str:
        """The outcome of a connect from a locked address to the published port of the client."""
        source = V4 if version == 4 else V6

        def inside() -> str:
            with socket.socket(family(source)) as one:
                one.settimeout(2)
                one.bind(sockaddr(source, 0))
                try:
                    one.connect(sockaddr(CLIENT[version], PUBLISHED))
                    return one.recv(10).decode()
                except OSError as error:
                    return repr(error)

        return self.boxes["server"].call(inside)


def _echo(to: str, port: int) -> str:
    with socket.socket(family(to), socket.SOCK_DGRAM) as one:
        one.settimeout(1)
        one.connect(sockaddr(to, port))
        try:
            one.send(b"?")
            one.recv(10)
        except OSError as error:
            return type(error).__name__
    return "answered"


def ip(command: str) -> None:
    """Runs ip(8), which must succeed."""
    done = run(["ip", *command.split()])
    assert done.status == 0, f"ip {command}: {done.complaint}"


def _wire(boxes: dict[str, Sandbox]) -> None:
    """client 10.0.1.2 - 10.0.1.1 router 10.0.2.1 - 10.0.2.2 server, and fd00:1:: and fd00:2:: beside them."""
    pids = {name: box.spawn(signal.pause) for name, box in boxes.items()}
    router = boxes["router"]
    for number, peer in ((1, "client"), (2, "server")):
        namespace = boxes[peer].netns_fd
        router.call(lambda: ip(f"link add to-{peer} type veth peer name eth0"))  # noqa: B023 - called at once
        router.call(lambda: ip(f"link set eth0 netns {pids[peer]}"))  # noqa: B023
        router.call(lambda: _address(f"to-{peer}", number, 1))  # noqa: B023

        def inside() -> None:
            enter(namespace)  # noqa: B023
            _address("eth0", number, 2)  # noqa: B023
            ip(f"route add default via 10.0.{number}.1")  # noqa: B023
            ip(f"-6 route add default via fd00:{number}::1")  # noqa: B023

        boxes[peer].call(inside)
    router.call(_forward)


def _forward() -> None:
    for switch in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        Path("/proc/sys/net", switch).write_text("1")
    for address in (V4, V6):
        ip(f"{'-6 ' if ':' in address else ''}route add {address} via {'fd00:2::2' if ':' in address else '10.0.2.2'}")


def _address(interface: str, number: int, host: int) -> None:
    Path("/proc/sys/net/ipv6/conf", interface, "accept_dad").write_text("0")  # nothing waits for it
    ip(f"address add 10.0.{number}.{host}/24 dev {interface}")
    ip(f"address add fd00:{number}::{host}/64 dev {interface} nodad")
    ip(f"link set {interface} up")


def _listen_published() -> list[socket.socket]:
    sockets = []
    for address in CLIENT.values():
        one = socket.socket(family(address))
        one.bind(sockaddr(address, PUBLISHED))
        one.listen()
        sockets.append(one)
    return sockets


def _greet(sockets: list[socket.socket]) -> None:
    def greet(one: socket.socket) -> None:
        with one.accept()[0] as connection:
            connection.sendall(b"alive")

    each_ready(sockets, greet)


@contextmanager
def routed_machines(way: str, folder: str) -> Iterator[Routed]:
    """The three machines, with services on the server and on the client."""
    if os.geteuid() != 0:
        pytest.skip("making network namespaces needs root")
    kind = WAYS[way][1]
    need("ip", "nft", KINDS[kind][0])
    with one_legacy_at_a_time(kind), Sandbox() as client, Sandbox() as router, Sandbox((V4, V6)) as server:
        boxes = {"client": client, "router": router, "server": server}
        _wire(boxes)
        server.serve((V4, V6), (53, 80))
        client.serve_with(_listen_published, _greet)
        yield Routed(boxes, way, folder)
