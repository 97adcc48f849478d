# SPDX-License-Identifier: Apache-2.0
"""The guards of cgroups, found by their pins: for ``stop --all``, and to notice guards whose cgroup is gone.

When a cgroup's directory is removed, the kernel detaches the links to it (cgroup_bpf_release() in kernel/bpf/cgroup.c)
and their link info names cgroup 0 from then on (bpf_cgroup_link_fill_link_info()). The pins stay, and nothing uses
them: a directory that is made again at the same path is another cgroup, with another ID.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from imds_guard.backends import Change
from imds_guard.backends.ebpf import hooks
from imds_guard.backends.ebpf.backend import open_the_lock
from imds_guard.backends.ebpf.folder import Folder
from imds_guard.backends.ebpf.pins import CGROUP_GUARD, is_roots_folder
from imds_guard.errors import Unsupported, trying
from imds_guard.kernel import bpffs, lockfile

_NAME = re.compile(re.escape(CGROUP_GUARD) + r"([0-9]+)(?:~new|~old)?")


class Orphan(NamedTuple):
    """A guard whose cgroup is gone. It locks nothing."""

    cgroup_id: int
    path: str
    """The folder of its pins."""

    @property
    def fault(self) -> str:
        """The sentence for status."""
        return (
            f"the cgroup of a guard was removed (ID {self.cgroup_id}, pins in {self.path}), so that guard locks "
            "nothing, also where the directory was made again: lock that with imds-guard start --cgroup; the pins go "
            "with any start, or with imds-guard stop --all"
        )


class CgroupGuard(NamedTuple):
    """The guard of a cgroup, or its pins where the cgroup is gone."""

    cgroup_id: int
    path: str
    """The folder of its pins."""
    is_orphan: bool


def found() -> list[CgroupGuard]:
    """Every guard of a cgroup, by cgroup ID. Empty where this process can't reach the pins."""
    with trying("looking for guards of cgroups", "run the command again"):
        guards = [CgroupGuard(identity, folder.path, _is_orphan(folder)) for identity, folder in _cgroup_guards()]
        return [one for one in guards if one.is_orphan or is_roots_folder(one.path)]


def orphans() -> list[Orphan]:
    """The guards whose cgroup is gone, by cgroup ID. Empty where this process can't reach the pins."""
    with trying("looking for guards of cgroups that are gone", "run the command again"):
        return [Orphan(identity, folder.path) for identity, folder in _cgroup_guards() if _is_orphan(folder)]


def are_in_force() -> bool:
    """True when the guard of some cgroup is attached."""
    with trying("looking for guards of cgroups", "run the command again"):
        return any(folder.exists() and not _is_orphan(folder) for _, folder in _cgroup_guards())


def remove_orphans() -> Change:
    """Removes the pins of guards whose cgroup is gone."""
    return _remove(only_orphans=True)


def remove_all() -> Change:
    """Removes every guard of a cgroup, and the pins of those whose cgroup is gone."""
    return _remove(only_orphans=False)


def _cgroup_guards() -> Iterator[tuple[int, Folder]]:
    """Each guard of a cgroup, also one that a killed command left half built."""
    try:
        path = bpffs.find_bpffs()
    except Unsupported:
        path = None
    names = [] if path is None else os.listdir(path)
    for identity in sorted({int(found[1]) for found in map(_NAME.fullmatch, names) if found}):
        yield identity, Folder(str(path), f"{CGROUP_GUARD}{identity}")


def _is_orphan(folder: Folder) -> bool:
    """True when there are links, and none of them is attached. A guard that is being built has no links at first.

    False where nobody can tell, because bpf(2) is refused.
    """
    try:
        links = [
            link
            for path in (folder.path, folder.building, folder.leaving)
            if is_roots_folder(path)
            for link in hooks.pinned_links(path)
        ]
    except OSError:
        return False
    return bool(links) and not any(link.cgroup_id for link in links)


def _remove(*, only_orphans: bool) -> Change:
    with trying("removing guards of cgroups", "run the command again"):
        return _removed(only_orphans)


def _removed(only_orphans: bool) -> Change:
    change = Change()
    for identity, folder in _cgroup_guards():
        if only_orphans and not _is_orphan(folder):
            continue  # asked before, so that nobody waits for a command that changes a guard which is whole
        with lockfile.exclusive(folder.name):
            orphan = _is_orphan(folder)
            if only_orphans and not orphan:
                continue
            found = folder.recover()
            if folder.exists():
                open_the_lock(folder)
                folder.remove()
                found = True
            lockfile.forget(folder.name)
        if found:
            gone = " (it is gone)" if orphan else ""
            change = change.then(Change((f"removed the guard of the cgroup with ID {identity}{gone}",)))
    return change
