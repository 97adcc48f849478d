# SPDX-License-Identifier: Apache-2.0
"""Probes for what ways need, run as root in a scene. Each returns None, or a sentence that says what is missing."""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Callable

from imds_guard.kernel import bpf
from tests.adversary import privileges, remote, service
from tests.adversary.attacks_address import IP_OPTIONS
from tests.adversary.attacks_packets import MANY, add_routing_header, ask_by_raw_ipv6
from tests.adversary.rewriters import OVERRIDING
from tests.adversary.scene import IPV4, OPEN4, OPEN6, Scene
from tests.adversary.xdp import XdpSender
from tests.conformance.probes import PROBES as OF_THE_TABLE


def _missing(feature: str, attempt: Callable[[], object], *absent: int) -> str | None:
    try:
        attempt()
    except OSError as error:
        if error.errno not in absent:
            raise
        return f"{feature} can't be used here: {error}"
    return None


def _socket(feature: str, kind: int, protocol: int) -> str | None:
    absent = (errno.EPROTONOSUPPORT, errno.EINVAL, errno.ESOCKTNOSUPPORT)
    return _missing(feature, lambda: socket.socket(socket.AF_INET, kind, protocol).close(), *absent)


def _source_route() -> None:
    with socket.socket() as one:
        option = struct.pack("=BBB4sB", 131, 7, 4, socket.inet_aton(OPEN4), 1)
        one.setsockopt(socket.IPPROTO_IP, IP_OPTIONS, option)


def _routing_header() -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as one:
        add_routing_header(one)


def _translation() -> None:
    rule = ("-d", "10.66.66.8", "-p", "tcp", "-j", "DNAT", "--to-destination", f"{IPV4}:80")
    privileges.command("iptables", "-w", "-t", "nat", "-A", "OUTPUT", *rule)
    privileges.command("iptables", "-w", "-t", "nat", "-D", "OUTPUT", *rule)


def _overriding() -> None:
    os.close(bpf.prog_load(OVERRIDING, "probe", bpf.AttachType.CGROUP_INET4_CONNECT))


def _subtree(scene: Scene) -> str | None:
    """No cgroup is outside the root, whose inode is 1 (cgroup_get_kernfs_id() in Linux)."""
    return (
        "the guard is at the root cgroup, so no cgroup is outside" if os.stat(scene.guard_cgroup).st_ino == 1 else None
    )


PROBES: dict[str, Callable[[Scene], str | None]] = {
    **{name: lambda scene, probe=probe: scene.inside(probe) for name, probe in OF_THE_TABLE.items()},  # type: ignore[misc]
    "udp-lite": lambda scene: scene.inside(lambda: _socket("UDP-Lite", socket.SOCK_DGRAM, service.IPPROTO_UDPLITE)),
    "source-route": lambda scene: scene.inside(lambda: _missing("source routes", _source_route, errno.EINVAL)),
    "routing-header": lambda scene: scene.inside(
        lambda: _missing("routing headers of type 4", _routing_header, errno.EINVAL)
    ),
    "nat": lambda scene: scene.inside(lambda: _missing("address translation", _translation, 0)),
    "many-extensions": lambda scene: scene.inside(
        lambda: _missing(
            "a packet with many extension headers", lambda: ask_by_raw_ipv6(OPEN6, MANY, fragment=True), errno.EAGAIN
        )
    ),
    "cable": lambda scene: scene.inside(lambda: _missing("veth", remote.has_cables, 0)),
    "macvlan": lambda scene: scene.inside(
        lambda: _missing("macvlan", lambda: remote.has_interfaces_above("macvlan"), 0)
    ),
    "ipvlan": lambda scene: scene.inside(lambda: _missing("ipvlan", lambda: remote.has_interfaces_above("ipvlan"), 0)),
    "xdp": lambda scene: scene.inside(
        lambda: _missing("AF_XDP sockets", lambda: XdpSender("lo").__exit__(None, None, None), errno.EAFNOSUPPORT)
    ),
    "tun": lambda scene: scene.inside(
        lambda: _missing("tun", lambda: os.close(os.open("/dev/net/tun", os.O_RDWR)), errno.ENOENT, errno.ENODEV)
    ),
    # EINVAL: an unknown helper. Some verifiers report it as EACCES.
    "set-retval": lambda scene: scene.inside(lambda: _missing("bpf_set_retval()", _overriding, errno.EINVAL)),
    "subtree": _subtree,
}
