# SPDX-License-Identifier: Apache-2.0
"""Reads regular files alone, and replaces a file in one step."""

from __future__ import annotations

import os
import stat

MAX_BYTES = 16 * 1024 * 1024
"""The largest file that is read. A configuration of 100,000 users has 2 MiB."""


def read_regular(path: str, maximum: int = MAX_BYTES) -> bytes:
    """The content of a regular file, or of the one that a symbolic link leads to. Raises OSError, also for other kinds.

    A FIFO or a device could make the reader wait, and a device could do something when it is opened.
    """
    _require_regular(os.stat(path))
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb") as file:
        _require_regular(os.fstat(file.fileno()))
        content = file.read(maximum + 1)
    if len(content) > maximum:
        raise OSError(f"it has more than {maximum // 1024 // 1024} MiB")
    return content


def _require_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is not a regular file")


def replace(path: str, content: bytes, *, like: os.stat_result | None = None) -> None:
    """Writes ``content`` to ``path``; it is on the disk when this returns. Raises OSError.

    A reader sees the old file or the new one, also after a crash: rename(2). On failure the old file is unchanged. The
    new file has mode 0644, or owner, group and mode of ``like``.
    """
    import tempfile  # noqa: PLC0415 -- start-up time: it is slow to import, and few commands write

    folder, name = os.path.split(os.path.abspath(path))
    # Programs that read all files of a suffix (node_exporter *.prom, systemd *.service) do not see the unfinished one.
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".new")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            if like is not None:
                os.fchown(file.fileno(), like.st_uid, like.st_gid)
            os.fchmod(file.fileno(), 0o644 if like is None else stat.S_IMODE(like.st_mode))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
