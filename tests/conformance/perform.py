# SPDX-License-Identifier: Apache-2.0
"""Performs a row in a child of the sandbox: makes the kind of task, takes the IDs, connects."""

from __future__ import annotations

import os
import threading
from typing import Callable

from imds_guard.kernel import netns, syscalls
from imds_guard.kernel.children import fork, run_in_child
from imds_guard.kernel.credentials import become
from imds_guard.policy.filter_numbers import assigned, listeners_of
from tests.conformance import witness
from tests.conformance.attempts import make_socket, outcome
from tests.conformance.families import ADDRESSES
from tests.conformance.model import USER_NAMESPACE_OFFSET, Case, Setting

_MAPPED_IDS = 100_000


def perform(case: Case) -> str:
    """The outcome of the row's attempt: ``connected`` or the name of an errno."""
    return SETTINGS[case.who.setting](case)


def _attempt(case: Case) -> str:
    """Takes the IDs in the calling thread alone, then connects."""
    early = make_socket(case.attempt) if case.who.socket_first else None
    who = case.who
    become(uids=who.uids, gids=who.gids, groups=who.groups, fsuid=who.fsuid, fsgid=who.fsgid)
    return outcome(case.attempt, early or make_socket(case.attempt))


def _in_thread(case: Case) -> str:
    """Connects in a second thread. Raises AssertionError when the first thread's IDs changed with it."""
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(_attempt(case)))
    thread.start()
    thread.join()
    if os.geteuid() != 0:
        raise AssertionError("the thread's IDs became the process's")
    return results[0]


def _in_child(case: Case) -> str:
    become(groups=case.who.parent_groups)
    return run_in_child(lambda: _attempt(case))


def _after_unshare_pid(case: Case) -> str:
    syscalls.unshare(syscalls.CLONE_NEWPID)
    return _attempt(case)


def _in_pid_namespace(case: Case) -> str:
    syscalls.unshare(syscalls.CLONE_NEWPID)

    def first() -> str:
        if os.getpid() != 1:
            raise AssertionError("the child is not the first process of its PID namespace")
        return _attempt(case)

    # run_in_child() opens a pidfd for the child, by its PID in the outer namespace.
    return run_in_child(first)


def _in_user_namespace(case: Case) -> str:
    """A second process writes the maps: the child may not map IDs that are not its own (user_namespaces(7))."""
    to_parent, to_child = os.pipe(), os.pipe()

    def inside() -> str:
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        os.write(to_parent[1], b"%d" % os.getpid())
        os.read(to_child[0], 1)
        return _attempt(case)

    def write_maps() -> None:
        pid = int(os.read(to_parent[0], 32))
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{pid}/{name}", "w", encoding="ascii") as id_map:
                id_map.write(f"0 {USER_NAMESPACE_OFFSET} {_MAPPED_IDS}")
        os.write(to_child[1], b".")

    fork(write_maps)
    return run_in_child(inside)


def _in_network_namespace(case: Case) -> str:
    netns.unshare_network(ADDRESSES)
    allow_fastopen()
    sockets = witness.listen()
    fork(lambda: witness.confirm_forever(sockets))
    filters = witness.listen_as_filters(listeners_of(case.policy, assigned(case.policy)), mark=None)
    fork(lambda: witness.greet_forever(filters))
    for one in (*sockets, *filters):
        one.close()
    return _attempt(case)


def allow_fastopen() -> None:
    """Enables TCP Fast Open without a cookie for every client and listener of this namespace: the SYN carries data.

    Source: tcp_fastopen in Documentation/networking/ip-sysctl.rst.
    """
    with open("/proc/sys/net/ipv4/tcp_fastopen", "w", encoding="ascii") as switch:
        switch.write(str(0x1 | 0x2 | 0x4 | 0x200 | 0x400))


SETTINGS: dict[Setting, Callable[[Case], str]] = {
    Setting.PROCESS: _attempt,
    Setting.THREAD: _in_thread,
    Setting.CHILD: _in_child,
    Setting.UNSHARED_PID: _after_unshare_pid,
    Setting.PID_NAMESPACE: _in_pid_namespace,
    Setting.USER_NAMESPACE: _in_user_namespace,
    Setting.NETWORK_NAMESPACE: _in_network_namespace,
}
