# SPDX-License-Identifier: Apache-2.0
"""A cgroup and a network namespace with the service in them, the two policies, and what callers must see of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from imds_guard.backends.ebpf import EbpfBackend
from imds_guard.kernel import bpf
from imds_guard.kernel.sandbox import Sandbox
from tests.command import SERVICE, SERVICE_V6, Result
from tests.kernel import guards
from tests.release import callers
from tests.release.callers import BOTH, CONNECT_PORT, NEW, OLD, STRANGER, TALK_PORT, Caller, Talk
from tests.release.releases import Tree

_PORTS = f"{CONNECT_PORT}+{TALK_PORT},any"
_ENDPOINTS = ("--ip", f"{SERVICE}:{_PORTS}", "--ip", f"[{SERVICE_V6}]:{_PORTS}")
FIRST_USERS, SECOND_USERS = (OLD, BOTH), (NEW, BOTH)
NO_TRACES = {"attached": 0, "pins": 0}


class Scene:
    """A place for one guard, and the commands of some tree over it."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox

    def run(self, tree: Tree, verb: str, *arguments: str) -> Result:
        """A command of a tree, which must succeed."""
        result = self.attempt(tree, verb, *arguments)
        assert result.status == 0, result
        return result

    def attempt(self, tree: Tree, verb: str, *arguments: str) -> Result:
        """A command of a tree, which may fail."""
        return tree(verb, "--cgroup", self.sandbox.cgroup, *arguments)

    def start(self, tree: Tree, users: Sequence[int], *, strict: bool = False) -> Result:
        """``start`` of a tree: the service is locked for all but these users."""
        allowed = [argument for user in users for argument in ("--user", str(user))]
        return self.run(tree, "start", *allowed, *_ENDPOINTS, *(["--strict"] if strict else []))

    def status(self, tree: Tree) -> Any:
        """What ``status --json`` of a tree prints of a guard that must be whole."""
        return self.run(tree, "status", "--json").values

    def passing(self) -> set[int]:
        """The users that get through; all ways of one user must agree."""
        users = (OLD, NEW, BOTH, STRANGER)
        outcomes = {user: callers.try_once(self.sandbox, user) for user in users}
        assert all(len(seen) == 1 for seen in outcomes.values()), outcomes
        return {user for user, seen in outcomes.items() if seen == {"connected"}}

    def connections(self, user: int, patience_s: float = 10.0) -> list[Talk]:
        """Open connections of a user, one for each protocol and address family, with messages on all of them."""
        kinds = (socket.SOCK_STREAM, socket.SOCK_DGRAM)
        places = [(address, kind) for address in (SERVICE, SERVICE_V6) for kind in kinds]
        return [Talk(self.sandbox, user, address, kind, patience_s) for address, kind in places]

    def policy_maps(self) -> set[int]:
        """The kernel's IDs of the pinned maps that hold the policy."""
        pins = guards.folder_of(self.sandbox.cgroup).path
        found = set()
        for name in ("config", "settings", "endpoints", "members", "locks"):
            fd = bpf.pinned(os.path.join(pins, name))
            found.add(bpf.describe_map(fd)[0])
            os.close(fd)
        return found

    def traces(self) -> dict[str, int]:
        """Programs and pins that are left of the guard."""
        return guards.traces(self.sandbox.cgroup)


@contextmanager
def scene() -> Iterator[Scene]:
    """No guard yet; none is left at the end, whatever failed."""
    with Sandbox((SERVICE, SERVICE_V6)) as sandbox:
        callers.serve(sandbox)
        try:
            yield Scene(sandbox)
        finally:
            EbpfBackend(sandbox.cgroup).remove()


def users_of(status: Any) -> set[int]:
    """The users that the one lock of a status allows."""
    (lock,) = status["policy"]["locks"]
    return {user["id"] for user in lock["allow"]["users"]}


class Load:
    """A caller of each kind. Begin it with the first policy in force."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._callers = {user: Caller(sandbox, user) for user in (OLD, NEW, BOTH, STRANGER)}
        self.settle()

    def settle(self) -> None:
        """Returns when every caller has connected some more times."""
        for caller in self._callers.values():
            caller.settle()

    def expect_each_judged_by_one_of_the_policies(self) -> None:
        """Call it after one change from the first policy to the second."""
        self.settle()
        for user, caller in self._callers.items():
            for way, counts in caller.counts().items():
                who = (user, way, counts)
                assert counts.failed == 0, who
                if user == STRANGER:
                    assert (counts.connected, counts.cut_off) == (0, 0), who
                elif user == BOTH:
                    assert (counts.denied, counts.cut_off) == (0, 0), who
                else:  # the second policy judges every connect after the first one that it judges
                    assert counts.changes == 1, who
                    assert counts.cut_off <= 1, who
