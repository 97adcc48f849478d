# SPDX-License-Identifier: Apache-2.0
"""Other IDs, or what looks like them."""

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
"""The first of IDs that /etc/subuid may give somebody."""


def _filesystem_id() -> bytes:
    """setfsuid(2) never fails; without CAP_SETUID it takes no ID but one of one's own."""
    with contextlib.suppress(PermissionError):
        become(fsuid=ALLOWED)
    return fetch()


def _real_id_left() -> bytes:
    """The real ID is the allowed one, the effective one is not: what getuid(2) says does not count."""
    become(groups=(), gids=(ATTACKER_GID,) * 3, uids=(ALLOWED, ATTACKER, ATTACKER))
    return fetch()


def _socket_of_an_allowed_user() -> bytes:
    """Opened as an allowed user, connected as another: iptables' owner match would let it through."""
    become(groups=(), gids=(ATTACKER_GID,) * 3, uids=(ALLOWED, ALLOWED, ATTACKER))
    with make_socket() as one:
        become(uids=(ATTACKER,) * 3)
        one.connect(there())
        return ask(one)


def _take_back() -> bytes:
    """A daemon that gave its ID away for a time: the saved one is still there."""
    become(groups=(), gids=(ATTACKER_GID,) * 3, uids=(ATTACKER, ATTACKER, ALLOWED))
    become(uids=(ATTACKER, ALLOWED, ALLOWED))
    return fetch()


def _racing_threads() -> bytes:
    """One thread becomes allowed and denied in turns, another one, who is neither, connects all the time."""
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

# bash connects by itself, and with -p it keeps the IDs that a set-ID bit gave it.
_ASK = f"exec 3<>/dev/tcp/%s/{PORT}; echo '?' >&3; read -r -t 3 -u 3 line; echo \"$line\""


def run_bash(program: str, address: str, uid: int, gid: int, groups: list[int]) -> bytes:
    """What the service at the address told a copy of bash."""
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
    """A member of a denied group runs a set-group-ID program that it made itself, of another group of its own."""

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
    """User namespaces, one in the other, in which the attacker is whoever it likes."""

    def attack() -> bytes:
        for number in inner:
            enter_user_namespace(number, ALLOWED_GROUP if number == ALLOWED else 0)
        if inner and os.geteuid() != inner[-1]:
            raise AssertionError(f"inside, the attacker is {os.geteuid()} and not {inner[-1]}")
        return fetch()

    return attack


def _subordinate(uids: Triple, groups: tuple[int, ...], address: str = IPV4) -> Callable[[], bytes]:
    """In a user namespace with a range of IDs that belong to nobody, beside the attacker's own."""

    def inside() -> bytes:
        become(groups=groups, gids=(5,) * 3, uids=uids)
        return fetch(address)

    return lambda: in_mapped_user_namespace([f"0 {_SUBORDINATE} 65536"], inside)


def _deny_listed_in_a_namespace() -> bytes:
    """As oneself, in a user namespace of one's own."""
    syscalls.unshare(syscalls.CLONE_NEWUSER)
    return fetch(DENY_LISTED)


_USERNS = ("userns",)

ATTACKS = (
    Attack(
        "id-tricks",
        "IDs that are not the effective ones: `setfsuid` without the right to it, a real ID that is allowed, a socket "
        "that was opened as an allowed user",
        Verdict.BLOCKED,
        "What counts is the ID that the kernel checks files with, of the task that connects, at that moment.",
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
        "Each thread has credentials of its own, and the hook reads those of the one that connects.",
        {"threads": Way(as_root(_racing_threads))},
    ),
    Attack(
        "id-allowed",
        "A process that may become an allowed user: a saved ID, `CAP_SETUID`, a set-user-ID or set-group-ID program",
        Verdict.OPEN,
        "The kernel makes it that user. Look for such programs (`find / -perm /6000`).",
        {
            "saved-id": Way(as_root(_take_back)),
            "cap-setuid": Way(as_attacker(_any_id, CAP_SETUID)),
            "setuid-program": Way(_set_id_program(0o4755, ALLOWED, ALLOWED_GID)),
            "setgid-program": Way(_set_id_program(0o2755, 0, ALLOWED_GROUP)),
        },
    ),
    Attack(
        "id-user-namespace",
        "User namespaces: as their root, as the number of an allowed user or group, nested, with ranges of IDs",
        Verdict.BLOCKED,
        "IDs are compared as the host has them, and a process in a user namespace counts as a container.",
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
        "A lock that allows by default does so in the host's user namespace alone.",
        {
            "own-id": Way(as_attacker(_deny_listed_in_a_namespace), _USERNS),
            "range": Way(as_root(_subordinate((7,) * 3, (), DENY_LISTED)), _USERNS),
        },
    ),
    Attack(
        "deny-list-group",
        "A set-group-ID program that a member of a denied group made itself, of another group",
        Verdict.BLOCKED,
        "The supplementary groups stay, and a login puts every group there (initgroups(3)).",
        {"supplementary": Way(_shed_by_a_set_id_program([OTHER_GROUP, DENIED_GROUP]))},
    ),
    Attack(
        "deny-list-primary",
        "The same where the denied group is the primary one alone, as a daemon may have it that drops its other groups",
        Verdict.OPEN,
        "The program's group takes its place. Deny such a daemon by its user, or better, list who is allowed.",
        {"primary": Way(_shed_by_a_set_id_program([OTHER_GROUP]))},
    ),
)
