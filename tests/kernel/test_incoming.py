# SPDX-License-Identifier: Apache-2.0
"""--strict drops no packet of a connection that others made to a service of this machine, whatever the peer's port.

A load balancer of Azure probes from 168.63.129.16. Here the prober is another network namespace behind a cable, or a
client of the same machine that is bound to the locked address.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import signal
import socket
import struct
from collections.abc import Iterator
from typing import Callable, NamedTuple

import pytest

from imds_guard.backends.ebpf import EbpfBackend
from imds_guard.kernel.credentials import become
from imds_guard.kernel.listeners import each_ready, family, sockaddr
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.decide import Reason
from imds_guard.policy.model import Endpoint, Identities, Lock, Policy, make_policy
from imds_guard.policy.ports import normal_ports
from tests.adversary.privileges import command
from tests.conformance.probes import PROBES
from tests.kernel import guards
from tests.kernel.guards import OLD, STRANGER

PROBER = {4: "168.63.129.16", 6: "fd00:ec2::254"}
NEAR, FAR = {4: "10.88.0.1", 6: "fd88::1"}, {4: "10.88.0.2", 6: "fd88::2"}
"""The ends of the cable. The service is at NEAR."""
SERVICE_PORT, EPHEMERAL = 8080, 0
VERSIONS = pytest.mark.parametrize("version", [4, 6])

_BYE, _BYTES = b"bye", 100_000
_FASTOPEN = 0x607
"""Clients and servers use it, without a cookie, on every listener (tcp_fastopen in ip-sysctl.rst)."""
_IPPROTO_MPTCP = 262  # include/uapi/linux/in.h


def policy(*users: int) -> Policy:
    """All ports but those of DNS and DHCP, as the built-in list has it."""
    but_dns = normal_ports([(1, 52), (54, 66), (68, 65535)])
    endpoints = tuple(Endpoint(ipaddress.ip_network(one), tcp=but_dns) for one in PROBER.values())
    return make_policy([Lock("default", endpoints, Identities(frozenset(users)))], strict=True)


class Scene(NamedTuple):
    """The guarded machine and the prober's."""

    here: Sandbox
    there: Sandbox
    backend: EbpfBackend

    def dropped(self) -> int:
        """Packets that were dropped."""
        return dict(zip(Reason, self.backend.state().counters))[Reason.UNAPPROVED_SOCKET][0]


@pytest.fixture
def scene() -> Iterator[Scene]:
    if os.geteuid() != 0:
        pytest.skip("attaching programs needs root")
    with Sandbox() as here, Sandbox(tuple(PROBER.values())) as there:
        pid = there.spawn(signal.pause)
        here.call(functools.partial(_make_cable, pid))
        for sandbox, own in ((there, FAR), (here, NEAR)):
            sandbox.call(functools.partial(_set_up, own))
        here.call(_add_routes)
        backend = EbpfBackend(here.cgroup, guards.FAST)
        try:
            yield Scene(here, there, backend)
        finally:
            backend.remove()


def _make_cable(pid: int) -> None:
    command("ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", str(pid))


def _add_routes() -> None:
    for version, address in PROBER.items():
        command("ip", "route", "add", address, "via", FAR[version])


def _set_up(own: dict[int, str]) -> None:
    command("ip", "address", "add", f"{own[4]}/24", "dev", "cable")
    command("ip", "address", "add", f"{own[6]}/64", "dev", "cable", "nodad")
    command("ip", "link", "set", "cable", "up")


# --- both ends --------------------------------------------------------------------------------------------------------


def serve(scene: Scene, form: str = "tcp") -> None:
    """Starts a service of a user whom the policy does not let through."""
    scene.here.serve_with(functools.partial(_listen, form), lambda sockets: each_ready(sockets, _answer))


def _listen(form: str) -> list[socket.socket]:
    become(uids=(STRANGER,) * 3, gids=(STRANGER,) * 3, groups=())
    sockets = []
    for address in NEAR.values():
        one = socket.socket(family(address), socket.SOCK_STREAM, _IPPROTO_MPTCP if form == "mptcp" else 0)
        one.bind(sockaddr(address, SERVICE_PORT))
        one.listen(16)
        sockets.append(one)
    return sockets


def _answer(listening: socket.socket) -> None:
    """Echoes, in a child. To _BYE it answers with much, and closes first."""
    peer = listening.accept()[0]
    if os.fork():
        peer.close()
        return
    peer.settimeout(None)
    while True:
        said = peer.recv(64)
        if not said or said == _BYE:
            break
        peer.sendall(said)
    if said:
        peer.sendall(bytes(_BYTES))
    peer.close()
    os._exit(0)


def connect(version: int, port: int = EPHEMERAL, form: str = "tcp") -> socket.socket:
    """A connection from the prober's address to the service, over which it has answered once."""
    one = socket.socket(family(NEAR[version]), socket.SOCK_STREAM, _IPPROTO_MPTCP if form == "mptcp" else 0)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind(sockaddr(PROBER[version], port))
    one.settimeout(5)
    service = sockaddr(NEAR[version], SERVICE_PORT)
    if form == "fastopen":
        one.sendto(b"?", socket.MSG_FASTOPEN, service)
    else:
        one.connect(service)
        one.sendall(b"?")
    assert one.recv(1) == b"?"
    return one


def converse(version: int, port: int = EPHEMERAL, form: str = "tcp") -> int:
    """Speaks with the service until it closes. Returns the number of bytes that it sent at the end."""
    with connect(version, port, form) as one:
        for _ in range(3):
            one.sendall(b"more")
            assert one.recv(4) == b"more"
        one.sendall(_BYE)
        return sum(len(chunk) for chunk in iter(lambda: one.recv(65536), b""))


def hang_up(version: int, port: int) -> int:
    """Connects, as a probe of the port alone, and closes first."""
    with connect(version, port) as one:
        one.shutdown(socket.SHUT_WR)
        return len(one.recv(1))


def write(path: str, text: str) -> Callable[[], None]:
    def act() -> None:
        with open(f"/proc/sys/net/{path}", "w", encoding="ascii") as switch:
            switch.write(text)

    return act


# --- what passes ------------------------------------------------------------------------------------------------------


@VERSIONS
@pytest.mark.parametrize("port", [80, 32526, EPHEMERAL])
def test_a_probe_from_the_locked_address_is_answered(scene: Scene, version: int, port: int) -> None:
    """From each port that is locked there: the answers are packets to that port."""
    scene.backend.apply(policy())
    serve(scene)
    assert scene.there.call(lambda: converse(version, port)) == _BYTES
    assert scene.there.call(lambda: hang_up(version, EPHEMERAL)) == 0
    assert scene.dropped() == 0
    assert scene.backend.faults() == []


@VERSIONS
def test_a_client_of_this_machine_that_is_bound_to_the_locked_address_is_answered(scene: Scene, version: int) -> None:
    """The locked address is this machine's, and the client connects to another service."""
    scene.here.call(lambda: command("ip", "address", "add", PROBER[version], "dev", "lo"))
    scene.backend.apply(policy())
    serve(scene)
    assert scene.here.call(lambda: converse(version)) == _BYTES
    assert scene.dropped() == 0


@VERSIONS
def test_with_syn_cookies(scene: Scene, version: int) -> None:
    """The kernel keeps nothing of the SYN (tcp_syncookies=2 in ip-sysctl.rst)."""
    scene.here.call(write("ipv4/tcp_syncookies", "2"))
    scene.backend.apply(policy())
    serve(scene)
    assert scene.there.call(lambda: converse(version)) == _BYTES
    assert scene.here.call(_cookies_sent) > 0
    assert scene.dropped() == 0


def _cookies_sent() -> int:
    with open("/proc/net/netstat", encoding="ascii") as file:
        names, values = (line.split() for line in file.read().splitlines()[:2])
    return int(values[names.index("SyncookiesSent")])


@VERSIONS
@pytest.mark.parametrize("form", ["fastopen", "mptcp"])
def test_other_forms_of_tcp(scene: Scene, version: int, form: str) -> None:
    """With Fast Open the service answers before the handshake is over."""
    if missing := PROBES[form]():
        pytest.skip(missing)
    for sandbox in (scene.here, scene.there):
        sandbox.call(write("ipv4/tcp_fastopen", str(_FASTOPEN)))
    scene.backend.apply(policy())
    serve(scene, form)
    assert scene.there.call(lambda: converse(version, form=form)) == _BYTES
    assert scene.dropped() == 0


@VERSIONS
def test_a_connection_lives_through_changes_and_a_replacement_of_the_maps(scene: Scene, version: int) -> None:
    with guards.other_layout():
        scene.backend.apply(policy())
        serve(scene)
        prober = Prober(scene, version)
    for wanted in (policy(OLD), policy(), policy(OLD)):
        scene.backend.apply(wanted)
        assert prober.is_answered()
    assert scene.dropped() == 0


class Prober:
    """A process of the prober's machine with one connection."""

    def __init__(self, scene: Scene, version: int) -> None:
        self._pipe, theirs = socket.socketpair()

        def live() -> None:
            with connect(version) as one:
                theirs.send(b"1")
                while theirs.recv(1):
                    theirs.send(_is_answered(one))

        scene.there.spawn(live)
        self._pipe.settimeout(20)
        assert self._pipe.recv(1) == b"1"

    def is_answered(self) -> bool:
        """Whether the service answers once more."""
        self._pipe.send(b"?")
        return self._pipe.recv(1) == b"1"


def _is_answered(one: socket.socket) -> bytes:
    one.settimeout(1)
    with contextlib.suppress(OSError):
        one.sendall(b"?")
        return b"1" if one.recv(1) == b"?" else b"0"
    return b"0"


# --- what does not ----------------------------------------------------------------------------------------------------


@VERSIONS
def test_a_connection_that_was_answered_before_strict_must_be_made_again(scene: Scene, version: int) -> None:
    """Nothing shows any more who made it. On doubt, deny."""
    serve(scene)
    prober = Prober(scene, version)
    scene.backend.apply(policy()._replace(strict=False))
    assert prober.is_answered()
    scene.backend.apply(policy())
    assert not prober.is_answered()
    assert Prober(scene, version).is_answered()


@VERSIONS
def test_an_accepted_socket_that_connects_is_judged(scene: Scene, version: int) -> None:
    """By the hook; and its mark is good for no packet of another connection."""
    scene.backend.apply(policy())

    def reuse() -> str:
        become(uids=(STRANGER,) * 3, gids=(STRANGER,) * 3, groups=())
        with socket.socket(family(NEAR[version]), socket.SOCK_STREAM) as listening:
            listening.bind(sockaddr(NEAR[version], SERVICE_PORT))
            listening.listen(1)
            os.write(ready, b".")
            peer = listening.accept()[0]
        assert peer.recv(1) == b"?"
        peer.sendall(b"?")
        _disconnect(peer)
        try:
            peer.connect(sockaddr(PROBER[version], 80))
        except OSError as error:
            return type(error).__name__
        return "connected"

    waiting, ready = os.pipe()

    def probe() -> None:
        os.read(waiting, 1)
        with connect(version):
            signal.pause()

    scene.there.spawn(probe)
    assert scene.here.call(reuse) == "PermissionError"


def _disconnect(one: socket.socket) -> None:
    """connect() to AF_UNSPEC (connect(2))."""
    import ctypes

    unspecified = struct.pack("=H26x", socket.AF_UNSPEC)
    assert ctypes.CDLL(None).connect(one.fileno(), unspecified, len(unspecified)) == 0
