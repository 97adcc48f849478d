# SPDX-License-Identifier: Apache-2.0
"""The mounts that a process sees: /proc/PID/mountinfo (proc_pid_mountinfo(5))."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from imds_guard.kernel.processes import stat_of


class Mount(NamedTuple):
    """A line of mountinfo. ``device`` is st_dev; ``root`` is the directory of the filesystem that is mounted."""

    device: int
    root: str
    path: str
    kind: str


def mounts(kind: str, pid: str = "self") -> list[Mount]:
    """The mounts of one filesystem type that a process sees, in the order in which they were mounted."""
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return [mount for mount in map(_parse, file) if mount.kind == kind]


def same_namespace_as_pid1() -> bool:
    """True when this process is in PID 1's mount namespace. Mount IDs are unique in the machine: mnt_alloc_id().

    /proc/1/ns/mnt would show it, too, but only a process with all of PID 1's capabilities may read that link.
    """
    return _first_id("self") == _first_id("1")


def window_to_pid1() -> str | None:
    """A process in PID 1's mount namespace whose /proc/PID/root and /proc/PID/ns/mnt this process may use, or None.

    For PID 1's own this process needs all of PID 1's capabilities. An ancestor, such as the shell that ran
    ``ip netns exec``, often has no more than this process.
    """
    wanted = _first_id("1")
    for pid in ("1", *_ancestors()):
        try:
            os.readlink(f"/proc/{pid}/ns/mnt")
            if _first_id(pid) == wanted:
                return pid
        except OSError:
            continue
    return None


def _ancestors() -> Iterator[str]:
    pid = os.getppid()
    while pid > 1:
        yield str(pid)
        pid = int(stat_of(pid)[1])


def _first_id(pid: str) -> str:
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return file.readline().split(" ", 1)[0]


def _parse(line: str) -> Mount:
    before, _, after = line.partition(" - ")
    fields = before.split()
    major, _, minor = fields[2].partition(":")
    return Mount(os.makedev(int(major), int(minor)), _unescaped(fields[3]), _unescaped(fields[4]), after.split()[0])


def _unescaped(text: str) -> str:
    r"""Replaces the kernel's escapes: a space is \040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text) if "\\" in text else text
