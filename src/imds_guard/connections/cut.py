# SPDX-License-Identifier: Apache-2.0
"""Connections that were there before a policy and that it would not have allowed: found, and cut.

The hooks judge a connect, and these have theirs behind them. So they are looked for when the policy is in force, again
and again until there is none: a connect that was judged by the policy before may only now become a connection.

Who is judged: every process that holds the socket, as its next connect would be. One of them that is not allowed is
enough, for it can read and write there as well as the others. A socket that no process holds is judged by the user who
made it: it is in flight between two processes, or belongs to an io_uring. One that no file leads to is left alone:
nobody can use it any more.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from functools import lru_cache
from typing import Callable, NamedTuple

from imds_guard.connections.find import Candidate, Scope, address_of, ask, candidates, processes
from imds_guard.connections.values import AUDIT, COME_BACK, REFUSED, UNABLE, Connection, Holder, Sweep
from imds_guard.errors import BadPolicy, NotPermitted, system_text
from imds_guard.identity import NoSuchProcess, caller_of_pid, caller_of_user, user_name
from imds_guard.kernel.namespaces import Namespace
from imds_guard.kernel.processes import process_name
from imds_guard.kernel.socket_holders import Holders, holders_of
from imds_guard.policy.decide import Caller, Destination, decide
from imds_guard.policy.model import MAX_ID, Mode, Policy
from imds_guard.text import escaped

PASSES = 5
"""A look that finds nothing ends it; this many that find something mean that connections come back."""

_NO_GROUP = MAX_ID + 1


def look(policy: Policy, scope: Scope) -> Sweep:
    """The connections that ``policy`` would not allow; none is touched."""
    return _swept(_find(policy, scope), {}, AUDIT if policy.mode is Mode.AUDIT else "")


def sweep(policy: Policy, scope: Scope, keep: str | None = None) -> Sweep:
    """Cuts the connections that ``policy``, which is in force, does not allow; with ``keep`` it names them only."""
    cut: dict[bytes, Connection] = {}
    for _ in range(PASSES):
        found = _find(policy, scope)
        if keep is not None or not found.denied:
            return _swept(found, cut, keep or "")
        try:
            _cut(found, cut)
        except OSError as error:
            after = _find(policy, scope)
            if error.errno == errno.EOPNOTSUPP:
                return _swept(after, cut, UNABLE)
            after.unseen.append(f"ending a connection: {system_text(error)}")
            return _swept(after, cut, REFUSED)
    return _swept(_find(policy, scope), cut, COME_BACK)


class _Denied(NamedTuple):
    candidate: Candidate
    connection: Connection


class _Found(NamedTuple):
    looked_into: tuple[Namespace, ...]
    unseen: list[str]
    denied: list[_Denied]


def _swept(found: _Found, cut: dict[bytes, Connection], why_left: str) -> Sweep:
    left = tuple(one.connection for one in found.denied)
    return Sweep(found.looked_into, tuple(found.unseen), tuple(cut.values()), left, why_left if left else "")


def _cut(found: _Found, cut: dict[bytes, Connection]) -> None:
    """Ends what is denied and enters it into ``cut``. Raises OSError."""
    for namespace in {one.candidate.namespace for one in found.denied}:
        with suppress(FileNotFoundError), ask(namespace) as diag:  # its last process may have ended
            for one in found.denied:
                if one.candidate.namespace == namespace and diag.destroy(one.candidate.socket):
                    cut[one.candidate.socket.identity] = one.connection


# --- judging --------------------------------------------------------------------------------------------------------


def _find(policy: Policy, scope: Scope) -> _Found:
    """The sockets of the scope that the policy denies."""
    found = candidates(policy, scope)
    holders = holders_of(frozenset(one.socket.inode for one in found.sockets))
    if holders.hidden:
        found.unseen.append(f"the sockets of {processes(holders.hidden)} were not seen")
    judge = _Judge(policy, holders)
    judged = [(one, judge.denied(one)) for one in found.sockets]
    denied = [_Denied(one, connection) for one, connection in judged if connection is not None]
    return _Found(tuple(found.looked_into), found.unseen, denied)


class _Judge:
    """Decides, and remembers what it has read of processes and users."""

    def __init__(self, policy: Policy, holders: Holders) -> None:
        self._policy = policy
        self._holders = holders
        self._callers: dict[int, Caller | None] = {}
        self._users: dict[int, Caller] = {}
        self._reasons: dict[tuple[Caller, Destination], str] = {}
        self._named: dict[int, Holder] = {}
        self._user_name = lru_cache(maxsize=None)(user_name)
        self._initial_namespace = _inode("/proc/1/ns/net")

    def denied(self, one: Candidate) -> Connection | None:
        """The connection with the reason why, if the policy denies it."""
        pids = self._holders.pids.get(one.socket.inode, ())
        callers = {pid: caller for pid in pids for caller in [self._caller(pid)] if caller is not None}
        judged = list(callers.values()) or [self._creator(one)]
        why = next((reason for reason in (self._reason(caller, one.destination) for caller in judged) if reason), "")
        if not why:
            return None
        return Connection(
            one.destination.protocol,
            (address_of(one.socket.local), one.socket.local_port),
            (one.destination.address, one.destination.port),
            tuple(self._holder(pid, caller) for pid, caller in callers.items()),
            self._user_name(one.socket.uid),
            one.namespace.inode,
            why,
        )

    def _reason(self, caller: Caller, destination: Destination) -> str:
        """Why not, in audit mode too; "" where it is allowed."""
        if (caller, destination) not in self._reasons:
            decision = decide(self._policy, caller, destination)
            words = "" if decision.reason.permits else f"{decision.reason.label} in lock {decision.lock!r}"
            self._reasons[(caller, destination)] = words
        return self._reasons[(caller, destination)]

    def _holder(self, pid: int, caller: Caller) -> Holder:
        if pid not in self._named:
            self._named[pid] = Holder(pid, escaped(process_name(pid)), self._user_name(caller.fsuid))
        return self._named[pid]

    def _caller(self, pid: int) -> Caller | None:
        if pid not in self._callers:
            self._callers[pid] = _or_none(lambda: caller_of_pid(pid))
        return self._callers[pid]

    def _creator(self, one: Candidate) -> Caller:
        """Elsewhere than in the host's network namespace it counts as a container's: nobody can tell."""
        uid = one.socket.uid
        if uid not in self._users:
            self._users[uid] = _or_none(lambda: caller_of_user(uid)) or Caller(uid, _NO_GROUP)
        known = self._users[uid]
        at_home = one.namespace.inode == self._initial_namespace
        return Caller(known.fsuid, known.fsgid, known.groups, pid_namespace_is_initial=at_home)


def _or_none(read: Callable[[], Caller]) -> Caller | None:
    """None for a process that has ended or may not be looked at, and for a user without an account."""
    try:
        return read()
    except (NoSuchProcess, NotPermitted, BadPolicy):
        return None


def _inode(path: str) -> int | None:
    try:
        return os.stat(path).st_ino
    except OSError:
        return None
