# SPDX-License-Identifier: Apache-2.0
"""Who a process is, for people: its program, its command line, and the unit or container that it belongs to.

All of it is looked up after the fact and may be gone, and most of it the process chooses itself: it is for reading, no
decision rests on it.
"""

from __future__ import annotations

import os
import re
import time
from re import Pattern
from typing import TYPE_CHECKING, NamedTuple

from imds_guard.identity import group_name, user_name
from imds_guard.kernel.cgroup import Cgroup
from imds_guard.kernel.cgroup_names import path_of_cgroup

if TYPE_CHECKING:
    import psutil

LONGEST_COMMAND_LINE = 512
_REMEMBERED = 1024
_NAMES_FOR_S = 60.0
_SLACK_S = 1.5
"""How far a process's start may seem to lie after what it did: psutil reckons it from a boot time in whole seconds."""


# --- the program ----------------------------------------------------------------------------------------------------


class Program(NamedTuple):
    """What a process runs now; None for what can't be had."""

    exe: str | None = None
    command_line: str | None = None


NOTHING = Program()


def program_of(pid: int, seen_at: float) -> Program:
    """What process ``pid`` runs; NOTHING when it is gone, or began after ``seen_at`` (seconds since the epoch)."""
    try:
        import psutil  # noqa: PLC0415 -- start-up time: nothing else needs it
    except ImportError:
        return NOTHING
    try:
        process = psutil.Process(pid)
        if process.create_time() > seen_at + _SLACK_S:
            return NOTHING
        return Program(_exe(process), _command_line(process))
    except (psutil.Error, OSError):
        return NOTHING


def _exe(process: psutil.Process) -> str | None:
    """None where reading it is refused (ptrace(2))."""
    import psutil  # noqa: PLC0415

    try:
        return process.exe() or None
    except psutil.AccessDenied:
        return None


def _command_line(process: psutil.Process) -> str | None:
    words = " ".join(process.cmdline())
    if len(words) > LONGEST_COMMAND_LINE:
        words = words[:LONGEST_COMMAND_LINE] + "..."
    return words or None


# --- the place ------------------------------------------------------------------------------------------------------


class Home(NamedTuple):
    """A cgroup's path below the mount, and what it says of unit and container. Names as systemd escapes them."""

    path: str | None = None
    unit: str | None = None
    container: str | None = None


_UNIT = re.compile(r".+\.(service|scope|socket|mount|swap)")
_HEX64 = r"[0-9a-f]{64}"
_CONTAINERS: tuple[tuple[str, Pattern[str]], ...] = (
    ("docker", re.compile(rf"docker-({_HEX64})\.scope")),
    ("podman", re.compile(rf"libpod-({_HEX64})(?:\.scope)?")),
    ("cri-o", re.compile(rf"crio-({_HEX64})(?:\.scope)?")),
    ("containerd", re.compile(rf"cri-containerd-({_HEX64})\.scope")),
    ("nspawn", re.compile(r"machine-(.+)\.scope|systemd-nspawn@(.+)\.service")),
    ("lxc", re.compile(r"lxc\.payload\.(.+)")),
)
_PARENTS = {"docker": "docker", "lxc": "lxc", "libpod_parent": "podman"}
"""Directories whose children are containers, where no systemd makes the cgroups."""


def home_in(path: str) -> Home:
    """What a cgroup's path says: the outermost unit, as systemd has it, and the innermost container."""
    parts = [part for part in path.split("/") if part]
    unit = next((part for part in parts if _UNIT.fullmatch(part)), None)
    container = None
    for above, part in zip(["", *parts], parts):
        container = _container(above, part, "kubepods" in path) or container
    return Home(path, unit, container)


def _container(above: str, part: str, in_pod: bool) -> str | None:
    for runtime, pattern in _CONTAINERS:
        match = pattern.fullmatch(part)
        if match is not None:
            return f"{runtime}:{_short(next(group for group in match.groups() if group))}"
    if above in _PARENTS and (above == "lxc" or re.fullmatch(_HEX64, part)):
        return f"{_PARENTS[above]}:{_short(part)}"
    return f"kubernetes:{_short(part)}" if in_pod and re.fullmatch(_HEX64, part) else None


def _short(identity: str) -> str:
    """The first twelve digits of an ID, as the container tools print it; any other name as it is."""
    return identity[:12] if re.fullmatch(_HEX64, identity) else identity


class Homes:
    """The homes of cgroups by their ID, remembered: an ID never means another cgroup later."""

    def __init__(self, root: Cgroup) -> None:
        self._root = root
        self._known: dict[int, Home] = {}

    def of(self, cgroup_id: int, pid: int) -> Home:
        """The home of a cgroup. An empty one where the cgroup is gone, even if its process ID is used again."""
        home = self._known.get(cgroup_id)
        if home is None:
            path = path_of_cgroup(self._root.fd, cgroup_id) or self._path_of_process(cgroup_id, pid)
            if path is None:
                return Home()
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            home = self._known[cgroup_id] = home_in(path)
        return home

    def _path_of_process(self, cgroup_id: int, pid: int) -> str | None:
        """The path of the cgroup that process ``pid`` is in now, if that is the cgroup with this ID.

        It may be another one: the process has moved, or it has ended and a new process has its ID. A cgroup's ID is the
        inode of its directory (kernfs_node in Linux).
        """
        path = _cgroup2_path(pid)
        if path is None:
            return None
        try:
            found = os.stat(path.lstrip("/") or ".", dir_fd=self._root.fd)
        except OSError:
            return None
        same_mount = found.st_dev == os.fstat(self._root.fd).st_dev
        return path if same_mount and found.st_ino == cgroup_id else None


def _cgroup2_path(pid: int) -> str | None:
    """From /proc/PID/cgroup, where the line of cgroup2 begins with ``0::`` (cgroups(7))."""
    try:
        with open(f"/proc/{pid}/cgroup", "rb") as file:
            lines = os.fsdecode(file.read()).split("\n")
    except OSError:
        return None
    return next((line[3:] for line in lines if line.startswith("0::")), None)


# --- names ----------------------------------------------------------------------------------------------------------


class Names:
    """Names of users and groups, each looked up once a minute at the most: name services may be far away."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], tuple[float, str]] = {}

    def user(self, uid: int) -> str:
        """The name, or the number where there is no account."""
        return self._look_up("user", uid)

    def group(self, gid: int) -> str:
        """The name, or the number where there is no entry."""
        return self._look_up("group", gid)

    def _look_up(self, kind: str, number: int) -> str:
        now = time.monotonic()
        looked_up, name = self._known.get((kind, number), (-_NAMES_FOR_S, ""))
        if now - looked_up >= _NAMES_FOR_S:
            name = user_name(number) if kind == "user" else group_name(number)
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[kind, number] = (now, name)
        return name


def wall_clock(boot_ns: int) -> float:
    """Seconds since the epoch for a time of CLOCK_BOOTTIME, by the clocks as they stand now."""
    return time.time() - (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - boot_ns) / 1e9


def iso_time(seconds: float) -> str:
    """``2026-11-21T07:40:00.123Z``."""
    milliseconds = int(seconds * 1000)
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000))
    return f"{whole}.{milliseconds % 1000:03d}Z"


def fs_text(octets: bytes) -> str:
    """Octets that should be UTF-8; what is not stands there as ``\\xff``."""
    return octets.decode(errors="backslashreplace")


def lenient(text: str) -> str:
    """Text from the file system: its octets that are not UTF-8 stand there as ``\\xff``."""
    return fs_text(os.fsencode(text))
