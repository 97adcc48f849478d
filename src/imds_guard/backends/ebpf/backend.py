# SPDX-License-Identifier: Apache-2.0
"""The Backend that enforces by eBPF programs at the hooks of a cgroup."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Callable, TypeVar

from imds_guard.backends import Change, Description, Neighbour
from imds_guard.backends.ebpf import abi, hooks, other_programs, probe
from imds_guard.backends.ebpf.features import defines_of, needed_features
from imds_guard.backends.ebpf.folder import Folder
from imds_guard.backends.ebpf.pins import PinLocation
from imds_guard.backends.ebpf.render import require_fits
from imds_guard.backends.ebpf.state import State, is_active, read_state
from imds_guard.errors import GuardError, NotPermitted, trying
from imds_guard.kernel import bpffs, lockfile, privileges
from imds_guard.kernel.cgroup import Cgroup, open_cgroup
from imds_guard.policy.model import Policy

# What loads programs is imported where it is needed, for the sake of the start-up time: to read a guard takes none.
if TYPE_CHECKING:
    from imds_guard.backends.ebpf.changes import Target
    from imds_guard.backends.ebpf.program import Defines

_T = TypeVar("_T")

_ATTEMPTS = 20
_BETWEEN_ATTEMPTS_S = 0.01


class EbpfBackend:
    """Enforces at the root of the cgroup2 hierarchy, or in the subtree at the path ``cgroup``.

    ``defines`` are for tests: IG_TEST_DELAY.
    """

    name = "ebpf"

    def __init__(self, cgroup: str | None = None, defines: Defines = ()) -> None:
        self._cgroup_path = cgroup
        self._defines = defines

    # --- changes ----------------------------------------------------------------------------------------------------

    def check(self, policy: Policy | None) -> None:
        """Backend.check(). Compiles nothing and attaches nothing."""
        with self._cgroup() as cgroup, trying("asking what eBPF can do here", "nothing was changed, run it again"):
            self._require_hooks(cgroup, policy)
        if policy is not None:
            require_fits(policy)

    def apply(self, policy: Policy) -> Change:
        """Backend.apply()."""
        from imds_guard.backends.ebpf import changes  # noqa: PLC0415

        require_fits(policy)  # before anything is touched
        with self._target("putting the policy in force") as target:
            done = ("cleaned up after a command that was killed",) if target.folder.recover() else ()
            if target.folder.exists():
                return Change(done).then(changes.change_running(target, policy, keep_version=False))
            return Change(done).then(changes.install(target, policy))

    def change(self, policy: Policy) -> Change:
        """Backend.change(): hooks that are whole stay, whatever their version. Raises GuardError without a guard."""
        from imds_guard.backends.ebpf import changes  # noqa: PLC0415

        require_fits(policy)
        with self._target("changing the policy") as target:
            target.folder.recover()
            if not target.folder.exists():
                raise GuardError("changing the policy in force: none is; run imds-guard start first")
            return changes.change_running(target, policy, keep_version=True)

    def remove(self) -> Change:
        """Backend.remove()."""
        with self._target("opening the lock") as (cgroup, folder, _):
            found = folder.recover()
            if folder.exists():
                open_the_lock(folder)
                folder.remove()
                found = True
            found = bool(hooks.detach_unpinned(cgroup, None)) or found
            if not cgroup.is_root:
                lockfile.forget(folder.name)
        return Change((f"removed every hook, link and map from {cgroup.path}",) if found else ())

    # --- reading ----------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """The guard's state, read from the kernel without a lock."""
        return self._read(read_state)

    def read(self) -> Policy | None:
        """Backend.read()."""
        return self.state().policy

    def unaltered(self) -> Policy | None:
        """Backend.unaltered()."""
        state = self.state()
        return None if state.altered else state.policy

    def in_force(self) -> bool:
        """Backend.in_force()."""
        return self._read(is_active)

    def faults(self) -> list[str]:
        """Backend.faults()."""
        return list(self.state().faults)

    def neighbours(self) -> list[Neighbour]:
        """Backend.neighbours()."""
        with self._cgroup() as cgroup, trying("looking for programs of others", "run the command again"):
            found = hooks.inspect(cgroup, PinLocation(cgroup).pins())
            return [other.neighbour for other in other_programs.find(cgroup, found)]

    def notes(self, _policy: Policy) -> list[str]:
        """Backend.notes(): there are none, eBPF enforces what the policy says."""
        return []

    def describe(self) -> Description:
        """Backend.describe()."""
        state = self.state()
        return Description(state.policy, state.faults, state, tuple(other.neighbour for other in state.others))

    def _read(self, read: Callable[[Cgroup, PinLocation], _T | None]) -> _T:
        """The result of ``read``. It is called again when the guard changed meanwhile."""
        with self._cgroup() as cgroup, trying("reading the state of the guard", "run the command again"):
            location = PinLocation(cgroup)
            for _ in range(_ATTEMPTS):
                try:
                    found = read(cgroup, location)
                except FileNotFoundError:  # the guard was removed meanwhile
                    found = None
                if found is not None:
                    return found
                time.sleep(_BETWEEN_ATTEMPTS_S)
        raise GuardError("reading the state of the guard: it kept changing; try again")

    # --- steps ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _cgroup(self) -> Iterator[Cgroup]:
        if os.geteuid() != 0 and privileges.missing_capabilities([privileges.CAP_NET_ADMIN, privileges.CAP_BPF]):
            raise NotPermitted("working with eBPF: only root may; run this with sudo")
        with open_cgroup(self._cgroup_path) as cgroup:
            yield cgroup

    @contextmanager
    def _target(self, doing: str) -> Iterator[Target]:
        """Where to change something, while no other command changes it."""
        from imds_guard.backends.ebpf.changes import Target  # noqa: PLC0415

        with self._cgroup() as cgroup, _explained(doing):
            probe.require_host()
            folder = Folder(bpffs.require_bpffs(), PinLocation(cgroup).name)
            with lockfile.exclusive(folder.name):
                yield Target(cgroup, folder, self._defines)

    def _require_hooks(self, cgroup: Cgroup, policy: Policy | None) -> None:
        """Raises unless the hooks run this version, or can be compiled and loaded here."""
        from imds_guard.backends.ebpf import program  # noqa: PLC0415
        from imds_guard.kernel import compiler  # noqa: PLC0415

        probe.require_host()
        probe.require_bpf()
        path = bpffs.find_bpffs()
        if path is not None and os.statvfs(path).f_flag & os.ST_RDONLY:
            bpffs.require_bpffs()
        needed, more = abi.needed_hooks(policy), defines_of(needed_features(policy))
        version = program.source_version(self._defines + more)
        found = hooks.inspect(cgroup, PinLocation(cgroup).pins())
        current = [hook.name for hook in found if hook.ours and hook.ours.version == version]
        other_programs.require_place(cgroup, [hook.name for hook in found if hook.name in needed and hook.ours is None])
        if not set(needed) <= set(current):
            probe.require_64_bit()
            compiler.require_bcc()
            program.kernel_offsets()


def open_the_lock(folder: Folder) -> None:
    """Sets generation 0, so that all hooks let everyone through at the same moment."""
    from imds_guard.backends.ebpf.store import MapStore  # noqa: PLC0415

    try:
        with MapStore.open(folder.path) as maps, trying("opening the lock", "run imds-guard stop again"):
            maps.flip(0)
    except FileNotFoundError:
        return  # the pin of a map is missing: to detach the hooks is enough


def _explained(doing: str) -> AbstractContextManager[None]:
    """Explains errors that no inner step has explained."""
    return trying(doing, "either the policy before or the new one is in force, whole: imds-guard status tells which")
