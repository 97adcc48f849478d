# SPDX-License-Identifier: Apache-2.0
"""The program of a process, and the names of users and groups.

A process may be gone when it is looked up, and it chooses most of this itself. The result is only printed: no decision
rests on it.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, NamedTuple

from imds_guard.identity import group_name, user_name

if TYPE_CHECKING:
    import psutil

MAX_COMMAND_LINE = 512
_MAX_CACHED = 1024
_CACHED_FOR_S = 60.0
_START_TIME_SLACK_S = 1.5
"""psutil computes a start time from a boot time in whole seconds, so a process may seem to start after it connected."""


# --- the program ----------------------------------------------------------------------------------------------------


class ProcessInfo(NamedTuple):
    """What a process runs now. None for what can't be read."""

    exe: str | None = None
    command_line: str | None = None


UNKNOWN = ProcessInfo()


def program_of(pid: int, seen_at: float) -> ProcessInfo:
    """The program of a process; UNKNOWN when it has ended, or started after ``seen_at`` (seconds since the epoch)."""
    try:
        import psutil  # noqa: PLC0415 -- start-up time: nothing else needs it
    except ImportError:
        return UNKNOWN
    try:
        process = psutil.Process(pid)
        if process.create_time() > seen_at + _START_TIME_SLACK_S:
            return UNKNOWN
        return ProcessInfo(_exe(process), _command_line(process))
    except (psutil.Error, OSError):
        return UNKNOWN


def _exe(process: psutil.Process) -> str | None:
    """None where the kernel does not let us read it (ptrace(2))."""
    import psutil  # noqa: PLC0415

    try:
        return process.exe() or None
    except psutil.AccessDenied:
        return None


def _command_line(process: psutil.Process) -> str | None:
    text = " ".join(process.cmdline())
    if len(text) > MAX_COMMAND_LINE:
        text = text[:MAX_COMMAND_LINE] + "..."
    return text or None


# --- names ----------------------------------------------------------------------------------------------------------


class NameCache:
    """Names of users and groups. Each is looked up at most once a minute: a name service may be slow."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], tuple[float, str]] = {}

    def user(self, uid: int) -> str:
        """The name, or the number where there is no account."""
        return self._look_up("user", uid)

    def group(self, gid: int) -> str:
        """The name, or the number where there is no group entry."""
        return self._look_up("group", gid)

    def _look_up(self, kind: str, number: int) -> str:
        now = time.monotonic()
        looked_up, name = self._known.get((kind, number), (-_CACHED_FOR_S, ""))
        if now - looked_up >= _CACHED_FOR_S:
            name = user_name(number) if kind == "user" else group_name(number)
            if len(self._known) >= _MAX_CACHED:
                self._known.clear()
            self._known[kind, number] = (now, name)
        return name


# --- text from the kernel and from file systems ---------------------------------------------------------------------


def decoded(raw: bytes) -> str:
    """Decodes UTF-8; any other byte becomes an escape such as ``\\xff``."""
    return raw.decode(errors="backslashreplace")


def os_text(text: str) -> str:
    """Text as Python's os functions return it, with ``\\xff`` in place of each byte that is not UTF-8."""
    return decoded(os.fsencode(text))
