# SPDX-License-Identifier: Apache-2.0
"""Sends the state of a service to systemd: a datagram to the socket in $NOTIFY_SOCKET (sd_notify(3))."""

from __future__ import annotations

import os
import socket

from imds_guard.errors import GuardError, system_text

VARIABLE = "NOTIFY_SOCKET"


def ready(status: str = "") -> bool:
    """Reports that the service has started, with a line for ``systemctl status``; False without $NOTIFY_SOCKET."""
    return notify("READY=1" + (f"\nSTATUS={status}" if status else ""))


def notify(state: str) -> bool:
    """Sends lines such as ``STATUS=...`` or ``STOPPING=1``; False without $NOTIFY_SOCKET. Raises GuardError."""
    name = os.environ.get(VARIABLE, "")
    if not name:
        return False
    # @ stands for the zero byte with which an abstract address begins (unix(7)).
    address = "\0" + name[1:] if name.startswith("@") else name
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as one:
            one.connect(address)
            one.sendall(state.encode())
    except OSError as error:
        raise GuardError(
            f"sending {state.splitlines()[0]!r} to the service manager at {name}: {system_text(error)}; start it "
            f"with systemctl, or without {VARIABLE} in its environment"
        ) from error
    return True
