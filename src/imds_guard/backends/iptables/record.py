# SPDX-License-Identifier: Apache-2.0
"""One file that says which rules should be in force in this network namespace, and the lock that our commands take.

Someone's ``iptables -F; iptables -X`` leaves nothing in the kernel that could tell that anything is missing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager

from imds_guard.errors import GuardError, NotPermitted, system_text
from imds_guard.kernel.lockfile import FOLDER, exclusive

STATE_FOLDER = FOLDER

# Since Linux e8b9eab99232 ("net: retrieve netns cookie via getsocketopt") (in v5.14).
_SO_NETNS_COOKIE = 71


class Record:
    """The record of the network namespace that the calling thread is in; ``kind`` is the first word of its name."""

    def __init__(self, folder: str = STATE_FOLDER, kind: str = "iptables") -> None:
        self.folder = folder
        self.kind = kind

    def read(self) -> str:
        """The word that was written; "" when there is no record."""
        try:
            with open(self._path(), encoding="ascii") as file:
                return file.read().strip()
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise GuardError(f"could not read {self._path()}: {system_text(error)}") from error

    def write(self, word: str) -> None:
        """Notes what is to be in force. Comes before the first rule."""
        with _told("could not write", self._path()):
            os.makedirs(self.folder, 0o700, exist_ok=True)
            try:
                with open(self._beside(), "w", encoding="ascii") as file:
                    file.write(word + "\n")
                os.replace(self._beside(), self._path())
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(self._beside())
                raise

    def remove(self) -> None:
        """Notes that nothing is to be in force. Comes behind the last rule."""
        for path in (self._beside(), self._path()):  # a command that was killed may have left the first
            with _told("could not remove", path), contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def locked(self) -> AbstractContextManager[None]:
        """One command of ours at a time reads and changes rules; another one waits."""
        return exclusive(self.kind)

    def _beside(self) -> str:
        return self._path() + ".new"

    def _path(self) -> str:
        return os.path.join(self.folder, f"{self.kind}-{namespace_word()}")


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
        raise NotPermitted(f"{what} {path}: {system_text(error)}; run it as root") from error
    except OSError as error:
        raise GuardError(f"{what} {path}: {system_text(error)}") from error
