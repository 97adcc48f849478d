# SPDX-License-Identifier: Apache-2.0
"""Attacks on the guard itself: taking it apart, flooding it, using the moment of a change."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Callable

from imds_guard.kernel import bpf
from imds_guard.kernel.bpf import syscall
from imds_guard.kernel.bpf.attr import GetId
from imds_guard.kernel.cgroup import open_cgroup
from tests.adversary.model import Attack, Run, Verdict, Way
from tests.adversary.privileges import become_user, enter_user_namespace
from tests.adversary.scene import ALLOWED, ALLOWED_GID, ATTACKER, ATTACKER_GID, Scene
from tests.adversary.talk import fetch, make_socket, there
from tests.kernel import guards

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Target:
    """The pins, links and maps of a guard."""

    pins: str
    cgroup: str
    cgroup_id: int


def target(cgroup: str) -> Target:
    """The guard of a cgroup."""
    with open_cgroup(cgroup) as opened:
        return Target(guards.folder_of(cgroup).path, cgroup, opened.id)


def _pins(of: Target, what: str) -> list[str]:
    return [os.path.join(of.pins, name) for name in os.listdir(of.pins) if name.startswith(what)]


def _detach(of: Target) -> None:
    for path in _pins(of, "link_"):
        bpf.link_detach(bpf.pinned(path))


def _detach_by_number(of: Target) -> None:
    for fd, _ in bpf.links_of_cgroup(of.cgroup_id):
        bpf.link_detach(fd)


def _replace(of: Target) -> None:
    path = os.path.join(of.pins, "link_connect4")
    bpf.link_update(bpf.pinned(path), guards.load_stranger(bpf.AttachType.CGROUP_INET4_CONNECT))


def _unpin(of: Target) -> None:
    for path in _pins(of, "link_"):
        os.unlink(path)


def _generation(of: Target) -> None:
    """Generation 0 locks nothing (bpf/imds_guard.h)."""
    bpf.map_update(bpf.pinned(os.path.join(of.pins, "config")), bytes(4), bytes(8))


def _generation_by_number(of: Target) -> None:
    for fd in _maps_by_number(of):
        shape = bpf.describe_map(fd)[1]
        if (shape.type, shape.value_size, shape.max_entries) == (bpf.MapType.ARRAY, 8, 1):
            bpf.map_update(fd, bytes(4), bytes(8))


def _maps_by_number(of: Target) -> Iterator[int]:
    folder = os.open(of.cgroup, os.O_RDONLY | os.O_DIRECTORY)
    for identity in bpf.attached_programs(folder, bpf.AttachType.CGROUP_INET4_CONNECT):
        program = bpf.program_by_id(identity)
        if program is None:
            raise AssertionError(f"program {identity} is gone")
        for number in bpf.describe_program(program).map_ids:
            yield syscall.call(bpf.Command.MAP_GET_FD_BY_ID, GetId(id=number))


TAKE_APART: dict[str, Callable[[Target], None]] = {
    "detach": _detach,
    "detach-by-number": _detach_by_number,
    "replace": _replace,
    "unpin": _unpin,
    "generation": _generation,
    "generation-by-number": _generation_by_number,
}
"""Each of these opens the lock when root does it (test_guard.py)."""


def _take_apart(act: Callable[[Target], None], *, in_namespace: bool) -> Run:
    def attack(scene: Scene) -> bytes:
        of = target(scene.guard_cgroup)

        def try_it() -> bytes:
            if in_namespace:
                enter_user_namespace(0, 0)  # root there has every capability, in that namespace
            with contextlib.suppress(OSError):
                act(of)
            return b""

        scene.attacker(try_it)
        return scene.attacker(fetch)

    return attack


# --- floods ---------------------------------------------------------------------------------------------------------

_RECORDS = 8000
"""More than the ring buffer of denials holds: IG_EVENTS_BYTES in bpf/imds_guard.h, about 100 bytes each."""
_USERS = 16_384 + 600
"""More than the rows of the report: IG_REPORT_ROWS."""


def _flood(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.connect(there())


def _many_denials() -> None:
    with make_socket(kind=socket.SOCK_DGRAM) as one:
        for _ in range(_RECORDS):
            _flood(one)


def _many_users() -> None:
    """Connects as many users, as root can, or a user to whom /etc/subuid assigns 65,536 IDs."""
    with make_socket(kind=socket.SOCK_DGRAM) as one:
        for uid in range(200_000, 200_000 + _USERS):
            _libc.setfsuid(uid)  # a single call for each: there are many
            _flood(one)


def _drown(scene: Scene, flood: Callable[[], None]) -> bytes:
    scene.inside(flood)
    if not scene.inside(_as_allowed):
        raise AssertionError("after the flood the allowed user got no answer")
    return scene.attacker(fetch)


def _drown_in_records(scene: Scene) -> bytes:
    def flood() -> None:
        become_user(ATTACKER, ATTACKER_GID)
        _many_denials()

    return _drown(scene, flood)


def _as_allowed() -> bytes:
    become_user(ALLOWED, ALLOWED_GID)
    return fetch()


_NAMESPACE = ("userns",)

ATTACKS = (
    Attack(
        "take-apart",
        "Detaching, replacing or unpinning the hooks, or writing to the maps, without privilege: through the pins, "
        "through the IDs of links and maps, as root of a user namespace",
        Verdict.BLOCKED,
        "The kernel requires capabilities of the initial user namespace for each of these (`CAP_BPF`, `CAP_NET_ADMIN`, "
        "`CAP_SYS_ADMIN`). With them the lock can be removed.",
        {
            **{name: Way(_take_apart(act, in_namespace=False)) for name, act in TAKE_APART.items()},
            **{
                f"{name}-in-namespace": Way(_take_apart(act, in_namespace=True), _NAMESPACE)
                for name, act in TAKE_APART.items()
            },
        },
    ),
    Attack(
        "pin-folder",
        "Folders and symbolic links that are placed where the pins will be, before `start`; the modes of pins, lock "
        "files and the configuration",
        Verdict.BLOCKED,
        "Only what root owns is used, no link is followed, and only root can open, rename or remove anything.",
        test="adversary/test_guard.py",
    ),
    Attack(
        "planted-cache",
        "A program that lets everybody through, in the cache of compiled programs or in place of its folder; an old "
        "file, another entry's content, one bit changed",
        Verdict.BLOCKED,
        "A file counts only where root alone can change it and every folder above, and where it is whole. Its name is "
        "a digest of all that it was made of.",
        test="kernel/test_compiled.py",
    ),
    Attack(
        "flood",
        "A flood of denials: more than the record buffer holds, from more users than the report has rows",
        Verdict.BLOCKED,
        "Records get lost and the loss is counted. Decisions don't depend on them. No user can fill the report: rows "
        "of others stay in it (`tests/vm/test_report.py`).",
        {
            "records": Way(_drown_in_records),
            "users": Way(lambda scene: _drown(scene, _many_users)),
        },
    ),
    Attack(
        "hang-a-reader",
        "A process whose command line can't be read: it holds the lock of its memory while it waits for a FUSE server",
        Verdict.BLOCKED,
        "What a process chose itself is read by a child with a deadline, which is left behind where it hangs. `start`, "
        "`check` and `watch` go on without the command line.",
        test="system/test_hostile.py",
    ),
    Attack(
        "fill-a-reader",
        "A command line of gigabytes; any number of processes, descriptors, sockets and network namespaces",
        Verdict.BLOCKED,
        "Everything that a process chose itself is read up to a size, a number and a time. What is beyond is counted, "
        "and each user's come in turn or after root's.",
        test="kernel/test_untrusted.py",
    ),
    Attack(
        "deceive-a-reader",
        "Terminal escapes in the name of a process; hundreds of processes that call themselves a metadata client",
        Verdict.BLOCKED,
        "What a process chose itself is escaped wherever it is printed. Processes of one client and user are one line "
        "with a count.",
        test="system/test_hostile.py",
    ),
    Attack(
        "races",
        "Constant connects while the policy changes, programs are replaced, processes fork and exit, threads change "
        "their IDs",
        Verdict.BLOCKED,
        "Each is judged by the whole old policy or the whole new one: no denied connect succeeds, no allowed "
        "one fails. "
        "`python3 -m tests.adversary.storm 1000000` tries a million.",
        test="adversary/test_storm.py",
    ),
    Attack(
        "kill",
        "Killing the guard, at any step of a command",
        Verdict.BLOCKED,
        "The lock needs no process. A command that is killed leaves the old policy or the new one in force.",
        test="kernel/test_kill.py",
    ),
)
