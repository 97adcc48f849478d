# SPDX-License-Identifier: Apache-2.0
"""The ways to connect. Each runs in a child of the sandbox and gives the name of an errno, or ``connected``."""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import os
import select
import socket
import struct
from typing import Any, Callable

from imds_guard.kernel.listeners import sockaddr
from imds_guard.kernel.netns import LOOPBACK_INDEX
from tests.conformance import uring
from tests.conformance.families import IPV4, IPV6
from tests.conformance.model import Attempt
from tests.conformance.witness import Token

CONNECTED, FILTERED = "connected", "filtered "
"""The second is followed by the address of the filter's listener."""
_WAIT_S = 5

# Source: include/uapi/linux/in.h, in6.h, tcp.h and socket.h
IPPROTO_MPTCP = 262
TCP_FASTOPEN_CONNECT = 30
IP_PKTINFO = 8
IPV6_PKTINFO = 50

_libc = ctypes.CDLL(None, use_errno=True)


def outcome(attempt: Attempt, one: socket.socket) -> str:
    """``connected`` when the peer was reached, ``filtered 127.169.T.F`` for a filter, else the name of the errno."""
    try:
        FORMS[attempt.form](one, attempt)
        return _greeting(one, attempt) if attempt.greeted else CONNECTED
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, repr(error))
    finally:
        one.close()


def _greeting(one: socket.socket, attempt: Attempt) -> str:
    """What the peer is. An endpoint closes without a word. getpeername(2) never shows the filter."""
    shown = one.getpeername()[0]
    one.setblocking(True)
    try:
        words = one.recv(64).decode()
    except ConnectionResetError:
        words = ""
    if not words:
        return CONNECTED
    is_shown = int(ipaddress.ip_address(attempt.to)) & 0xFFFFFFFF == 0 or shown == attempt.to
    return f"{FILTERED}{words}" if is_shown else f"{FILTERED}{words}, and getpeername says {shown}"


def make_socket(attempt: Attempt) -> socket.socket:
    """A blocking socket with a timeout, bound as the attempt says."""
    ipv6 = ":" in attempt.to or "ipv6-socket" in attempt.form
    datagram = attempt.form.startswith("udp")
    one = socket.socket(
        socket.AF_INET6 if ipv6 else socket.AF_INET,
        socket.SOCK_DGRAM if datagram else socket.SOCK_STREAM,
        IPPROTO_MPTCP if attempt.form == "mptcp" else 0,
    )
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        one.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", _WAIT_S, 0))
    if attempt.device:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
    if attempt.bind is not None:
        one.bind(sockaddr(attempt.bind, 0))
    return one


def _destination(attempt: Attempt) -> tuple[Any, ...]:
    return sockaddr(attempt.to, attempt.port)


def _open_address(attempt: Attempt) -> tuple[Any, ...]:
    """Loopback in the family of the attempt. Nobody locks it."""
    return sockaddr((IPV6 if ":" in attempt.to else IPV4).loopback, attempt.port)


def _packed(attempt: Attempt) -> bytes:
    """The address as a struct sockaddr_in or sockaddr_in6 (ip(7), ipv6(7))."""
    address = ipaddress.ip_address(attempt.to)
    if address.version == 4:
        return struct.pack("=H", socket.AF_INET) + struct.pack("!H", attempt.port) + address.packed + bytes(8)
    scope = LOOPBACK_INDEX if address.is_link_local else 0
    head = struct.pack("=H", socket.AF_INET6) + struct.pack("!HI", attempt.port, 0)
    return head + address.packed + struct.pack("=I", scope)


def _raw(name: str, *arguments: object) -> int:
    result = int(getattr(_libc, name)(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


# --- TCP ------------------------------------------------------------------------------------------------------------


def _connect(one: socket.socket, attempt: Attempt) -> None:
    one.connect(_destination(attempt))


def _nonblocking(one: socket.socket, attempt: Attempt) -> None:
    one.setblocking(False)
    number = one.connect_ex(_destination(attempt))
    if number == errno.EINPROGRESS:
        if not select.select([], [one], [], _WAIT_S)[1]:
            raise TimeoutError(errno.ETIMEDOUT, "no answer")
        number = one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        raise OSError(number, os.strerror(number))


def _fastopen_sendto(one: socket.socket, attempt: Attempt) -> None:
    """Sends data in the SYN without connect(2). A refusal by the peer is reported by the same call."""
    one.sendto(b"?", socket.MSG_FASTOPEN, _destination(attempt))


def _fastopen_connect(one: socket.socket, attempt: Attempt) -> None:
    """connect(2) sends nothing yet (TCP_FASTOPEN_CONNECT in tcp(7)); send(2) sends data in the SYN."""
    one.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
    one.connect(_destination(attempt))
    one.send(b"?")


def _after_unspec(one: socket.socket, attempt: Attempt) -> None:
    """Connects to an open address, disconnects with AF_UNSPEC (connect(2)), then connects to the destination."""
    one.connect(_open_address(attempt))
    _raw("connect", one.fileno(), struct.pack("=H14x", socket.AF_UNSPEC), 16)
    one.connect(_destination(attempt))


def _ring(one: socket.socket, attempt: Attempt, *, flags: int = 0, sqpoll: bool = False) -> None:
    ring = uring.Ring(sqpoll=sqpoll)
    try:
        ring.connect(one.fileno(), _packed(attempt), flags=flags)
    finally:
        ring.close()


def _ring_worker(one: socket.socket, attempt: Attempt) -> None:
    """A worker thread of the kernel connects."""
    _ring(one, attempt, flags=uring.IOSQE_ASYNC)


def _ring_sqpoll(one: socket.socket, attempt: Attempt) -> None:
    """The kernel thread that polls the submission queue connects."""
    _ring(one, attempt, sqpoll=True)


# --- UDP ------------------------------------------------------------------------------------------------------------


def _sent(send: Callable[[bytes], object]) -> None:
    """Sends a token and waits until a listener has it. A packet filter that denies does not fail connect(2)."""
    with Token() as token:
        send(token.payload)
        token.wait()


def _udp_connect(one: socket.socket, attempt: Attempt) -> None:
    one.connect(_destination(attempt))
    _sent(one.send)


def _udp_after_unspec(one: socket.socket, attempt: Attempt) -> None:
    _after_unspec(one, attempt)
    _sent(one.send)


def _udp_sendto(one: socket.socket, attempt: Attempt) -> None:
    _sent(lambda payload: one.sendto(payload, _destination(attempt)))


def _udp_sendto_on_connected(one: socket.socket, attempt: Attempt) -> None:
    """Connects to an open address, then sends a datagram to the destination."""
    one.connect(_open_address(attempt))
    _sent(lambda payload: one.sendto(payload, _destination(attempt)))


def _udp_sendmsg_on_connected(one: socket.socket, attempt: Attempt) -> None:
    one.connect(_open_address(attempt))
    _sent(lambda payload: one.sendmsg([payload], [], 0, _destination(attempt)))


class _MessageHeader(ctypes.Structure):
    """struct mmsghdr (sendmmsg(2))."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("name_length", ctypes.c_uint32),
        ("vector", ctypes.c_void_p),
        ("vector_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("pad", ctypes.c_uint32),
        ("sent", ctypes.c_uint32),
    ]


class _Vector(ctypes.Structure):
    """struct iovec (readv(2))."""

    _fields_ = [("base", ctypes.c_char_p), ("length", ctypes.c_size_t)]


def _udp_sendmmsg(one: socket.socket, attempt: Attempt) -> None:
    """Sends two messages in one call, the first to an open address.

    When the second message fails, sendmmsg(2) returns 1 and no errno. The second message is then sent alone, which
    gives the errno.
    """
    open_address = Attempt(_open_address(attempt)[0], attempt.port)
    with Token() as first, Token() as second:
        pairs = [(_packed(open_address), first.payload), (_packed(attempt), second.payload)]
        vectors = [_Vector(payload, len(payload)) for _, payload in pairs]
        headers = (_MessageHeader * 2)(
            *(_MessageHeader(name, len(name), ctypes.addressof(vector), 1) for (name, _), vector in zip(pairs, vectors))
        )
        sent = _raw("sendmmsg", one.fileno(), headers, 2, 0)
        first.wait()
        if sent == 1:
            _raw("sendmmsg", one.fileno(), ctypes.byref(headers[1]), 1, 0)
        second.wait()


def _ancillary(attempt: Attempt) -> tuple[int, int, bytes]:
    """An IP_PKTINFO (ip(7)) or, for an IPv6 address, an IPV6_PKTINFO (ipv6(7))."""
    info = attempt.packet_info
    if info is None:
        raise AssertionError(f"{attempt} has no packet_info")
    index = LOOPBACK_INDEX if info.interface else 0
    if ":" in attempt.to:
        source = ipaddress.ip_address(info.source or "::").packed
        return (socket.IPPROTO_IPV6, IPV6_PKTINFO, source + struct.pack("=I", index))
    source = ipaddress.ip_address(info.source or "0.0.0.0").packed
    return (socket.IPPROTO_IP, IP_PKTINFO, struct.pack("=i", index) + source + bytes(4))


def _udp_packet_info(one: socket.socket, attempt: Attempt) -> None:
    _sent(lambda payload: one.sendmsg([payload], [_ancillary(attempt)], 0, _destination(attempt)))


def _udp_connected_packet_info(one: socket.socket, attempt: Attempt) -> None:
    """Sends on a connected socket, without an address in the call."""
    one.connect(_destination(attempt))
    _sent(lambda payload: one.sendmsg([payload], [_ancillary(attempt)]))


def _udp_connect_ipv4_on_ipv6(one: socket.socket, attempt: Attempt) -> None:
    _raw("connect", one.fileno(), _packed(attempt), 16)
    _sent(one.send)


def _udp_sendto_ipv4_on_ipv6(one: socket.socket, attempt: Attempt) -> None:
    _sent(lambda payload: _raw("sendto", one.fileno(), payload, len(payload), 0, _packed(attempt), 16))


def _udp_sendto_as_unspec(one: socket.socket, attempt: Attempt) -> None:
    """The kernel treats AF_UNSPEC as AF_INET here (udp_sendmsg() in net/ipv4/udp.c)."""
    unspec = struct.pack("=H", socket.AF_UNSPEC) + _packed(attempt)[2:]
    _sent(lambda payload: _raw("sendto", one.fileno(), payload, len(payload), 0, unspec, 16))


def _udp_ring(one: socket.socket, attempt: Attempt) -> None:
    _ring(one, attempt)
    _sent(one.send)


FORMS: dict[str, Callable[[socket.socket, Attempt], None]] = {
    "connect": _connect,
    "nonblocking": _nonblocking,
    "fastopen-sendto": _fastopen_sendto,
    "fastopen-connect": _fastopen_connect,
    "mptcp": _connect,
    "io_uring": _ring,
    "io_uring-worker": _ring_worker,
    "io_uring-sqpoll": _ring_sqpoll,
    "connect-after-unspec": _after_unspec,
    "udp-connect": _udp_connect,
    "udp-connect-after-unspec": _udp_after_unspec,
    "udp-sendto": _udp_sendto,
    "udp-sendto-on-connected": _udp_sendto_on_connected,
    "udp-sendmsg-on-connected": _udp_sendmsg_on_connected,
    "udp-sendmmsg": _udp_sendmmsg,
    "udp-sendmsg-pktinfo": _udp_packet_info,
    "udp-connected-pktinfo": _udp_connected_packet_info,
    "udp-connect-ipv4-on-ipv6-socket": _udp_connect_ipv4_on_ipv6,
    "udp-sendto-ipv4-on-ipv6-socket": _udp_sendto_ipv4_on_ipv6,
    "udp-sendto-as-unspec": _udp_sendto_as_unspec,
    "udp-io_uring": _udp_ring,
}
