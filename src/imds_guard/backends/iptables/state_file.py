# SPDX-License-Identifier: Apache-2.0
"""A file that says which rules should be in force in this network namespace, and the lock of our commands.

After someone's ``iptables -F; iptables -X`` nothing in the kernel shows that rules are missing.
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


class StateFile:
    """The file of the network namespace that the calling thread is in. Its name begins with ``kind``."""

    def __init__(self, folder: str = STATE_FOLDER, kind: str = "iptables") -> None:
        self.folder = folder
        self.kind = kind

    def read(self) -> str:
        """The text that was written. "" when there is no file."""
        try:
            with open(self._path(), encoding="ascii") as file:
                return file.read().strip()
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise GuardError(f"could not read {self._path()}: {system_text(error)}") from error

    def write(self, text: str) -> None:
        """Says what should be in force. Must come before the first rule. With "" the file is removed."""
        if not text:
            self.remove()
            return
        with _explained("could not write", self._path()):
            os.makedirs(self.folder, 0o700, exist_ok=True)
            try:
                with open(self._temporary(), "w", encoding="ascii") as file:
                    file.write(text + "\n")
                os.replace(self._temporary(), self._path())
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(self._temporary())
                raise

    def remove(self) -> None:
        """Says that nothing should be in force. Must come after the last rule is gone."""
        for path in (self._temporary(), self._path()):  # a command that was killed may have left the first
            with _explained("could not remove", path), contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def locked(self) -> AbstractContextManager[None]:
        """One command of ours at a time reads and changes rules. Another one waits."""
        return exclusive(self.kind)

    def _temporary(self) -> str:
        return self._path() + ".new"

    def _path(self) -> str:
        return os.path.join(self.folder, f"{self.kind}-{_namespace_id()}")


def _namespace_id() -> str:
    """Unique among all network namespaces of this boot. Before Linux 5.14: among those that exist now."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        (cookie,) = struct.unpack("=Q", one.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))
        return f"netns-{cookie}"
    return f"inode-{os.stat('/proc/thread-self/ns/net').st_ino}"


@contextlib.contextmanager
def _explained(what: str, path: str) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise NotPermitted(f"{what} {path}: {system_text(error)}; run it as root") from error
    except OSError as error:
        raise GuardError(f"{what} {path}: {system_text(error)}") from error
