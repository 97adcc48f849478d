# SPDX-License-Identifier: Apache-2.0
"""The program of a process, and names of users and groups."""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace

import pytest

from imds_guard.watch import process_info
from imds_guard.watch.process_info import UNKNOWN, NameCache, ProcessInfo, Programs, decoded, os_text


def now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def program_of(pid: int, seen_ns: int) -> ProcessInfo:
    programs = Programs()
    try:
        return programs.of(pid, seen_ns)
    finally:
        programs.close()


def ended_process() -> int:
    """The ID of a process that has ended."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_a_running_process_has_its_program() -> None:
    program = program_of(os.getpid(), now_ns())
    assert program.exe == os.path.realpath(sys.executable)
    assert program.command_line is not None


def test_a_process_that_started_later_is_not_the_caller() -> None:
    """Its ID was used again."""
    assert program_of(os.getpid(), 0) == UNKNOWN


def test_an_ended_process_is_unknown() -> None:
    assert program_of(ended_process(), now_ns()) == UNKNOWN


def test_bytes_that_are_not_utf_8_are_shown_as_escapes() -> None:
    assert decoded(b"\xff x") == "\\xff x"
    assert os_text(os.fsdecode(b"/tmp/\xff\xc3\xa4")) == "/tmp/\\xff\u00e4"


def test_unknown_users_and_groups_are_numbers() -> None:
    names = NameCache()
    assert [names.user(0), names.group(0), names.user(4_000_000_123)] == ["root", "root", "4000000123"]


def test_slow_names_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process chooses its IDs, and may take any number of them. What is known stays; the next minute begins anew."""
    now = [1000.0]

    def slow(uid: int) -> str:
        now[0] += 0.4
        return f"name-{uid}"

    monkeypatch.setattr(process_info, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(process_info, "user_name", slow)
    names = NameCache()
    shown = [names.user(uid) for uid in range(100, 200)]
    assert shown == [f"name-{uid}" for uid in range(100, 113)] + [str(uid) for uid in range(113, 200)]
    assert round(now[0] - 1000, 1) == 5.2
    assert names.user(100) == "name-100"
    now[0] += 60
    assert names.user(150) == "name-150"
