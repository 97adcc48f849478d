# SPDX-License-Identifier: Apache-2.0
"""The path of a cgroup, and the unit or container that it belongs to.

The cgroup may be gone when it is looked up. The result is only printed: no decision rests on it.
"""

from __future__ import annotations

import os
import re
from re import Pattern
from typing import NamedTuple

from imds_guard.kernel.cgroup import Cgroup
from imds_guard.kernel.cgroup_names import path_of_cgroup

_MAX_CACHED = 1024
_SHORT_ID = 12


class CgroupInfo(NamedTuple):
    """The path below the cgroup2 mount, and the names in it, as systemd escapes them. None for what is not known."""

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
"""Directories whose children are containers, on machines where systemd does not make the cgroups."""


def parse_path(path: str) -> CgroupInfo:
    """The outermost unit of a cgroup's path, as systemd has it, and the innermost container."""
    parts = [part for part in path.split("/") if part]
    unit = next((part for part in parts if _UNIT.fullmatch(part)), None)
    container = None
    for parent, part in zip(["", *parts], parts):
        container = _container(parent, part, "kubepods" in path) or container
    return CgroupInfo(path, unit, container)


def _container(parent: str, part: str, in_pod: bool) -> str | None:
    for runtime, pattern in _CONTAINERS:
        match = pattern.fullmatch(part)
        if match is not None:
            return f"{runtime}:{_short(next(group for group in match.groups() if group))}"
    if parent in _PARENTS and (parent == "lxc" or re.fullmatch(_HEX64, part)):
        return f"{_PARENTS[parent]}:{_short(part)}"
    return f"kubernetes:{_short(part)}" if in_pod and re.fullmatch(_HEX64, part) else None


def _short(name: str) -> str:
    """The first twelve digits of an ID, as the container tools print it; any other name unchanged."""
    return name[:_SHORT_ID] if re.fullmatch(_HEX64, name) else name


class CgroupCache:
    """Looks up cgroups by ID. Results are kept: the kernel uses no ID twice."""

    def __init__(self, root: Cgroup) -> None:
        self._root = root
        self._known: dict[int, CgroupInfo] = {}

    def look_up(self, cgroup_id: int, pid: int) -> CgroupInfo:
        """The path, unit and container of a cgroup; all None when the cgroup is gone.

        ``pid`` is a process that was in it. It is asked where the kernel refuses the path for the ID.
        """
        known = self._known.get(cgroup_id)
        if known is None:
            path = path_of_cgroup(self._root.fd, cgroup_id) or self._path_of_process(cgroup_id, pid)
            if path is None:
                return CgroupInfo()
            if len(self._known) >= _MAX_CACHED:
                self._known.clear()
            known = self._known[cgroup_id] = parse_path(path)
        return known

    def _path_of_process(self, cgroup_id: int, pid: int) -> str | None:
        """The path of the cgroup that process ``pid`` is in now, if that is the cgroup with this ID.

        It may be another one: the process has moved, or it has ended and a new process has its ID. A cgroup's ID is the
        inode of its directory (kernfs_node in Linux). A path with ``..`` leads out of our cgroup namespace.
        """
        path = _cgroup2_path(pid)
        if path is None or ".." in path.split("/"):
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
