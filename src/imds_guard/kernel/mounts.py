# SPDX-License-Identifier: Apache-2.0
"""What is mounted where: /proc/PID/mountinfo (proc_pid_mountinfo(5))."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple


class Mount(NamedTuple):
    """A line of mountinfo: the device as st_dev has it, the directory of the filesystem that is its root."""

    device: int
    root: str
    path: str
    kind: str
    read_only: bool


def mounts(kind: str, pid: str = "self") -> list[Mount]:
    """The mounts of one filesystem type that a process sees, in the order of mounting."""
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return [mount for mount in map(_parse, file) if mount.kind == kind]


def same_namespace_as_pid1() -> bool:
    """True when this process sees PID 1's own mounts: their IDs are unique in the machine, mnt_alloc_id().

    /proc/1/ns/mnt would tell as well, but only a process with all of PID 1's capabilities may read it.
    """
    return _first_id("self") == _first_id("1")


def window_to_pid1() -> str | None:
    """A process ID in PID 1's mount namespace whose /proc/PID/root and /proc/PID/ns/mnt we may use, or None.

    PID 1's own asks for all of its capabilities; the shell that called us (``ip netns exec``) has no more than we.
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
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            text = file.read()
        pid = int(text[text.rindex(")") + 1 :].split()[1])


def _first_id(pid: str) -> str:
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return file.readline().split(" ", 1)[0]


def _parse(line: str) -> Mount:
    before, _, after = line.partition(" - ")
    fields, rest = before.split(), after.split()
    major, _, minor = fields[2].partition(":")
    options = set(fields[5].split(",")) | set(rest[2].split(",") if len(rest) > 2 else ())
    return Mount(os.makedev(int(major), int(minor)), _plain(fields[3]), _plain(fields[4]), rest[0], "ro" in options)


def _plain(text: str) -> str:
    r"""Undoes the kernel's \040 for a space and the like."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text) if "\\" in text else text
