# SPDX-License-Identifier: Apache-2.0
"""One line to the journal, or to the syslog daemon where there is no journal. The only module that writes to either.

Source: systemd, "Native Journal Protocol"; RFC 3164 for /dev/log.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from imds_guard.errors import GuardError, system_text
from imds_guard.text import escaped

JOURNAL = "/run/systemd/journal/socket"
SYSLOG = "/dev/log"
IDENTIFIER = "imds-guard"
MAX_BYTES = 8000
"""Of the message. rsyslog cuts lines at 8 KiB by default."""

_NOTICE = 5
_AUTHPRIV = 10  # syslog(3)


def log(message: str, fields: Mapping[str, str]) -> bool:
    """Sends one line; False where nothing listens. The journal gets ``fields``, too, with names like ``IMDS_GUARD_X``.

    Control characters are escaped here. Raises GuardError where the daemon does not take it.
    """
    line = _plain(message)
    entry = {"MESSAGE": line, "PRIORITY": str(_NOTICE), "SYSLOG_IDENTIFIER": IDENTIFIER}
    entry.update(SYSLOG_FACILITY=str(_AUTHPRIV), **fields)
    native = "".join(f"{name}={_plain(value)}\n" for name, value in entry.items())
    full: list[str] = []
    for path, text in ((JOURNAL, native), (SYSLOG, f"<{_AUTHPRIV * 8 + _NOTICE}>{IDENTIFIER}[{os.getpid()}]: {line}")):
        try:
            if _send(path, text.encode("utf-8", "backslashreplace")):
                return True
        except BlockingIOError:
            full.append(path)
    if full:
        raise GuardError(f"logging to {' and '.join(full)}: the queue is full")
    return False


def _plain(text: str) -> str:
    """Without line ends or other control characters, and of bounded length."""
    content = escaped(text).encode("utf-8", "backslashreplace")
    return content[:MAX_BYTES].decode("utf-8", "ignore")


def _send(path: str, content: bytes) -> bool:
    """False where nothing listens at ``path``. Raises BlockingIOError where the daemon's queue is full.

    Everybody may fill that queue, and whoever logs holds the commands' lock. So nothing here waits. With systemd the
    two sockets have a queue each.
    """
    import socket  # noqa: PLC0415 -- start-up time

    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as one:
            one.connect(path)
            one.sendall(content)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        return False
    except BlockingIOError:
        raise
    except OSError as error:
        raise GuardError(f"logging to {path}: {system_text(error)}") from error
    return True
