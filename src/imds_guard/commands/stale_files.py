# SPDX-License-Identifier: Apache-2.0
"""Removes what guards and watches of cgroups that are gone have left in /run/imds-guard: locks, sockets, last turns.

Commands remove such files themselves, unless they were killed, or the cgroup was removed without ``stop``. The kernel
uses no ID of a cgroup twice, so no later guard needs them.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress

from imds_guard.errors import GuardError
from imds_guard.kernel import lockfile
from imds_guard.kernel.cgroup import open_cgroup
from imds_guard.kernel.cgroup_names import is_gone

_NAME = re.compile(r"((?:command|imds-guard|watch-imds-guard)-([0-9]+))\.(?:lock|last|last\.new|sock|until)")


def remove_stale_files() -> None:
    """Whoever holds one of these locks keeps its files. Failure is ignored: such a file is harmless."""
    with suppress(OSError, GuardError):
        found: dict[tuple[str, int], list[str]] = {}
        for match in filter(None, map(_NAME.fullmatch, os.listdir(lockfile.FOLDER))):
            found.setdefault((match[1], int(match[2])), []).append(match[0])
        if found:
            _remove(found)


def _remove(found: dict[tuple[str, int], list[str]]) -> None:
    with open_cgroup() as root:
        for (lock, cgroup_id), files in found.items():
            if is_gone(root.fd, cgroup_id):
                _remove_files(lock, files)


def _remove_files(lock: str, files: list[str]) -> None:
    fd = lockfile.attempt(lock)
    if fd is None:
        return
    try:
        for file in files:
            with suppress(OSError):
                os.unlink(os.path.join(lockfile.FOLDER, file))
        lockfile.forget(lock)
    finally:
        os.close(fd)
