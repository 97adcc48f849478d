# SPDX-License-Identifier: Apache-2.0
"""The program of a process, and the names of users and groups.

A process may be gone when it is looked up, and it chooses most of this itself. The result is only printed: no decision
rests on it.
"""

from __future__ import annotations

import os
import time
from typing import NamedTuple

from imds_guard.identity import group_name, user_name
from imds_guard.kernel import children, untrusted
from imds_guard.kernel.abandonable import Unanswered, Worker
from imds_guard.kernel.untrusted import Description

MAX_COMMAND_LINE = 512
_MAX_CACHED = 1024
_CACHED_FOR_S = 60.0


# --- the program ----------------------------------------------------------------------------------------------------


class ProcessInfo(NamedTuple):
    """What a process runs now. None for what can't be read."""

    exe: str | None = None
    command_line: str | None = None


UNKNOWN = ProcessInfo()

SHARE_S = 0.5
"""How long one look-up may hang. Most take 0.15 ms."""
MAX_HUNG = 5
"""Within PENANCE_S. So look-ups that hang take at most 2.5 s of each minute of a watch."""
PENANCE_S = 60.0
MAX_ABANDONED = 8
"""Children that hang in the kernel. The watch's unit has a TasksMax above it."""


class Programs:
    """Looks up the programs of processes, one at a time, by a child that can be abandoned. Close it.

    After a command line that hung none of that user is read for PENANCE_S; after MAX_HUNG of them, only those of root
    are, which nobody without privilege can make hang. exe does not hang.
    """

    def __init__(self) -> None:
        self._worker = Worker(_describe)
        self._hung: dict[int, float] = {}

    def close(self) -> None:
        """Ends the child."""
        self._worker.close()

    def of(self, pid: int, seen_ns: int) -> ProcessInfo:
        """The program of a process; UNKNOWN when it has ended, or started after ``seen_ns`` of CLOCK_BOOTTIME."""
        try:
            uid = os.stat(f"/proc/{pid}").st_uid
        except OSError:
            return UNKNOWN
        described = self._described(pid, uid)
        if described is None or isinstance(described, Unanswered) or described.started_ns > seen_ns:
            return UNKNOWN
        return ProcessInfo(os.fsdecode(described.exe) or None, _command_line(described))

    def _described(self, pid: int, uid: int) -> Description | Unanswered | None:
        if uid != 0 and children.abandoned() >= MAX_ABANDONED:
            return None
        if self._may_read_command_line(uid):
            described = self._worker.ask((pid, True), SHARE_S)
            if described is not Unanswered.HUNG:
                return described
            self._hung[uid] = time.monotonic()
        return self._worker.ask((pid, False), SHARE_S)

    def _may_read_command_line(self, uid: int) -> bool:
        now = time.monotonic()
        self._hung = {one: since for one, since in self._hung.items() if now - since < PENANCE_S}
        return uid not in self._hung and (uid == 0 or len(self._hung) < MAX_HUNG)


def _describe(question: tuple[int, bool]) -> Description | None:
    pid, command_line = question
    return untrusted.describe(pid, command_line=command_line)


def _command_line(described: Description) -> str | None:
    text = os.fsdecode(b" ".join(described.command_line))
    if len(text) > MAX_COMMAND_LINE:
        text = text[:MAX_COMMAND_LINE] + "..."
    return text or None


# --- names ----------------------------------------------------------------------------------------------------------

NAMES_S = 5.0
"""How long all names together may take, of each _CACHED_FOR_S. After that IDs are shown as numbers."""


class NameCache:
    """Names of users and groups. Each has a deadline (name_service.py), and is looked up at most once a minute.

    A process chooses its IDs, among those of its sub-IDs, and a name service may be slow. So all together have a bound.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], tuple[float, str]] = {}
        self._minute = time.monotonic()
        self._spent_s = 0.0

    def user(self, uid: int) -> str:
        """The name, or the number where there is no account, or no answer in time."""
        return self._look_up("user", uid)

    def group(self, gid: int) -> str:
        """The name, or the number where there is no group entry, or no answer in time."""
        return self._look_up("group", gid)

    def _look_up(self, kind: str, number: int) -> str:
        now = time.monotonic()
        looked_up, name = self._known.get((kind, number), (-_CACHED_FOR_S, ""))
        if now - looked_up >= _CACHED_FOR_S:
            name = self._asked(kind, number, now)
            if len(self._known) >= _MAX_CACHED:
                self._known.clear()
            self._known[kind, number] = (now, name)
        return name

    def _asked(self, kind: str, number: int, now: float) -> str:
        if now - self._minute >= _CACHED_FOR_S:
            self._minute, self._spent_s = now, 0.0
        if self._spent_s >= NAMES_S:
            return str(number)
        name = user_name(number) if kind == "user" else group_name(number)
        self._spent_s += time.monotonic() - now
        return name


# --- text from the kernel and from file systems ---------------------------------------------------------------------


def decoded(raw: bytes) -> str:
    """Decodes UTF-8; any other byte becomes an escape such as ``\\xff``."""
    return raw.decode(errors="backslashreplace")


def os_text(text: str) -> str:
    """Text as Python's os functions return it, with ``\\xff`` in place of each byte that is not UTF-8."""
    return decoded(os.fsencode(text))
