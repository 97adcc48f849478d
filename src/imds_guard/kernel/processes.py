# SPDX-License-Identifier: Apache-2.0
"""The processes of the machine, as /proc shows them: what the kernel says of them. untrusted.py has what they say."""

from __future__ import annotations

import os
from typing import NamedTuple


class Process(NamedTuple):
    """A process and its effective user ID, which the process can't choose freely."""

    pid: int
    uid: int


def process_ids() -> list[int]:
    """Every process that /proc shows, in ascending order."""
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def by_user() -> list[Process]:
    """Every process: those of root first, then by user ID, so that the numbers of sub-IDs (subuid(5)) come last.

    The owner of /proc/PID is the effective user, set-user-ID programs and undumpable processes included
    (task_dump_owner() in Linux).
    """
    found = []
    for pid in process_ids():
        try:
            found.append(Process(pid, os.stat(f"/proc/{pid}").st_uid))
        except OSError:
            continue  # it has ended
    return sorted(found, key=lambda one: (one.uid, one.pid))


def is_alive(pid: int) -> bool:
    """False for a process that is gone or a zombie, which has no descriptors and no namespaces.

    A process whose first thread has ended, while others run, is shown as a zombie, too. It has more than one thread.
    """
    import psutil  # noqa: PLC0415 -- start-up time: only a process that may not be inspected is asked for

    try:
        process = psutil.Process(pid)
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) or process.num_threads() > 1
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # hidepid= of the mount of /proc (proc(5))
        return True


def status_of(pid: int) -> dict[bytes, bytes]:
    """The fields of proc_pid_status(5). Raises OSError.

    Lines end with a line feed and nothing else: the kernel escapes line feeds in the name of the process, and nothing
    else of it (proc_task_name() in Linux).
    """
    with open(f"/proc/{pid}/status", "rb") as file:
        lines = (line.partition(b":") for line in file.read().split(b"\n"))
        return {name: value.strip() for name, _, value in lines}


def stat_of(pid: int | str) -> list[bytes]:
    """stat_fields() of a process. Raises OSError."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return stat_fields(file.read())


def stat_fields(text: bytes) -> list[bytes]:
    """The fields of proc_pid_stat(5) from the third (the state) on.

    The second is the name of the process, which may contain blanks, parentheses and line feeds.
    """
    return text[text.rindex(b")") + 1 :].split()
