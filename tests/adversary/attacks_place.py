# SPDX-License-Identifier: Apache-2.0
"""Attacks from containers, namespaces and other cgroups."""

from __future__ import annotations

import contextlib
import os
from typing import Callable

from imds_guard.kernel import netns, syscalls
from imds_guard.kernel.syscalls import CLONE_NEWNS
from tests.adversary.model import Attack, Run, Verdict, Way
from tests.adversary.privileges import become_user, enter_user_namespace, in_child, in_mapped_user_namespace
from tests.adversary.scene import (
    ALLOWED,
    ALLOWED_GID,
    ATTACKER,
    ATTACKER_GID,
    IPV4,
    Scene,
    as_attacker,
    as_root,
    by_attacker,
)
from tests.adversary.talk import ask, fetch, make_socket, there

CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWCGROUP = 0x04000000, 0x08000000, 0x02000000  # include/uapi/linux/sched.h


def _as_allowed() -> bytes:
    become_user(ALLOWED, ALLOWED_GID)
    return fetch()


def _in_pid_namespace(fn: Callable[[], bytes]) -> Callable[[], bytes]:
    def attack() -> bytes:
        syscalls.unshare(syscalls.CLONE_NEWPID)
        return in_child(fn)

    return attack


def _as_root_of_a_container() -> bytes:
    """Connects as root in new namespaces of every kind but user: a container as Docker makes it by default."""
    syscalls.unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWCGROUP)
    return fetch()


def _mapped_one_to_one() -> bytes:
    """Connects in a user namespace that maps every ID to itself."""
    return in_mapped_user_namespace(["0 0 65536"], _as_allowed)


def _with_the_hosts_processes() -> bytes:
    syscalls.unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWCGROUP)
    return _as_allowed()


def _in_another_network(scene: Scene) -> bytes:
    """Connects in a new network namespace, with its own service at the locked address."""

    def attack() -> bytes:
        netns.unshare_network([IPV4])
        with scene.another_service(IPV4):
            return by_attacker(fetch)

    return scene.inside(attack)


# --- cgroups --------------------------------------------------------------------------------------------------------


def _move(path: str) -> None:
    with open(os.path.join(path, "cgroup.procs"), "w", encoding="ascii") as procs:
        procs.write(str(os.getpid()))


def _in_a_cgroup_of_its_own(scene: Scene) -> bytes:
    """Moves around in a delegated subtree (cgroups(7)), such as systemd gives every user."""
    path = os.path.join(scene.sandbox.cgroup, "delegated")

    def attack() -> bytes:
        become_user(ATTACKER, ATTACKER_GID)
        os.mkdir(os.path.join(path, "deeper"))
        _move(os.path.join(path, "deeper"))
        return fetch()

    def joined() -> bytes:
        _move(path)  # a delegated move must start inside the subtree
        return in_child(attack)

    os.mkdir(path)
    for name in ("", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"):
        os.chown(os.path.join(path, name), ATTACKER, ATTACKER_GID)
    try:
        return scene.inside(joined)
    finally:
        _remove_when_empty(os.path.join(path, "deeper"))
        _remove_when_empty(path)


def _remove_when_empty(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(path)


def _out_of_the_cgroup(scene: Scene) -> bytes:
    """Tries to move to every cgroup above, then connects."""
    above = scene.guard_cgroup

    def attack() -> bytes:
        for path in (above, os.path.dirname(above)):
            with contextlib.suppress(OSError):
                _move(path)
        return fetch()

    return scene.attacker(attack)


def _in_a_cgroup_namespace() -> bytes:
    """As root of a user namespace, makes a cgroup namespace and mounts cgroup2: its own cgroup is the root there."""
    enter_user_namespace(0, 0)
    syscalls.unshare(CLONE_NEWNS | CLONE_NEWCGROUP)
    return fetch()


def _moved_with_its_socket(scene: Scene) -> bytes:
    """Makes a socket, moves to another cgroup, connects. A socket belongs to the cgroup where it was made."""
    path = os.path.join(scene.sandbox.cgroup, "before")

    def attack() -> bytes:
        _move(path)
        with make_socket() as one:
            _move(scene.sandbox.cgroup)
            become_user(ATTACKER, ATTACKER_GID)
            one.connect(there())
            return ask(one)

    os.mkdir(path)
    try:
        return scene.inside(attack)
    finally:
        os.rmdir(path)


def _outside(scene: Scene) -> bytes:
    """Connects from a cgroup outside the guarded one, where no hook runs."""

    def attack() -> bytes:
        netns.enter(scene.sandbox.netns_fd)
        become_user(ATTACKER, ATTACKER_GID)
        return fetch()

    return in_child(attack)


def _moved_in_with_its_socket(scene: Scene) -> bytes:
    """Makes a socket outside the guarded cgroup, moves into it, connects."""

    def attack() -> bytes:
        netns.enter(scene.sandbox.netns_fd)
        with make_socket() as one:
            _move(scene.sandbox.cgroup)
            become_user(ATTACKER, ATTACKER_GID)
            one.connect(there())
            return ask(one)

    return in_child(attack)


_USERNS, _SUBTREE = ("userns",), ("subtree",)
_CONTAINER: Run = as_root(_in_pid_namespace(_as_root_of_a_container))

ATTACKS = (
    Attack(
        "container",
        "A container: its root, or a user whose ID is that of an allowed user on the host",
        Verdict.BLOCKED,
        'Callers in containers are denied, unless the policy says `containers = "allow"`.',
        {
            "root": Way(_CONTAINER),
            "allowed-number": Way(as_root(_in_pid_namespace(_as_allowed))),
            "mapped-one-to-one": Way(as_root(_mapped_one_to_one), _USERNS),
        },
    ),
    Attack(
        "container-host-pid",
        "A container in the PID and user namespaces of the host (`--pid=host`, `hostPID`)",
        Verdict.OPEN,
        "The hooks can't distinguish it from a process of the host, and judge it by its IDs.",
        {"allowed-number": Way(as_root(_with_the_hosts_processes))},
    ),
    Attack(
        "network-namespace",
        "Another network namespace",
        Verdict.BLOCKED,
        "The hooks are attached to a cgroup, and run in every network namespace.",
        {"new": Way(_in_another_network)},
    ),
    Attack(
        "cgroup",
        "Moving between cgroups, up or down, with or without a socket; a cgroup namespace (`unshare -C`)",
        Verdict.BLOCKED,
        "The guard is attached to the root cgroup, and all other cgroups are below it.",
        {
            "delegated": Way(_in_a_cgroup_of_its_own),
            "upwards": Way(_out_of_the_cgroup),
            "namespace": Way(as_attacker(_in_a_cgroup_namespace), _USERNS),
            "socket": Way(_moved_with_its_socket),
        },
    ),
    Attack(
        "cgroup-outside",
        "With `--cgroup`: a process outside that cgroup, or a socket that was made outside",
        Verdict.OPEN,
        "Only that cgroup and those below it are guarded. Without the option, the whole machine is.",
        {"process": Way(_outside, _SUBTREE), "socket": Way(_moved_in_with_its_socket, _SUBTREE)},
    ),
)
