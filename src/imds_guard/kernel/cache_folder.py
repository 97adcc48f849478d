# SPDX-License-Identifier: Apache-2.0
"""A folder of files that can be made again, of root alone. What is in doubt is not there: nothing here is an error.

Whoever can put a file here decides what root loads into the kernel. So a file counts only where root alone can change
it and every folder on the way, and where it is whole.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress

from imds_guard.kernel import files, ownership

_MAX_BYTES = 4 * 1024 * 1024
"""The largest file is half a megabyte."""
_KEPT = 32
"""Files that stay, the newest ones. A machine has four of a version and a kernel."""
_DIGEST_BYTES = hashlib.sha256().digest_size


def key(*ingredients: object) -> str:
    """The name of the file that was made of these: 64 hexadecimal digits, others for other ingredients."""
    return hashlib.sha256(repr(ingredients).encode(errors="surrogatepass")).hexdigest()


class CacheFolder:
    """A file is a SHA-256 of its name and content, then the content."""

    def __init__(self, path: str) -> None:
        self._path = path

    def make(self) -> None:
        """Makes the folder, where it can be made."""
        with suppress(OSError):
            os.mkdir(self._path, 0o700)

    def remove(self) -> None:
        """Removes the folder and all files in it, where they can be removed."""
        with suppress(OSError):
            for name in os.listdir(self._path):
                os.unlink(os.path.join(self._path, name))
            os.rmdir(self._path)

    def read(self, name: str) -> bytes | None:
        """The content; None where there is no such file that root alone can have written, whole."""
        path = os.path.join(self._path, name)
        try:
            if os.geteuid() != 0 or ownership.others_can_change(path, lasting=True) is not None:
                return None
            text = _read(path)
        except OSError:
            return None
        digest, content = text[:_DIGEST_BYTES], text[_DIGEST_BYTES:]
        return content if digest == _digest(name, content) else None

    def write(self, name: str, content: bytes) -> None:
        """Tries to. A read-only or full disk, or a folder that others can change, gets nothing."""
        if os.geteuid() != 0:
            return
        self.make()
        with suppress(OSError):
            if ownership.others_can_change(self._path, lasting=True) is None:
                files.replace(os.path.join(self._path, name), _digest(name, content) + content)
                self._forget_the_oldest()

    def _forget_the_oldest(self) -> None:
        found = [entry for entry in os.scandir(self._path) if entry.is_file(follow_symlinks=False)]
        for entry in sorted(found, key=lambda one: one.stat(follow_symlinks=False).st_mtime_ns)[:-_KEPT]:
            os.unlink(entry.path)


def _read(path: str) -> bytes:
    """Raises OSError, also for what is not a file of one name."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or not ownership.only_root_can_write(found):
            raise OSError("it is not a file of root alone")
        return file.read(_MAX_BYTES)


def _digest(name: str, content: bytes) -> bytes:
    return hashlib.sha256(f"{name}\n".encode() + content).digest()
