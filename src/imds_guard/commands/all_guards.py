# SPDX-License-Identifier: Apache-2.0
"""Every guard of the machine: its own, that of each cgroup, and pins of those whose cgroup is gone."""

from __future__ import annotations

from typing import NamedTuple

from imds_guard.backends import Backend, choose
from imds_guard.backends.ebpf import other_guards
from imds_guard.commands import look, turn
from imds_guard.errors import GuardError
from imds_guard.kernel.cgroup import open_cgroup
from imds_guard.kernel.cgroup_names import path_of_cgroup
from imds_guard.policy.model import Policy


class GuardFound(NamedTuple):
    """A guard, or what is left of one. Where it can't be read, ``policy`` is None and ``fault`` says why."""

    cgroup: str | None = None
    """The path of its cgroup; None for the machine's, and where the path is not known."""
    cgroup_id: int | None = None
    """None for the machine's."""
    backends: tuple[str, ...] = ()
    """What enforces: ``ebpf``, ``iptables``. Empty where the cgroup is gone: that locks nothing.

    ``forwarded``: rules for forwarded packets that stand there without a policy.
    """
    policy: Policy | None = None
    pins: str | None = None
    since: float | None = None
    """When a command changed the policy last, in seconds since the epoch; None where that is not known."""
    fault: str | None = None

    @property
    def is_gone(self) -> bool:
        """True where only pins are left."""
        return not self.backends

    @property
    def name(self) -> str:
        """``the machine``, or the cgroup by its path, else by its ID."""
        if self.cgroup_id is None:
            return "the machine"
        return self.cgroup or f"the cgroup with ID {self.cgroup_id}"


def found() -> list[GuardFound]:
    """The machine's guard first, then the others by cgroup ID. One that can't be asked is there with its fault."""
    return [*_of_the_machine(), *_of_cgroups()]


def _of_the_machine() -> list[GuardFound]:
    try:
        running = choose.running(None)
    except GuardError as error:
        return [GuardFound(backends=("unknown",), fault=str(error))]
    if not running:
        left = "; ".join(look.forwarded().describe(None).faults)
        return [GuardFound(backends=("forwarded",), fault=left)] if left else []
    policy, fault = _policy_of(running)
    return [GuardFound(None, None, tuple(running), policy, None, turn.changed_at(turn.MACHINE_LOCK), fault)]


def _of_cgroups() -> list[GuardFound]:
    try:
        listed = other_guards.found()
        if not listed:
            return []
        with open_cgroup() as root:
            return [one for guard in listed for one in _of_cgroup(guard, _path(root.fd, root.path, guard.cgroup_id))]
    except GuardError as error:
        return [GuardFound(cgroup_id=0, backends=("unknown",), fault=str(error))]


def _path(root_fd: int, root: str, identity: int) -> str | None:
    below = path_of_cgroup(root_fd, identity)
    return None if below is None else root.rstrip("/") + below


def _of_cgroup(guard: other_guards.CgroupGuard, path: str | None) -> list[GuardFound]:
    """Empty for a guard that was removed meanwhile."""
    one = GuardFound(path, guard.cgroup_id, pins=guard.path)
    if guard.is_orphan:
        return [one]
    if path is None:
        return [one._replace(backends=("ebpf",), fault="the path of its cgroup is not known here")]
    try:
        running = choose.running(path)
    except GuardError as error:
        return [one._replace(backends=("ebpf",), fault=str(error))]
    policy, fault = _policy_of(running)
    since = turn.changed_at(turn.lock_name(path))
    return [one._replace(backends=tuple(running), policy=policy, since=since, fault=fault)] if running else []


def _policy_of(running: dict[str, Backend]) -> tuple[Policy | None, str | None]:
    for backend in running.values():
        try:
            policy = backend.read()
        except GuardError as error:
            return None, str(error)
        if policy is not None:
            return policy, None
    return None, "its policy can't be read"
