# SPDX-License-Identifier: Apache-2.0
"""Attacks by other IDs, real ones and apparent ones."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from typing import Callable

from imds_guard.kernel import syscalls
from imds_guard.kernel.credentials import Triple, become
from tests.adversary.model import Attack, Run, Verdict, Way
from tests.adversary.privileges import CAP_SETUID, enter_user_namespace, in_mapped_user_namespace
from tests.adversary.scene import (
    ALLOWED,
    ALLOWED_GID,
    ALLOWED_GROUP,
    ATTACKER,
    ATTACKER_GID,
    BYSTANDER,
    BYSTANDER_GID,
    DENIED_GROUP,
    DENY_LISTED,
    IPV4,
    OTHER_GROUP,
    PORT,
    Scene,
    as_attacker,
    as_root,
)
from tests.adversary.talk import ask, fetch, make_socket, there

_TRIES = 2000
_SUBORDINATE = 165_536
"""The first of the IDs that /etc/subuid typically assigns."""


def _filesystem_id() -> bytes:
    """Calls setfsuid(2), which never fails. Without CAP_SETUID it only accepts IDs that the task already has."""
    with contextlib.suppress(PermissionError):
        become(fsuid=ALLOWED)
    return fetch()


def _real_id_left() -> bytes:
    """Connects with an allowed real ID and another effective one: getuid(2) shows the real ID, which does not count."""
    become(groups=(), gids=(ATTACKER_GID,) * 3, uids=(ALLOWED, ATTACKER, ATTACKER))
    return fetch()


def _socket_of_an_allowed_user() -> bytes:
    """Opens the socket as an allowed user and connects as another. The owner match of iptables would allow this."""
    become(groups=(), gids=(ATTACKER_GID,) * 3, uids=(ALLOWED, ALLOWED, ATTACKER))
    with make_socket() as one:
        become(uids=(ATTACKER,) * 3)
        one.connect(there())
        return ask(one)


def _take_back() -> bytes:
    """Returns to the saved user ID, as a daemon does that gave up its ID for a time."""
    become(groups=(), gids=(ATTACKER_GID,) * 3, uids=(ATTACKER, ATTACKER, ALLOWED))
    become(uids=(ATTACKER, ALLOWED, ALLOWED))
    return fetch()


def _racing_threads() -> bytes:
    """One thread changes between an allowed and a denied user; another thread, of a third user, keeps connecting."""
    stop = threading.Event()
    found: list[bytes] = []

    def flicker() -> None:
        become(groups=(), gids=(ATTACKER_GID,) * 3, uids=(ATTACKER, ALLOWED, ALLOWED))
        while not stop.is_set():
            become(uids=(ATTACKER, ATTACKER, ALLOWED))
            become(uids=(ATTACKER, ALLOWED, ALLOWED))

    def attack() -> None:
        become(groups=(), gids=(ATTACKER_GID,) * 3, uids=(ATTACKER,) * 3)
        for _ in range(_TRIES):
            with make_socket() as one:
                if one.connect_ex(there()) == 0:
                    found.append(ask(one))
                    return

    threads = [threading.Thread(target=flicker), threading.Thread(target=attack)]
    for thread in threads:
        thread.start()
    threads[1].join()
    stop.set()
    threads[0].join()
    if not found:
        raise PermissionError(f"refused {_TRIES} times")
    return found[0]


def _any_id() -> bytes:
    become(uids=(ALLOWED,) * 3)
    return fetch()


# --- programs that run as somebody else -------------------------------------------------------------------------------

# bash can connect (/dev/tcp), and with -p it keeps the IDs of its set-ID bits.
_ASK = f"exec 3<>/dev/tcp/%s/{PORT}; echo '?' >&3; read -r -t 3 -u 3 line; echo \"$line\""


def run_bash(program: str, address: str, uid: int, gid: int, groups: list[int]) -> bytes:
    """The answer of the service at the address to a copy of bash."""
    done = subprocess.run(
        [program, "-p", "-c", _ASK % address],
        capture_output=True,
        check=False,
        user=uid,
        group=gid,
        extra_groups=groups,
    )
    if not done.stdout.strip():
        raise OSError(0, done.stderr.decode(errors="replace").strip())
    return done.stdout.strip()


def _set_id_program(mode: int, owner: int, group: int) -> Run:
    def attack(scene: Scene) -> bytes:
        path = str(scene.folder / f"shell-{mode:o}")
        shutil.copyfile("/bin/bash", path)
        os.chown(path, owner, group)
        os.chmod(path, mode)
        return scene.inside(lambda: run_bash(path, IPV4, ATTACKER, ATTACKER_GID, []))

    return attack


def _shed_by_a_set_id_program(groups: list[int]) -> Run:
    """A member of a denied group makes and runs a set-group-ID program of another of its groups."""

    def attack(scene: Scene) -> bytes:
        path = str(scene.folder / f"shell-of-{len(groups)}")
        shutil.copyfile("/bin/bash", path)
        os.chown(path, BYSTANDER, BYSTANDER_GID)
        os.chmod(path, 0o755)

        def make_set_group_id() -> None:
            become(groups=(OTHER_GROUP,), gids=(DENIED_GROUP,) * 3, uids=(BYSTANDER,) * 3)
            os.chown(path, -1, OTHER_GROUP)
            os.chmod(path, 0o2755)

        scene.inside(make_set_group_id)
        return scene.inside(lambda: run_bash(path, DENY_LISTED, BYSTANDER, DENIED_GROUP, groups))

    return attack


# --- user namespaces ------------------------------------------------------------------------------------------------


def _own_namespace(*inner: int) -> Callable[[], bytes]:
    """Nested user namespaces, in which the attacker has any user ID it likes."""

    def attack() -> bytes:
        for number in inner:
            enter_user_namespace(number, ALLOWED_GROUP if number == ALLOWED else 0)
        if inner and os.geteuid() != inner[-1]:
            raise AssertionError(f"inside, the attacker is {os.geteuid()} and not {inner[-1]}")
        return fetch()

    return attack


def _subordinate(uids: Triple, groups: tuple[int, ...], address: str = IPV4) -> Callable[[], bytes]:
    """In a user namespace with a range of unused IDs, beside the attacker's own."""

    def inside() -> bytes:
        become(groups=groups, gids=(5,) * 3, uids=uids)
        return fetch(address)

    return lambda: in_mapped_user_namespace([f"0 {_SUBORDINATE} 65536"], inside)


def _deny_listed_in_a_namespace() -> bytes:
    """Keeps its own user ID, in its own user namespace."""
    syscalls.unshare(syscalls.CLONE_NEWUSER)
    return fetch(DENY_LISTED)


def _program_of_a_sub_id(scene: Scene) -> bytes:
    """In a user namespace, makes a set-user-ID program that belongs to one of its sub-IDs; runs it outside of it."""
    folder = scene.folder / "sub-id"
    folder.mkdir(mode=0o755, exist_ok=True)
    os.chown(folder, ATTACKER, ATTACKER_GID)
    path = str(folder / "shell")

    def make() -> None:
        become(groups=(), gids=(0,) * 3, uids=(0,) * 3)
        shutil.copyfile("/bin/bash", path)
        os.chown(path, 1, 0)
        os.chmod(path, 0o4755)

    in_mapped_user_namespace([f"0 {ATTACKER} 1", f"1 {_SUBORDINATE} 65535"], make, [f"0 {ATTACKER_GID} 1"])
    return scene.inside(lambda: run_bash(path, DENY_LISTED, ATTACKER, ATTACKER_GID, []))


_USERNS = ("userns",)

ATTACKS = (
    Attack(
        "id-tricks",
        "IDs other than the effective ones: `setfsuid` without `CAP_SETUID`, an allowed real ID, a socket that was "
        "opened as an allowed user",
        Verdict.BLOCKED,
        "The hooks read the fsuid of the task that connects, at that moment: the ID that the kernel checks files with.",
        {
            "setfsuid": Way(as_attacker(_filesystem_id)),
            "real-id": Way(as_root(_real_id_left)),
            "opened-before": Way(as_root(_socket_of_an_allowed_user)),
        },
    ),
    Attack(
        "id-race",
        "Threads that change their IDs while another one connects",
        Verdict.BLOCKED,
        "Each thread has its own credentials. The hooks read those of the thread that connects.",
        {"threads": Way(as_root(_racing_threads))},
    ),
    Attack(
        "id-allowed",
        "A process that can become an allowed user: by a saved ID, `CAP_SETUID`, a set-user-ID or set-group-ID program",
        Verdict.OPEN,
        "To the kernel it then is that user. Look for such programs (`find / -perm /6000`).",
        {
            "saved-id": Way(as_root(_take_back)),
            "cap-setuid": Way(as_attacker(_any_id, CAP_SETUID)),
            "setuid-program": Way(_set_id_program(0o4755, ALLOWED, ALLOWED_GID)),
            "setgid-program": Way(_set_id_program(0o2755, 0, ALLOWED_GROUP)),
        },
    ),
    Attack(
        "id-user-namespace",
        "User namespaces: as root in one, with the ID of an allowed user or group, nested, with ranges of IDs",
        Verdict.BLOCKED,
        "The hooks compare IDs of the initial user namespace. A process in another one counts as a container.",
        {
            "root": Way(as_attacker(_own_namespace(0)), _USERNS),
            "allowed-number": Way(as_attacker(_own_namespace(ALLOWED)), _USERNS),
            "nested": Way(as_attacker(_own_namespace(0, ALLOWED)), _USERNS),
            "range": Way(as_root(_subordinate((ALLOWED,) * 3, (ALLOWED_GROUP,))), _USERNS),
        },
    ),
    Attack(
        "deny-list-namespace",
        "A user on a deny list who takes other IDs, or drops groups, in a user namespace",
        Verdict.BLOCKED,
        "A lock that allows by default does so only in the initial user namespace.",
        {
            "own-id": Way(as_attacker(_deny_listed_in_a_namespace), _USERNS),
            "range": Way(as_root(_subordinate((7,) * 3, (), DENY_LISTED)), _USERNS),
        },
    ),
    Attack(
        "deny-list-sub-id",
        "A user on a deny list, or a member of a denied group, with sub-IDs (`/etc/subuid`): a set-user-ID program "
        "that belongs to one of these IDs, made in a user namespace and run outside of it",
        Verdict.OPEN,
        "It runs as a user whom no list names. `start` and `check` warn of such users. An allowlist stops them.",
        {"set-user-id": Way(_program_of_a_sub_id, _USERNS)},
    ),
    Attack(
        "deny-list-group",
        "A set-group-ID program of another group, made by a member of a denied group",
        Verdict.BLOCKED,
        "The program keeps the supplementary groups, and a login puts every group there (initgroups(3)).",
        {"supplementary": Way(_shed_by_a_set_id_program([OTHER_GROUP, DENIED_GROUP]))},
    ),
    Attack(
        "deny-list-primary",
        "A set-group-ID program of another group, run by a daemon whose only denied group is its primary group",
        Verdict.OPEN,
        "The group of the program replaces the primary group. Deny the daemon's user instead, or use an allowlist.",
        {"primary": Way(_shed_by_a_set_id_program([OTHER_GROUP]))},
    ),
)
