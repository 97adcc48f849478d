# SPDX-License-Identifier: Apache-2.0
"""The folder of pins of one guard, and the traces that a killed command leaves beside it.

``NAME`` is the guard itself. ``NAME~new`` is one being built, or, after a swap of layouts, the one before.
``NAME~old`` is one being taken down. bpffs refuses names with a dot (bpf_lookup() in kernel/bpf/inode.c).

A bpffs that was mounted without a mode lets everyone make folders and links in it (01777). What stands under one of
these names and is no folder of root's is nobody's guard: it is never followed, and a command that changes something
removes it.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from imds_guard.backends.ebpf import hooks
from imds_guard.errors import trying
from imds_guard.kernel import ownership, syscalls

_STRANGER = "~stranger~"
"""What stood under a guard's name and was no guard is renamed to this and a random number."""


class Folder:
    """Paths, and the moves between them that keep a whole guard at one of them."""

    def __init__(self, bpffs: str, cgroup_id: int, is_root: bool) -> None:
        self.name = "imds-guard" if is_root else f"imds-guard-{cgroup_id}"
        self.path = os.path.join(bpffs, self.name)
        self.building = self.path + "~new"
        self.leaving = self.path + "~old"

    def exists(self) -> bool:
        """True when there is a guard."""
        return _is_roots_folder(self.path)

    def recover(self) -> bool:
        """Finishes or undoes what a killed command left; True when there was anything."""
        self._remove_strangers()
        left = [path for path in (self.building, self.leaving) if _is_roots_folder(path)]
        if not self.exists() and len(left) == 2:
            # Killed between the two renames of swap() where the kernel can't exchange: the new one is complete.
            os.rename(self.building, self.path)
        for path in left:
            self._discard(path, detach=not self.exists())
        return bool(left)

    def _remove_strangers(self) -> None:
        for path in (self.path, self.building, self.leaving):
            if os.path.lexists(path) and not _is_roots_folder(path):
                # Its maker may go on filling it, so that it is never empty: the name is taken from it first, at once.
                what = f"renaming {path}, which someone else put there"
                with trying(what, "see who may write there, and try again"), suppress(FileNotFoundError):
                    os.rename(path, f"{self.path}{_STRANGER}{os.urandom(8).hex()}")
        # As far as it goes: what is still being filled stays until the next command, and bears no name of a guard.
        with suppress(OSError):
            for path in self._strangers():
                if os.path.isdir(path) and not os.path.islink(path):
                    _remove_tree(path)
                else:
                    os.unlink(path)

    def _strangers(self) -> list[str]:
        bpffs, prefix = os.path.dirname(self.path), self.name + _STRANGER
        return [os.path.join(bpffs, name) for name in os.listdir(bpffs) if name.startswith(prefix)]

    def begin(self) -> str:
        """Makes the folder to build in."""
        with trying(f"making {self.building}", "nothing was changed"):
            os.mkdir(self.building, 0o700)
        return self.building

    def commit(self) -> None:
        """What was built becomes the guard."""
        with trying(f"renaming {self.building}", "nothing is locked; run the command again"):
            os.rename(self.building, self.path)

    def abandon(self) -> None:
        """What was built goes away again."""
        if _is_roots_folder(self.building):
            self._discard(self.building, detach=not self.exists())

    def swap(self) -> None:
        """What was built takes the place of the guard, whose links it shares; recover() then takes that away."""
        with trying(f"exchanging {self.path} and {self.building}", "the policy before stays in force; run it again"):
            try:
                syscalls.exchange(self.path, self.building)
            except OSError:  # bpffs can exchange since v5.16: simple_rename_exchange()
                os.rename(self.path, self.leaving)
                self._rename_the_new_one()

    def _rename_the_new_one(self) -> None:
        try:
            os.rename(self.building, self.path)
        except OSError:
            os.rename(self.leaving, self.path)
            raise

    def remove_if_there(self) -> None:
        """As remove(), where there may be no guard."""
        if self.exists():
            self.remove()

    def remove(self) -> None:
        """The guard goes away: its links are detached at once, then everything is unpinned."""
        with trying(f"renaming {self.path}", "run the command again"):
            os.rename(self.path, self.leaving)
        self._discard(self.leaving, detach=True)

    def _discard(self, path: str, *, detach: bool) -> None:
        if not _is_roots_folder(path):
            return
        if detach:
            hooks.detach_all(path)
        with trying(f"removing {path}", "run the command again"):
            for name in os.listdir(path):
                os.unlink(os.path.join(path, name))
            os.rmdir(path)


def _remove_tree(path: str) -> None:
    import shutil  # noqa: PLC0415 -- start-up time: nearly no command has anything to remove

    shutil.rmtree(path, ignore_errors=True)  # follows no link (shutil.rmtree.avoids_symlink_attacks)


def _is_roots_folder(path: str) -> bool:
    """True for a folder, not a link to one, that root owns and nobody else may write to."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and ownership.only_root_can_write(found)
