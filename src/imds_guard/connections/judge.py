# SPDX-License-Identifier: Apache-2.0
"""Which of the sockets that were found a policy denies.

A connection is denied if one of its holders is denied. A holder is any process that has a descriptor of the socket; it
is judged as if it connected now. One denied holder is enough: it can read and write like all others.

The user who made the socket is judged, too, unless a holder runs as that user: the maker may have a copy that nobody
sees, in the queue of a Unix socket or in an io_uring, and show a set-user-ID program as the only holder. Root as maker
does not count beside a holder: services connect before they drop their privileges.

A connection to the listener of a filter is judged by where it was redirected from. It stays where the caller is sent to
the same filter still, with the same rules: these have the same number. A connection to an endpoint is denied where the
caller would be redirected now.

A socket that root made and that no process holds is no process's to use: the kernel has such sockets for iSCSI and NFS.
It is named and never cut, since a machine may have its disk behind it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from imds_guard.connections.find import FoundSocket, address_of
from imds_guard.connections.led import filters_of
from imds_guard.connections.values import Connection, Holder, WhyOpen
from imds_guard.errors import BadPolicy
from imds_guard.identity import caller_of_user, callers_of_pids, user_name
from imds_guard.kernel.abandonable import Limits, Worker
from imds_guard.kernel.namespaces import namespace_inode
from imds_guard.kernel.socket_holders import Holders
from imds_guard.kernel.untrusted import name_of
from imds_guard.policy.decide import Caller, Decision, Destination, decide
from imds_guard.policy.filter_address import Listener, is_filter_address, numbers_in
from imds_guard.policy.model import MAX_ID, Policy

_NO_GROUP = MAX_ID + 1


class Denied(NamedTuple):
    """A socket that the policy denies. ``connection.why_open`` is NO_PROCESS for one that must not be cut."""

    found: FoundSocket
    connection: Connection


class Rules(NamedTuple):
    """A policy, and what listens for its filters."""

    policy: Policy
    listeners: Mapping[tuple[int, int], Listener]
    """T and F of its address -> the listener."""
    by_nat: bool = False
    """NAT leads callers to them (led.py), not the hooks."""


def judge(rules: Rules, sockets: Sequence[FoundSocket], holders: Holders, limits: Limits) -> list[Denied]:
    """The sockets that the policy denies, with the reasons."""
    led = filters_of(sockets, rules.listeners.values(), limits) if rules.by_nat else {}
    known = _Known(callers_of_pids({pid for pids in holders.pids.values() for pid in pids}, limits))
    with Worker(_of_user) as worker:
        known.ask(worker, [(one.socket.uid, False) for one in sockets], limits)
        found = [(one, _denied(rules, one, holders, known, led.get(one.socket.identity))) for one in sockets]
        denied = [(one, verdict) for one, verdict in found if verdict is not None]
        shown = [caller.fsuid for _, verdict in denied for caller in verdict.holders.values()]
        known.ask(worker, [(uid, True) for uid in (*shown, *(one.socket.uid for one, _ in denied))], limits)
    return [Denied(one, _described(one, verdict, known)) for one, verdict in denied]


# --- users ----------------------------------------------------------------------------------------------------------

_Question = tuple[int, bool]
"""A user ID, and whether the name is asked for."""


def _of_user(question: _Question) -> Caller | str:
    """The user as after a login, or the name. In a child: the name service may not answer."""
    uid, name_alone = question
    if name_alone:
        return user_name(uid)
    try:
        return caller_of_user(uid)
    except BadPolicy:
        return Caller(uid, _NO_GROUP)  # without an account


class _Known:
    """Processes and users. A user whose name or groups could not be read has none."""

    def __init__(self, callers: dict[int, Caller]) -> None:
        self.callers = callers
        self._makers: dict[int, Caller] = {}
        self._names: dict[int, str] = {}
        self._host_namespace = _host_namespace()

    def ask(self, worker: Worker[_Question, Caller | str], questions: Iterable[_Question], limits: Limits) -> None:
        """Adds the answers."""
        for (uid, _), answer in worker.ask_each(sorted(set(questions)), limits):
            if isinstance(answer, Caller):
                self._makers[uid] = answer
            elif isinstance(answer, str):
                self._names[uid] = answer

    def maker(self, one: FoundSocket, callers: Collection[Caller]) -> Caller:
        """Outside the host's network namespace and without a holder on the host it is treated as a container's."""
        known = self._makers.get(one.socket.uid, Caller(one.socket.uid, _NO_GROUP))
        on_host = self.is_on_host(one) or any(not caller.in_container for caller in callers)
        return Caller(known.fsuid, known.fsgid, known.groups, pid_namespace_is_initial=on_host)

    def is_on_host(self, one: FoundSocket) -> bool:
        """Whether the socket is in the network namespace of process 1."""
        return one.namespace.inode == self._host_namespace

    def name(self, uid: int) -> str:
        """The number where the name is not known."""
        return self._names.get(uid, str(uid))


def _host_namespace() -> int | None:
    """The inode of the network namespace of process 1. None where it may not be read."""
    try:
        return namespace_inode("net", 1)
    except OSError:
        return None


# --- the verdict ----------------------------------------------------------------------------------------------------


class _Verdict(NamedTuple):
    holders: dict[int, Caller]
    why: str
    keep: bool


def _denied(rules: Rules, one: FoundSocket, holders: Holders, known: _Known, led_to: str | None) -> _Verdict | None:
    """None where everybody who could use the socket is allowed. ``led_to``: the filter at the other end."""
    pids = holders.pids.get(one.socket.inode, ())
    callers = {pid: known.callers[pid] for pid in pids if pid in known.callers}
    is_shown = any(caller.fsuid == one.socket.uid for caller in callers.values()) or (callers and not one.socket.uid)
    makers = [] if is_shown else [known.maker(one, callers.values())]
    for caller in (*callers.values(), *makers):
        why = _reason(rules, caller, one.destination, led_to)
        if why:
            return _Verdict(callers, why, not pids and one.socket.uid == 0 and known.is_on_host(one))
    return None


def _reason(rules: Rules, caller: Caller, destination: Destination, led_to: str | None) -> str:
    """Why the policy denies it, also in audit mode. "" where it is allowed."""
    if not rules.policy.filters or not is_filter_address(*destination):
        decision = decide(rules.policy, caller, destination)
        return "" if decision.reason.permits and decision.filter in (None, led_to) else _text(decision)
    listener = rules.listeners.get(numbers_in(destination.address))
    if listener is None:
        return "its filter has other rules now"
    decision = decide(rules.policy, caller, Destination(*listener.target))
    return "" if decision.reason.permits and decision.filter in (None, listener.filter) else _text(decision)


def _text(decision: Decision) -> str:
    where = f"{decision.reason.label} in lock {decision.lock!r}"
    return where if decision.filter is None else f"{where}, by filter {decision.filter!r}"


def _described(one: FoundSocket, verdict: _Verdict, known: _Known) -> Connection:
    return Connection(
        one.destination.protocol,
        (address_of(one.socket.local), one.socket.local_port),
        (one.destination.address, one.destination.port),
        tuple(Holder(pid, name_of(pid), known.name(caller.fsuid)) for pid, caller in verdict.holders.items()),
        known.name(one.socket.uid),
        one.namespace.inode,
        verdict.why,
        WhyOpen.NO_PROCESS if verdict.keep else None,
    )
