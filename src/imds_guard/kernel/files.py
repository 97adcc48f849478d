# SPDX-License-Identifier: Apache-2.0
"""A file that is written in one step."""

from __future__ import annotations

import os


def replace(path: str, content: bytes) -> None:
    """Makes ``content`` what the file ``path`` holds, mode 0644, on the disk when this returns. Raises OSError.

    A reader sees the old file or the new one, also after a crash: rename(2). What stays of a failure is the old one.
    """
    import tempfile  # noqa: PLC0415 -- start-up time: it is slow to import, and few commands write

    folder, name = os.path.split(os.path.abspath(path))
    # Who reads every file of a kind (node_exporter *.prom, systemd *.service) passes the unfinished one by.
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
