# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is to look for open connections: that of the last command that changed the policy.

It looks for them when it has released the commands' lock. So it may be ended by a signal, or overtaken by another
command. The file beside the lock says which change was the last one, and whether connections were looked for since.
"""

from __future__ import annotations

import os
from contextlib import suppress
from enum import Enum
from typing import NamedTuple

from imds_guard.kernel import lockfile

MACHINE_LOCK = "command"
UNTIL = "until"
"""The suffix of the file beside the lock that says what allow --for has allowed."""


def lock_name(cgroup: str | None) -> str:
    """The name of the commands' lock, and of the files beside it."""
    if cgroup is not None:
        # A cgroup that can't be used is an error of the backend.
        with suppress(OSError):
            return lock_name_of_id(os.stat(cgroup).st_ino)
    return MACHINE_LOCK


def lock_name_of_id(cgroup_id: int) -> str:
    """lock_name() of the cgroup with this ID."""
    return f"{MACHINE_LOCK}-{cgroup_id}"


class Duty(Enum):
    """What the last change left to do."""

    NONE = "none"
    LOOK = "look"
    """Open connections have to be looked for."""
    KEEP = "keep"
    """Open connections stay: --keep-existing."""


class Turn(NamedTuple):
    """One command's change."""

    path: str
    token: str

    def is_last(self) -> bool:
        """False when another command has changed the policy."""
        return _read(self.path)[0] == self.token

    def finish(self) -> None:
        """Notes that connections were looked for. Harmless for a command that was overtaken.

        The time of the file stays that of the change.
        """
        if self.token and _read(self.path) == (self.token, Duty.LOOK):
            _write(self.path, f"{self.token} {Duty.NONE.value}", _changed_at(self.path))


def take(name: str, duty: Duty) -> Turn:
    """Notes a change. The caller holds the commands' lock ``name``.

    Where the file can't be written every command takes itself for the last one.
    """
    turn = Turn(_path(name), os.urandom(8).hex())
    if not _write(turn.path, f"{turn.token} {duty.value}"):
        return turn._replace(token="")
    return turn


def last(name: str) -> Turn:
    """The turn of the last change, for another command that looks once more."""
    path = _path(name)
    return Turn(path, _read(path)[0])


def last_duty(name: str) -> Duty:
    """What the last change has left to do."""
    return _read(_path(name))[1]


def changed_at(name: str) -> float | None:
    """When the last change was made, in seconds since the epoch. None where nobody knows."""
    return _changed_at(_path(name))


def forget(name: str) -> None:
    """Removes the file: nothing is in force any more. A search that goes on then ends."""
    with suppress(OSError):
        os.unlink(_path(name))


def _path(name: str) -> str:
    return os.path.join(lockfile.FOLDER, f"{name}.last")


def _read(path: str) -> tuple[str, Duty]:
    try:
        with open(path, encoding="ascii") as file:
            token, duty = file.read(64).split()
        return token, Duty(duty)
    except (OSError, ValueError):
        return "", Duty.NONE


def _changed_at(path: str) -> float | None:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return None


def _write(path: str, text: str, changed_at: float | None = None) -> bool:
    """A reader sees the old text or the new one. ``changed_at`` is the time of the file; None: now."""
    try:
        with open(f"{path}.new", "w", encoding="ascii", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            os.fchmod(file.fileno(), 0o600)  # the umask may have taken more
            file.write(text)
        if changed_at is not None:
            os.utime(f"{path}.new", (changed_at, changed_at))
        os.replace(f"{path}.new", path)
    except OSError:
        return False
    return True
