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


class _Runtime(NamedTuple):
    """A runtime, and the path of a container of it: the last group is the container's ID or name."""

    name: str
    path: Pattern[str]


def _anywhere(name: str, directory: str) -> _Runtime:
    return _Runtime(name, re.compile(rf"(?:/.+)?/{directory}"))


def _at_the_root(name: str, path: str) -> _Runtime:
    return _Runtime(name, re.compile(path))


_RUNTIMES = (
    # By runc: "SLICE:PREFIX:ID" is SLICE/PREFIX-ID.scope, any other path is a directory (libcontainer/cgroups in runc).
    _anywhere("docker", rf"docker-({_HEX64})\.scope"),  # daemon/oci_linux.go in moby: "SLICE:docker:ID"
    _anywhere("docker", rf"docker/({_HEX64})"),  # the same with native.cgroupdriver=cgroupfs: /docker/ID
    # A step of a build: executor/oci in buildkit. identity.NewID() is 25 characters of base 36. Where dockerd builds,
    # its prefix is "docker" (newCgroupParent() in moby).
    _anywhere("buildkit", r"(?:docker-([0-9a-z]{25})\.scope|buildkit/([0-9a-z]{25}))"),
    # agent/api/task/task_linux.go in amazon-ecs-agent: /ecs/TASK/ID with cgroup v1, and on Fargate
    # /ecs/TASK/TASK-NUMBER; with cgroup v2 ecstasks-TASK.slice/docker-ID.scope.
    _at_the_root("ecs", rf"/ecs/[^/]+/({_HEX64}|[0-9a-f]{{32}}-[0-9]+)"),
    _anywhere("nerdctl", rf"nerdctl-({_HEX64})\.scope"),  # generateCgroupPath() in nerdctl: "SLICE:nerdctl:ID"
    # getOCICgroupPath() in podman: libpod-ID.scope in a slice, or /libpod_parent/libpod-ID. With --cgroups=split, as
    # Quadlet has it, libpod-payload-ID below the unit.
    _anywhere("podman", rf"libpod-(?:payload-)?({_HEX64})(?:\.scope)?"),
    _anywhere("podman", rf"libpod_parent/({_HEX64})"),
    _anywhere("cri-o", rf"crio-({_HEX64})(?:\.scope)?"),  # internal/config/cgmgr in cri-o
    _anywhere("containerd", rf"cri-containerd-({_HEX64})\.scope"),  # getCgroupsPath() in containerd
    # kubelet's names of pods (pkg/kubelet/cm in kubernetes), below which a runtime without systemd puts /ID.
    _anywhere("kubernetes", rf"[^/]*kubepods[^/]*(?:/.+)?/({_HEX64})"),
    # populateDefaultUnixSpec() in containerd: /NAMESPACE/ID, where ctr has a name for an ID. "default" is the namespace
    # of ctr and nerdctl, "k8s.io" that of a kubelet.
    _at_the_root("containerd", r"/(?:default|k8s\.io)/([^/]+)"),
    _anywhere("crun", r"crun-(.+)\.scope"),  # src/libcrun/cgroup-systemd.c in crun, when nobody gave it a path
    # nspawn's own processes are in "supervisor" (src/nspawn/nspawn-cgroup.c in systemd). machined has a scope of the
    # same form for each virtual machine of libvirt and of systemd-vmspawn, which has no "payload".
    _anywhere("nspawn", r"(?:machine-(.+)\.scope|systemd-nspawn@(.+)\.service)/payload"),
    # virDomainDriverGenerateMachineName() in libvirt: DRIVER-NUMBER-NAME, escaped.
    _anywhere("libvirt-lxc", r"machine-lxc\\x2d[0-9]+\\x2d(.+)\.scope"),
    _anywhere("lxc", r"lxc\.payload\.([^/]+)"),  # DEFAULT_PAYLOAD_CGROUP_PREFIX in lxc
    _anywhere("lxc", r"lxc/([^/]+)"),  # lxc.cgroup.pattern before lxc 4
)
"""Each form of a container's cgroup, with the place in the source of its runtime where it is made."""


def parse_path(path: str) -> CgroupInfo:
    """The outermost unit of a cgroup's path, as systemd has it, and the innermost container."""
    parts = [part for part in path.split("/") if part]
    unit = next((part for part in parts if _UNIT.fullmatch(part)), None)
    upper = ["/" + "/".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return CgroupInfo(path, unit, next(filter(None, map(_container, upper)), None))


def container_of_process(pid: int) -> str | None:
    """The container that a process is in now; None where its cgroup tells none, or it has ended."""
    path = _cgroup2_path(pid)
    return None if path is None else parse_path(path).container


def _container(path: str) -> str | None:
    """RUNTIME:NAME, where a path is that of a container itself."""
    for runtime in _RUNTIMES:
        match = runtime.path.fullmatch(path)
        if match is not None:
            return f"{runtime.name}:{_short(next(group for group in match.groups() if group))}"
    return None


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
