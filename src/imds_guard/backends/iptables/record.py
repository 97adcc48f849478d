# SPDX-License-Identifier: Apache-2.0
"""One file that says "rules should be in force in this network namespace", and the lock that our commands take.

Someone's ``iptables -F; iptables -X`` leaves nothing in the kernel that could tell that anything is missing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from typing import Iterator

from imds_guard.errors import GuardError, NotPermitted, system_words

STATE_FOLDER = "/run/imds-guard"

# Since Linux e8b9eab99232 ("net: retrieve netns cookie via getsocketopt") (in v5.14).
_SO_NETNS_COOKIE = 71


class Record:
    """The record of the network namespace that the calling thread is in."""

    def __init__(self, folder: str = STATE_FOLDER) -> None:
        self.folder = folder

    def exists(self) -> bool:
        """True when rules were applied here and not removed by us."""
        return os.path.exists(self._path())

    def write(self) -> None:
        """Says that rules are to be in force. Comes before the first rule."""
        with _told("could not write", self._path()):
            os.makedirs(self.folder, 0o755, exist_ok=True)
            with open(self._path(), "w", encoding="ascii"):
                return

    def remove(self) -> None:
        """Takes that back. Comes behind the last rule."""
        with _told("could not remove", self._path()), contextlib.suppress(FileNotFoundError):
            os.unlink(self._path())

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One command of ours at a time reads and changes rules; another one waits."""
        path = os.path.join(self.folder, "iptables.lock")
        with _told("could not open the lock", path):
            os.makedirs(self.folder, 0o755, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _path(self) -> str:
        return os.path.join(self.folder, f"iptables-{namespace_word()}")


def namespace_word() -> str:
    """A word that no other network namespace of this boot has, or, before Linux 5.14, none that lives now."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        (cookie,) = struct.unpack("=Q", one.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))
        return f"netns-{cookie}"
    return f"inode-{os.stat('/proc/thread-self/ns/net').st_ino}"


@contextlib.contextmanager
def _told(what: str, path: str) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise NotPermitted(f"{what} {path}: {system_words(error)}; run it as root") from error
    except OSError as error:
        raise GuardError(f"{what} {path}: {system_words(error)}") from error
