# SPDX-License-Identifier: Apache-2.0
"""Messages between the service and the commands: JSON in packets of a Unix socket, with descriptors beside it.

The commands run as root, and the service does not. So what it says is read with bounds.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from imds_guard.errors import GuardError
from imds_guard.kernel import lockfile
from imds_guard.policy.filters import FILTER_SOCKET

MAX_BYTES = 192 * 1024
"""Of one packet; the default send buffer takes 208 KiB (net.core.wmem_default)."""
ROWS_OF_A_PACKET = 100


def socket_path() -> str:
    """Where the service listens for the commands. Others than root can't open the folder."""
    return os.path.join(lockfile.FOLDER, FILTER_SOCKET)


def packed(values: dict[str, Any]) -> bytes:
    """A packet."""
    import json  # noqa: PLC0415 -- start-up time: most policies have no filters

    return json.dumps(values, separators=(",", ":")).encode()


def unpacked(packet: bytes) -> dict[str, Any]:
    """The values in a packet. Raises GuardError."""
    import json  # noqa: PLC0415

    try:
        values = json.loads(packet)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise GuardError("reading a message between the filter and a command: it is malformed; start the filter again")
    return values


def receive(connection: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """A message and its descriptors; None when the other side has closed. Raises GuardError, OSError."""
    packet, fds, flags, _ = socket.recv_fds(connection, MAX_BYTES, 1)
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise GuardError("reading a message between the filter and a command: it is too long")
        return (unpacked(packet) if packet else None), fds
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
