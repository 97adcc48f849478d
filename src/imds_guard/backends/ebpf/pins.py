# SPDX-License-Identifier: Apache-2.0
"""Where the pins of a guard are: the names of its folder in bpffs and of the maps and links in it.

A bpffs that was mounted without a mode lets everyone make folders and links in it (01777). Only a folder that root owns
and nobody else may write to is a guard's.
"""

from __future__ import annotations

import os
import stat

from imds_guard.backends.ebpf.abi import Map
from imds_guard.kernel import bpffs, ownership
from imds_guard.kernel.cgroup import Cgroup, open_cgroup

CGROUP_GUARD = "imds-guard-"
"""The name of the folder of pins of a cgroup's guard, before the ID of the cgroup."""


class PinLocation:
    """Where the pins of one guard are, or would be: the guard of the whole machine, or that of a cgroup."""

    def __init__(self, cgroup: Cgroup) -> None:
        self.is_root = cgroup.is_root
        self.name = "imds-guard" if cgroup.is_root else f"{CGROUP_GUARD}{cgroup.id}"
        """The name of the folder of pins. The guard's lock files have it, too."""

    @classmethod
    def of(cls, cgroup: str | None) -> PinLocation:
        """The location for the cgroup at a path, or for the root of the hierarchy."""
        with open_cgroup(cgroup) as opened:
            return cls(opened)

    def pins(self) -> str | None:
        """The folder of pins, or None when there is no guard."""
        path = bpffs.find_bpffs()
        folder = None if path is None else os.path.join(path, self.name)
        return folder if folder is not None and is_roots_folder(folder) else None


def map_pin(folder: str, number: Map) -> str:
    """Where a map is pinned."""
    return os.path.join(folder, number.pin_name)


def link_pin(folder: str, hook: str) -> str:
    """Where a hook's link is pinned."""
    return os.path.join(folder, f"link_{hook}")


def is_roots_folder(path: str) -> bool:
    """True for a folder, not a link to one, that root owns and nobody else may write to."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and ownership.only_root_can_write(found)
