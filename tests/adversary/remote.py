# SPDX-License-Identifier: Apache-2.0
"""The service on another machine: in another network namespace, connected by a veth pair."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from imds_guard.kernel import children, netns
from tests.adversary import service
from tests.adversary.privileges import command
from tests.adversary.scene import IPV4, PORT, Scene

NEAR, FAR, NOBODY = "10.88.0.1", "10.88.0.2", "10.88.0.99"
"""The address of this end, of the other end, and one that the other end routes to this one."""
CABLE = "cable"
FAR_MAC = "02:00:5e:00:53:02"
"""The hardware address of the other end, one that a machine may give itself (RFC 7042 section 2.1)."""


@contextmanager
def remote_service(scene: Scene) -> Iterator[None]:
    """Moves the calling process into a network namespace whose only link leads to the service."""
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
            peer = ("peer", "name", CABLE, "address", FAR_MAC, "netns", str(pid))
            command("ip", "link", "add", CABLE, "type", "veth", *peer)
            command("ip", "address", "add", f"{NEAR}/24", "dev", CABLE)
            command("ip", "link", "set", CABLE, "up")
            ours.send(b".")
            ours.recv(1)
            command("ip", "route", "add", IPV4, "via", FAR)
            yield
    finally:
        children.end(pid)


def allow_low_ports() -> None:
    """Lets every user bind port 80, as in Docker's containers (ip_unprivileged_port_start in ip-sysctl.rst)."""
    with open("/proc/sys/net/ipv4/ip_unprivileged_port_start", "w", encoding="ascii") as switch:
        switch.write("0")


def has_cables() -> None:
    """Makes a veth pair. Raises OSError when the kernel has no veth."""
    netns.unshare_network([])
    command("ip", "link", "add", CABLE, "type", "veth", "peer", "name", f"{CABLE}-end")


def has_interfaces_above(kind: str) -> None:
    """Makes an interface of this kind on top of a veth pair. Raises OSError when the kernel has none."""
    has_cables()
    command("ip", "link", "add", "above", "link", CABLE, "type", kind)
