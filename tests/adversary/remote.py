# SPDX-License-Identifier: Apache-2.0
"""The service on another machine: a network namespace of its own at the other end of a cable."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from imds_guard.kernel import children, netns
from tests.adversary import service
from tests.adversary.privileges import command
from tests.adversary.scene import IPV4, PORT, Scene

NEAR, FAR, NOBODY = "10.88.0.1", "10.88.0.2", "10.88.0.99"
"""Our end, the other, and an address that the other one believes to be here."""
CABLE = "cable"


@contextmanager
def remote_service(scene: Scene) -> Iterator[None]:
    """The calling process has a network namespace whose only way out is a cable to the service."""
    ours, theirs = socket.socketpair()

    def far() -> None:
        ours.close()
        netns.unshare_network([IPV4])
        sockets = service.listen((IPV4,), (PORT,))
        theirs.send(b".")
        theirs.recv(1)
        command("ip", "address", "add", f"{FAR}/24", "dev", CABLE)
        command("ip", "link", "set", CABLE, "up")
        command("ip", "route", "add", NOBODY, "via", NEAR)
        theirs.send(b".")
        scene.serve(sockets)

    pid = children.fork(far)
    theirs.close()
    try:
        with ours:
            ours.recv(1)
            netns.unshare_network([])
            command("ip", "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", str(pid))
            command("ip", "address", "add", f"{NEAR}/24", "dev", CABLE)
            command("ip", "link", "set", CABLE, "up")
            ours.send(b".")
            ours.recv(1)
            command("ip", "route", "add", IPV4, "via", FAR)
            yield
    finally:
        children.end(pid)


def allow_low_ports() -> None:
    """Anybody may bind port 80, as in Docker's containers (ip_unprivileged_port_start in ip-sysctl.rst)."""
    with open("/proc/sys/net/ipv4/ip_unprivileged_port_start", "w", encoding="ascii") as switch:
        switch.write("0")


def has_cables() -> None:
    """Raises OSError where there are none."""
    netns.unshare_network([])
    command("ip", "link", "add", CABLE, "type", "veth", "peer", "name", f"{CABLE}-end")
