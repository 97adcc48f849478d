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
WAIT_S = 1.0
"""The daemon's queue can be full: everybody may write to it. Whoever logs must not wait for that long."""
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
    for path, text in ((JOURNAL, native), (SYSLOG, f"<{_AUTHPRIV * 8 + _NOTICE}>{IDENTIFIER}[{os.getpid()}]: {line}")):
        if _send(path, text.encode("utf-8", "backslashreplace")):
            return True
    return False


def _plain(text: str) -> str:
    """Without line ends or other control characters, and of bounded length."""
    content = escaped(text).encode("utf-8", "backslashreplace")
    return content[:MAX_BYTES].decode("utf-8", "ignore")


def _send(path: str, content: bytes) -> bool:
    """False where nothing listens at ``path``."""
    import socket  # noqa: PLC0415 -- start-up time

    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as one:
            one.settimeout(WAIT_S)
            one.connect(path)
            one.sendall(content)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        return False
    except OSError as error:
        # Python before 3.10: socket.timeout is no TimeoutError.
        reason = f"it took nothing for {WAIT_S:.0f} s" if isinstance(error, socket.timeout) else system_text(error)
        raise GuardError(f"logging to {path}: {reason}") from error
    return True
