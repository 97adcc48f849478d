# SPDX-License-Identifier: Apache-2.0
"""On which interface the peer of an accepted TCP connection is (ip(7), IP_PKTINFO)."""

from __future__ import annotations

import socket
import struct

# Source: include/uapi/linux/in.h. The socket module has no names for them.
_IP_PKTINFO, _IP_PKTOPTIONS = 8, 9
_HEADER = struct.Struct("@Nii")  # struct cmsghdr: length, level, type
_PKTINFO = struct.Struct("=i4s4s")  # struct in_pktinfo: interface, two addresses


def report_arrivals(listener: socket.socket) -> None:
    """Makes arrival_interface() work for what this socket accepts. Call it before listen(2)."""
    listener.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)


def arrival_interface(accepted: socket.socket) -> int:
    """The index of the interface on which the connection came; 0 where the kernel does not say.

    do_ip_getsockopt() in Linux net/ipv4/ip_sockglue.c: for a TCP socket, IP_PKTOPTIONS gives what the handshake left.
    """
    options = accepted.getsockopt(socket.IPPROTO_IP, _IP_PKTOPTIONS, 256)
    while len(options) >= _HEADER.size:
        length, level, kind = _HEADER.unpack_from(options)
        if length < _HEADER.size:
            break
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO) and length >= _HEADER.size + _PKTINFO.size:
            return int(_PKTINFO.unpack_from(options, _HEADER.size)[0])
        options = options[length + 7 & ~7 :]
    return 0
