# SPDX-License-Identifier: Apache-2.0
"""Cuts connections that were opened before a policy and that the policy does not allow.

The hooks judge a connect, and these connections are past it. So the search begins when the policy is in force. It is
repeated until it finds nothing: a connect that the policy before has allowed may become a connection only now.

A connection is denied if one of its holders is denied. A holder is any process that has a descriptor of the socket; it
is judged as if it connected now. One denied holder is enough: it can read and write like all others. A socket without a
holder is judged by the user who made it: it is being passed from one process to another, or belongs to an io_uring. A
socket without a file is left alone: nobody can use it.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

from imds_guard.connections.find import FoundSocket, Scope, address_of, find_sockets, hidden_processes, open_sock_diag
from imds_guard.connections.values import Connection, CutResult, Holder, WhyOpen
from imds_guard.errors import BadPolicy, system_text
from imds_guard.identity import caller_of_user, callers_of_pids, user_name
from imds_guard.kernel.namespaces import Namespace, namespace_inode
from imds_guard.kernel.socket_holders import LIMITS, Holders, holders_of
from imds_guard.kernel.untrusted import name_of
from imds_guard.policy.decide import Caller, Destination, decide
from imds_guard.policy.model import MAX_ID, Mode, Policy

MAX_SEARCHES = 5
"""When this many searches in a row find connections, new ones are opened all the time."""

_NO_GROUP = MAX_ID + 1


def find_denied(policy: Policy, scope: Scope) -> CutResult:
    """The connections that ``policy`` would not allow. None is cut."""
    return _result(_search(policy, scope), {}, WhyOpen.AUDIT if policy.mode is Mode.AUDIT else None)


def cut_denied(policy: Policy, scope: Scope, keep: WhyOpen | None = None) -> CutResult:
    """Cuts the connections that ``policy`` does not allow; call it when the policy is in force. ``keep`` cuts none."""
    cut: dict[bytes, Connection] = {}
    for _ in range(MAX_SEARCHES):
        found = _search(policy, scope)
        if keep is not None or not found.denied:
            return _result(found, cut, keep)
        try:
            _cut(found, cut)
        except OSError as error:
            after = _search(policy, scope)
            if error.errno == errno.EOPNOTSUPP:
                return _result(after, cut, WhyOpen.UNSUPPORTED)
            after.errors.append(f"ending a connection: {system_text(error)}")
            return _result(after, cut, WhyOpen.REFUSED)
    return _result(_search(policy, scope), cut, WhyOpen.REOPENED)


class _Denied(NamedTuple):
    found: FoundSocket
    connection: Connection


class _Search(NamedTuple):
    searched: tuple[Namespace, ...]
    errors: list[str]
    denied: list[_Denied]


def _result(found: _Search, cut: dict[bytes, Connection], why_open: WhyOpen | None) -> CutResult:
    still_open = tuple(one.connection for one in found.denied)
    why = why_open if still_open else None
    return CutResult(found.searched, tuple(found.errors), tuple(cut.values()), still_open, why)


def _cut(search: _Search, cut: dict[bytes, Connection]) -> None:
    """Ends the denied connections and adds them to ``cut``. Raises OSError."""
    for namespace in {one.found.namespace for one in search.denied}:
        with suppress(FileNotFoundError), open_sock_diag(namespace) as diag:  # its last process may have ended
            for one in search.denied:
                if one.found.namespace == namespace and diag.destroy(one.found.socket):
                    cut[one.found.socket.identity] = one.connection


# --- judging --------------------------------------------------------------------------------------------------------


def _search(policy: Policy, scope: Scope) -> _Search:
    """The connections of the scope that the policy denies."""
    found = find_sockets(policy, scope)
    holders = holders_of(frozenset(one.socket.inode for one in found.sockets))
    if holders.hidden:
        found.errors.append(f"the sockets of {hidden_processes(holders.hidden)} were not seen")
    if holders.not_read:
        found.errors.append(f"not all sockets of {holders.not_read} processes were seen before the time was over")
    callers = callers_of_pids({pid for pids in holders.pids.values() for pid in pids}, LIMITS)
    judge = _Judge(policy, holders, callers)
    judged = [(one, judge.denied(one)) for one in found.sockets]
    denied = [_Denied(one, connection) for one, connection in judged if connection is not None]
    return _Search(tuple(found.searched), found.errors, denied)


class _Judge:
    """Decides about sockets. It reads each user once."""

    def __init__(self, policy: Policy, holders: Holders, callers: dict[int, Caller]) -> None:
        self._policy = policy
        self._holders = holders
        self._callers = callers
        self._creators: dict[int, Caller] = {}
        self._reasons: dict[tuple[Caller, Destination], str] = {}
        self._named: dict[int, Holder] = {}
        self._user_name = lru_cache(maxsize=None)(user_name)
        self._host_namespace = _host_namespace()

    def denied(self, one: FoundSocket) -> Connection | None:
        """The connection with the reason, if the policy denies it."""
        pids = self._holders.pids.get(one.socket.inode, ())
        callers = {pid: self._callers[pid] for pid in pids if pid in self._callers}
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
        """Why the policy denies it, also in audit mode. "" where it is allowed."""
        if (caller, destination) not in self._reasons:
            decision = decide(self._policy, caller, destination)
            reason = "" if decision.reason.permits else f"{decision.reason.label} in lock {decision.lock!r}"
            self._reasons[(caller, destination)] = reason
        return self._reasons[(caller, destination)]

    def _holder(self, pid: int, caller: Caller) -> Holder:
        if pid not in self._named:
            self._named[pid] = Holder(pid, name_of(pid), self._user_name(caller.fsuid))
        return self._named[pid]

    def _creator(self, one: FoundSocket) -> Caller:
        """The user who made the socket.

        Outside the host's network namespace it can't be known whether a container made it: treat it as one.
        """
        uid = one.socket.uid
        if uid not in self._creators:
            self._creators[uid] = _with_account(uid)
        known = self._creators[uid]
        on_host = one.namespace.inode == self._host_namespace
        return Caller(known.fsuid, known.fsgid, known.groups, pid_namespace_is_initial=on_host)


def _with_account(uid: int) -> Caller:
    """The user with the groups of a new login; without groups where there is no account."""
    try:
        return caller_of_user(uid)
    except BadPolicy:
        return Caller(uid, _NO_GROUP)


def _host_namespace() -> int | None:
    """The inode of the network namespace of process 1. None where it may not be read."""
    try:
        return namespace_inode("net", 1)
    except OSError:
        return None
