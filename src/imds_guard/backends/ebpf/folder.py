# SPDX-License-Identifier: Apache-2.0
"""The folder of pins of one guard: the steps of a change, and how to finish what a killed command left.

``NAME`` is the guard itself. ``NAME~new`` is one being built, or, after an exchange of the two, the one before.
``NAME~old`` is one being removed. bpffs refuses names with a dot (bpf_lookup() in kernel/bpf/inode.c).

Something else under one of these names is nobody's guard (see is_roots_folder()): it is never followed, and a command
that changes something removes it.
"""

from __future__ import annotations

import os
from contextlib import suppress

from imds_guard.backends.ebpf import hooks
from imds_guard.backends.ebpf.pins import is_roots_folder
from imds_guard.errors import trying
from imds_guard.kernel import syscalls

_FOREIGN = "~foreign~"
"""Something at a guard's path that is no guard is renamed to this and a random number."""


class Folder:
    """Paths, and the moves between them. At every moment a whole guard is at one of the paths.

    ``name`` is PinLocation.name.
    """

    def __init__(self, bpffs: str, name: str) -> None:
        self.name = name
        self.path = os.path.join(bpffs, self.name)
        self.building = self.path + "~new"
        self.leaving = self.path + "~old"

    def exists(self) -> bool:
        """True when there is a guard."""
        return is_roots_folder(self.path)

    def recover(self) -> bool:
        """Finishes or undoes what a killed command left. True when there was anything."""
        self._remove_foreign()
        left = [path for path in (self.building, self.leaving) if is_roots_folder(path)]
        if not self.exists() and len(left) == 2:
            # Killed between the two renames of swap() where the kernel can't exchange: the new one is complete.
            os.rename(self.building, self.path)
        for path in left:
            self._discard(path, detach=not self.exists())
        return bool(left)

    def _remove_foreign(self) -> None:
        for path in (self.path, self.building, self.leaving):
            if os.path.lexists(path) and not is_roots_folder(path):
                # Its owner may go on filling it, so that it is never empty. A rename frees the name at once.
                what = f"renaming {path}, which someone else put there"
                with trying(what, "see who may write there, and try again"), suppress(FileNotFoundError):
                    os.rename(path, f"{self.path}{_FOREIGN}{os.urandom(8).hex()}")
        # A folder that is still being filled may stay until the next command: it no longer has the name of a guard.
        with suppress(OSError):
            for path in self._foreign():
                if os.path.isdir(path) and not os.path.islink(path):
                    _remove_tree(path)
                else:
                    os.unlink(path)

    def _foreign(self) -> list[str]:
        bpffs, prefix = os.path.dirname(self.path), self.name + _FOREIGN
        return [os.path.join(bpffs, name) for name in os.listdir(bpffs) if name.startswith(prefix)]

    def begin(self) -> str:
        """Makes the folder in which a guard is built, and returns its path."""
        with trying(f"making {self.building}", "nothing was changed"):
            os.mkdir(self.building, 0o700)
        return self.building

    def commit(self) -> None:
        """The guard that was built becomes the guard."""
        with trying(f"renaming {self.building}", "nothing is locked; run the command again"):
            os.rename(self.building, self.path)

    def abandon(self) -> None:
        """Removes what was built."""
        if is_roots_folder(self.building):
            self._discard(self.building, detach=not self.exists())

    def swap(self) -> None:
        """Exchanges the guard and the one that was built, which share their links. recover() removes the one before."""
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
        """Removes the guard, if there is one."""
        if self.exists():
            self.remove()

    def remove(self) -> None:
        """Removes the guard: its links are detached at once, then everything is unpinned."""
        with trying(f"renaming {self.path}", "run the command again"):
            os.rename(self.path, self.leaving)
        self._discard(self.leaving, detach=True)

    def _discard(self, path: str, *, detach: bool) -> None:
        if not is_roots_folder(path):
            return
        if detach:
            hooks.detach_all(path)
        # A guard that is being removed looks like one whose cgroup is gone, which any start removes.
        with trying(f"removing {path}", "run the command again"), suppress(FileNotFoundError):
            for name in os.listdir(path):
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(path, name))
            os.rmdir(path)


def _remove_tree(path: str) -> None:
    import shutil  # noqa: PLC0415 -- start-up time: nearly no command has anything to remove

    shutil.rmtree(path, ignore_errors=True)  # follows no link (shutil.rmtree.avoids_symlink_attacks)
