# SPDX-License-Identifier: Apache-2.0
"""New network namespaces and their loopback addresses, by rtnetlink(7), without the ip program."""

from __future__ import annotations

import ipaddress
import select
import socket
import struct
import time
from collections.abc import Iterable

from imds_guard.kernel import netlink, syscalls

LOOPBACK_INDEX = 1
"""lo is the first interface of every namespace (LOOPBACK_IFINDEX in include/net/flow.h)."""

# Source: include/uapi/linux/rtnetlink.h, if_addr.h and if.h
_RTM_NEWLINK, _RTM_NEWADDR, _RTM_NEWROUTE, _RTM_GETROUTE = 16, 20, 24, 26
_RTA_DST, _RTN_LOCAL = 1, 2
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_IFA_F_NODAD = 0x02
_IFF_UP = 0x1
_RT_SCOPE_HOST = 254

_LOCAL_WITHIN_S, _POLL_S = 10.0, 0.001


def has_ipv6() -> bool:
    """False where the kernel has no IPv6 (ipv6.disable=1): then nothing can connect to an IPv6 address."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
    except OSError:
        return False
    return True


_UNPRIVILEGED = "/proc/sys/net/ipv4/ip_unprivileged_port_start"


def first_unprivileged_port() -> int:
    """The first port that every process may bind in this network namespace, also for IPv6.

    Source: ip_unprivileged_port_start in Documentation/networking/ip-sysctl.rst.
    """
    with open(_UNPRIVILEGED, encoding="ascii") as file:
        return int(file.read())


def accepted_routes() -> list[str]:
    """The sysctls by which this network namespace passes on its own packets by a route that is in their header.

    Such a packet leaves for its first hop, another address of this machine, and comes back in by lo. The switch of lo
    counts, too. Sources: IN_DEV_SOURCE_ROUTE in Linux include/linux/inetdevice.h, ipv6_srh_rcv() in net/ipv6/exthdrs.c.
    """
    return [f"net.{version}.conf.all.{name}" for version, name in _ROUTES if _is_on(version, name)]


_ROUTES = (("ipv4", "accept_source_route"), ("ipv6", "seg6_enabled"))


def _is_on(version: str, name: str) -> bool:
    """False also where the kernel was built without it."""
    for interface in ("all", "lo"):
        try:
            with open(f"/proc/sys/net/{version}/conf/{interface}/{name}", encoding="ascii") as file:
                if int(file.read()) <= 0:
                    return False
        except FileNotFoundError:
            return False
    return True


def enter(namespace_fd: int) -> None:
    """Moves the calling thread into the network namespace of ``namespace_fd``. Raises OSError."""
    syscalls.setns(namespace_fd, syscalls.CLONE_NEWNET)


def unshare_network(addresses: Iterable[str]) -> None:
    """Moves the calling thread into a new network namespace; its lo is up and has ``addresses`` beside 127.0.0.1, ::1.

    The first IPv4 address is the primary one of lo: a socket that is bound to the device lo reaches it by 0.0.0.0.
    """
    syscalls.unshare(syscalls.CLONE_NEWNET)
    parsed = [ipaddress.ip_address(address) for address in addresses]
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as route:
        # Before lo is up: lo gets 127.0.0.1 when it comes up, after the addresses that it has (inetdev_event() in
        # net/ipv4/devinet.c).
        for address in parsed:
            if address.version == 4:
                _add_address(route, address.packed)
        _request(route, _RTM_NEWLINK, 0, struct.pack("=BxHiII", 0, 0, LOOPBACK_INDEX, _IFF_UP, _IFF_UP))
        for address in parsed:
            if address.version == 6:
                _add_address(route, address.packed)
        for address in parsed:
            if address.version == 6:
                _wait_until_local(route, address.packed)


def _wait_until_local(route: socket.socket, packed: bytes) -> None:
    """Returns when lo accepts packets to an IPv6 address: a work queue makes it local (addrconf_dad_start()).

    Until then packets leave by lo and are unreachable when they come back. Raises TimeoutError.
    """
    deadline = time.monotonic() + _LOCAL_WITHIN_S
    while not _is_local(route, packed):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{ipaddress.ip_address(packed)} did not become an address of this namespace")
        select.select([], [], [], _POLL_S)


def _is_local(route: socket.socket, packed: bytes) -> bool:
    """Asks for the route to an address. The eighth byte of struct rtmsg is the type of the route (rtnetlink(7))."""
    body = struct.pack("=8BI", socket.AF_INET6, len(packed) * 8, 0, 0, 0, 0, 0, 0, 0)
    answer = _exchange(route, _RTM_GETROUTE, 0, body + netlink.attribute(_RTA_DST, packed))
    return answer.type == _RTM_NEWROUTE and answer.body[7] == _RTN_LOCAL


def _add_address(route: socket.socket, packed: bytes) -> None:
    """Adds one address of full prefix length to lo, without duplicate address detection (RFC 4862 section 5.4).

    An IPv4 address gets the scope of 127.0.0.1: otherwise 127.0.0.1 would come first (__inet_insert_ifa() in Linux).
    """
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    scope = _RT_SCOPE_HOST if family == socket.AF_INET else 0
    body = struct.pack("=BBBBI", family, len(packed) * 8, 0, scope, LOOPBACK_INDEX)
    body += netlink.attribute(_IFA_LOCAL, packed) + netlink.attribute(_IFA_ADDRESS, packed)
    if len(packed) == 16:
        body += netlink.attribute(_IFA_FLAGS, struct.pack("=I", _IFA_F_NODAD))
    _request(route, _RTM_NEWADDR, netlink.CREATE | netlink.REPLACE, body)


def _request(route: socket.socket, kind: int, flags: int, body: bytes) -> None:
    """Sends one request and waits for its acknowledgement. Raises OSError with the kernel's errno."""
    answer = _exchange(route, kind, flags | netlink.ACK, body)
    if answer.type != netlink.ERROR:
        raise OSError(f"rtnetlink request {kind} was answered by a message of type {answer.type}")
    netlink.check(answer.body, f"rtnetlink request {kind}")


def _exchange(route: socket.socket, kind: int, flags: int, body: bytes) -> netlink.Message:
    """Sends one request; the first message of the answer."""
    route.send(netlink.request(kind, flags, 0, body))
    return next(netlink.messages(memoryview(route.recv(65536))))
