# SPDX-License-Identifier: Apache-2.0
"""Replaces a file in one step."""

from __future__ import annotations

import os


def replace(path: str, content: bytes) -> None:
    """Writes ``content`` to ``path`` with mode 0644; it is on the disk when this returns. Raises OSError.

    A reader sees the old file or the new one, also after a crash: rename(2). On failure the old file is unchanged.
    """
    import tempfile  # noqa: PLC0415 -- start-up time: it is slow to import, and few commands write

    folder, name = os.path.split(os.path.abspath(path))
    # Programs that read all files of a suffix (node_exporter *.prom, systemd *.service) do not see the unfinished one.
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".new")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o644)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
