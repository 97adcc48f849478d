# SPDX-License-Identifier: Apache-2.0
"""The commands' lock stays exclusive when its file is removed at the wrong moment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imds_guard.kernel import lockfile

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the folder of the lock must belong to root")


def test_a_lock_on_a_file_that_is_no_longer_there_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command before removes its file after this one has opened it. The next command must find this one's lock."""
    monkeypatch.setattr(lockfile, "FOLDER", str(tmp_path))
    take = lockfile._take
    removed: list[str] = []

    def take_late(fd: int, name: str) -> bool:
        if not removed:
            lockfile.forget(name)
            removed.append(name)
        return take(fd, name)

    monkeypatch.setattr(lockfile, "_take", take_late)
    with lockfile.exclusive("command-1"):
        assert removed == ["command-1"]
        assert lockfile.attempt("command-1") is None
    fd = lockfile.attempt("command-1")
    assert fd is not None
    os.close(fd)
