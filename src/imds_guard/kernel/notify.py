# SPDX-License-Identifier: Apache-2.0
"""What a service tells systemd: a datagram to the socket that $NOTIFY_SOCKET names (sd_notify(3))."""

from __future__ import annotations

import os
import socket

from imds_guard.errors import GuardError, system_words

VARIABLE = "NOTIFY_SOCKET"


def ready(status: str = "") -> bool:
    """Tells that the service has started, with a line for ``systemctl status``; False when nobody asked."""
    return notify("READY=1" + (f"\nSTATUS={status}" if status else ""))


def notify(state: str) -> bool:
    """Sends assignments, one a line (``STATUS=...``, ``STOPPING=1``); False when nobody asked. Raises GuardError."""
    name = os.environ.get(VARIABLE, "")
    if not name:
        return False
    # A name that begins with @ is in Linux' abstract namespace (unix(7)), where it begins with an octet 0.
    address = "\0" + name[1:] if name.startswith("@") else name
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as one:
            one.connect(address)
            one.sendall(state.encode())
    except OSError as error:
        raise GuardError(
            f"telling the service manager {state.splitlines()[0]!r} at {name}: {system_words(error)}; run it by "
            f"systemctl, or without {VARIABLE} in its environment"
        ) from error
    return True
