# SPDX-License-Identifier: Apache-2.0
"""Which end made a TCP connection, from the counters that the kernel keeps of it.

The kernel does not record who connected, and whatever it does record of that (the port, the bind, the listener beside
it) a process can arrange for a connection of its own. The sequence numbers remain. The SYN of a connect takes one, so
the peer's answer to it counts as one acknowledged byte that was never sent as data: tcp_rcv_synsent_state_process() and
tcp_snd_una_update() in net/ipv4/tcp_input.c. The SYN of an accepted connection was sent before the socket existed:
tcp_create_openreq_child() in net/ipv4/tcp_minisocks.c begins behind it.

So a connection without an acknowledged byte was accepted. Where data was sent, the acknowledged bytes are those of the
data, or one more. A sender can blur that: data that the network device refuses counts as sent each time
(__tcp_transmit_skb() in net/ipv4/tcp_output.c). But each time it counts as a segment, too, and no acknowledged segment
stands against it. Hence the comparison of segments, and none of a connection that has retransmitted, is closing, or has
data on its way. It needs SACK: otherwise duplicate acknowledgements count as delivered segments (tcp_add_reno_sack()).

TCP_REPAIR makes connections without a SYN. It takes CAP_NET_ADMIN.
"""

from __future__ import annotations

import struct

_ESTABLISHED, _CLOSE_WAIT = 1, 8
"""States in which no FIN was sent: it would count as an acknowledged byte, too."""
_SACK = 2
"""TCPI_OPT_SACK."""

_INFO = struct.Struct("=B4xB18xI72xI16xQ28xI32xI4xQQ")
"""struct tcp_info in include/uapi/linux/tcp.h, as it is since Linux 4.19."""


def was_accepted(info: bytes) -> bool:
    """True only where the peer made the connection for certain. ``info`` is a struct tcp_info."""
    if len(info) < _INFO.size:
        return False
    state, options, unacked, retransmitted, acked, segments, delivered, sent, sent_again = _INFO.unpack_from(info)
    if state not in (_ESTABLISHED, _CLOSE_WAIT):
        return False
    if acked == 0:
        return True
    quiet = not (unacked or retransmitted or sent_again)
    # Its SYN counts as one delivered segment at either end.
    return bool(options & _SACK) and quiet and acked == sent and delivered == segments + 1
