# SPDX-License-Identifier: Apache-2.0
"""Network namespaces and their loopback addresses, by system calls and rtnetlink(7), without the ip program."""

from __future__ import annotations

import ctypes
import ipaddress
import os
import select
import socket
import struct
import time
from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)

# Source: include/uapi/linux/sched.h
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

LOOPBACK_INDEX = 1
"""lo is the first interface of every namespace (LOOPBACK_IFINDEX in include/net/flow.h)."""

# Source: include/uapi/linux/rtnetlink.h, netlink.h, if_addr.h and if.h
_RTM_NEWLINK, _RTM_NEWADDR, _RTM_NEWROUTE, _RTM_GETROUTE = 16, 20, 24, 26
_RTA_DST, _RTN_LOCAL = 1, 2
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_REPLACE, _NLM_F_CREATE = 0x1, 0x4, 0x100, 0x400
_NLMSG_ERROR = 2
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_IFA_F_NODAD = 0x02
_IFF_UP = 0x1
_RT_SCOPE_HOST = 254

_LOCAL_WITHIN_S, _LOOK_AGAIN_S = 10.0, 0.001


def unshare(flags: int) -> None:
    """The calling thread has new namespaces of the kinds in ``flags`` (CLONE_NEW*). Raises OSError."""
    _check(int(_libc.unshare(ctypes.c_int(flags))), "unshare")


def enter(namespace_fd: int, kind: int = CLONE_NEWNET) -> None:
    """The calling thread is in the namespace behind ``namespace_fd`` (setns(2)). Raises OSError."""
    _check(int(_libc.setns(ctypes.c_int(namespace_fd), ctypes.c_int(kind))), "setns")


def _check(result: int, name: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def unshare_network(addresses: Iterable[str]) -> None:
    """The calling thread is in a new network namespace whose lo is up and has ``addresses`` and the loopback ones.

    The first IPv4 address is lo's primary one: where 0.0.0.0 leads on a socket that is bound to lo as a device.
    """
    unshare(CLONE_NEWNET)
    parsed = [ipaddress.ip_address(address) for address in addresses]
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as route:
        # Before lo is up: coming up gives it 127.0.0.1, behind what is there (inetdev_event() in net/ipv4/devinet.c).
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
    """Returns when packets to an IPv6 address of lo are taken in: a work queue makes it local (addrconf_dad_start()).

    Before that there is a route out of lo alone, and what comes back in is unreachable. Raises TimeoutError.
    """
    deadline = time.monotonic() + _LOCAL_WITHIN_S
    while not _is_local(route, packed):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{ipaddress.ip_address(packed)} did not become an address of this namespace")
        select.select([], [], [], _LOOK_AGAIN_S)


def _is_local(route: socket.socket, packed: bytes) -> bool:
    """Asks for the route to an address: the eighth octet of struct rtmsg is its type (rtnetlink(7))."""
    body = struct.pack("=8BI", socket.AF_INET6, len(packed) * 8, 0, 0, 0, 0, 0, 0, 0) + _attribute(_RTA_DST, packed)
    answer, reply = _exchange(route, _RTM_GETROUTE, 0, body)
    return answer == _RTM_NEWROUTE and reply[7] == _RTN_LOCAL


def _add_address(route: socket.socket, packed: bytes) -> None:
    """Adds one address of full prefix length to lo, without duplicate address detection (RFC 4862 section 5.4).

    An IPv4 one has the scope of 127.0.0.1, which would come first otherwise (__inet_insert_ifa() in Linux).
    """
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    scope = _RT_SCOPE_HOST if family == socket.AF_INET else 0
    body = struct.pack("=BBBBI", family, len(packed) * 8, 0, scope, LOOPBACK_INDEX)
    body += _attribute(_IFA_LOCAL, packed) + _attribute(_IFA_ADDRESS, packed)
    if len(packed) == 16:
        body += _attribute(_IFA_FLAGS, struct.pack("=I", _IFA_F_NODAD))
    _request(route, _RTM_NEWADDR, _NLM_F_CREATE | _NLM_F_REPLACE, body)


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value


def _request(route: socket.socket, kind: int, flags: int, body: bytes) -> None:
    """Sends one netlink request and waits for its acknowledgement. Raises OSError with the kernel's errno."""
    answer, reply = _exchange(route, kind, flags | _NLM_F_ACK, body)
    number = struct.unpack_from("=i", reply)[0]
    if answer != _NLMSG_ERROR or number != 0:
        raise OSError(-number, f"netlink request {kind}: {os.strerror(-number)}")


def _exchange(route: socket.socket, kind: int, flags: int, body: bytes) -> tuple[int, bytes]:
    """The type and the body of the answer to one netlink request."""
    length = struct.calcsize("=IHHII") + len(body)
    route.send(struct.pack("=IHHII", length, kind, flags | _NLM_F_REQUEST, 0, 0) + body)
    received = route.recv(65536)
    return struct.unpack_from("=IH", received)[1], received[struct.calcsize("=IHHII") :]
