# SPDX-License-Identifier: Apache-2.0
"""Whether connection tracking is in use in this network namespace. Asking does not switch it on."""

from __future__ import annotations

import socket

# Source: include/uapi/linux/netfilter_ipv4.h, SO_ORIGINAL_DST, and netfilter_ipv6/ip6_tables.h, IP6T_SO_ORIGINAL_DST.
_ORIGINAL_DST = 80
_SOCKADDR_BYTES = 28
"""struct sockaddr_in6 (ipv6(7)); the one of IPv4 is shorter."""
_TIMEOUT_S = 1.0

_LOOPBACK = {
    4: (socket.AF_INET, "127.0.0.1", socket.IPPROTO_IP),
    6: (socket.AF_INET6, "::1", socket.IPPROTO_IPV6),
}


def tracks(version: int) -> bool:
    """True when connections of IP ``version`` 4 or 6 are tracked here.

    It is tried with a connection over the loopback interface. getsockopt() finds its entry, or says ENOENT where nobody
    tracks, and ENOPROTOOPT where the kernel has no conntrack: getorigdst() in Linux net/netfilter/nf_conntrack_proto.c.
    False also where no such connection can be made.
    """
    family, address, level = _LOOPBACK[version]
    try:
        with socket.socket(family) as listener, socket.socket(family) as client:
            listener.bind((address, 0))
            listener.listen(1)
            client.settimeout(_TIMEOUT_S)
            client.connect(listener.getsockname()[:2])
            client.getsockopt(level, _ORIGINAL_DST, _SOCKADDR_BYTES)
    except OSError:
        return False
    return True
