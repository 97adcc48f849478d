# SPDX-License-Identifier: Apache-2.0
"""Cuts connections that were opened before a policy and that the policy does not allow.

The hooks judge a connect, and these connections are past it. So the search begins when the policy is in force. It is
repeated until it finds nothing: a connect that the policy before has allowed may become a connection only now.

Everything that is read and cut here belongs to others. So no lock is held, all of it has a deadline, and whatever can
hang is done by children. What is left is named.

judge.py says who is judged. A socket without a file is left alone: nobody can use it. A connection that its peer has
made stays: tcp_birth.py says how that is known. Where nobody can tell it is cut.
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Callable, TypeVar

from imds_guard.connections import find
from imds_guard.connections.find import Scope, find_sockets, hidden_processes
from imds_guard.connections.judge import Denied, Rules, judge
from imds_guard.connections.values import Connection, CutResult, SweepEnd, WhyOpen
from imds_guard.errors import system_text
from imds_guard.kernel import socket_holders
from imds_guard.kernel.abandonable import Limits
from imds_guard.kernel.namespaces import Namespace
from imds_guard.kernel.sock_destroy import Ended, Ending, Target, end_each
from imds_guard.kernel.socket_holders import Holders, holders_of
from imds_guard.policy.filter_address import Listener
from imds_guard.policy.model import Mode, Policy

T = TypeVar("T")

SWEEP_S = 5.0
"""For everything. 2,000 sockets of 2,600 processes take 1 s."""
CUT_S = 2.0
"""For one round of cuts. A socket is ended in microseconds, unless a system call has locked it."""
MAX_SEARCHES = 5
"""When this many searches in a row find connections, new ones are opened all the time."""


def find_denied(policy: Policy, scope: Scope, listeners: Iterable[Listener] = (), *, by_nat: bool = False) -> CutResult:
    """The connections that ``policy`` would not allow. None is cut. ``listeners`` are those of its filters.

    ``by_nat``: NAT leads callers to these.
    """
    why = WhyOpen.AUDIT if policy.mode is Mode.AUDIT else None
    sweep = Sweep(scope, why, cut=False, listeners=listeners, by_nat=by_nat)
    sweep.look(policy)
    return sweep.result()


def cut_denied(
    policy: Policy, scope: Scope, keep: WhyOpen | None = None, listeners: Iterable[Listener] = ()
) -> CutResult:
    """Cuts the connections that ``policy`` does not allow; call it when the policy is in force. ``keep`` cuts none."""
    sweep = Sweep(scope, keep, cut=keep is None, listeners=listeners)
    sweep.look(policy)
    return sweep.result()


class Sweep:
    """A search that cuts what it finds. ``is_wanted`` becomes False when another command has changed the policy."""

    def __init__(
        self,
        scope: Scope,
        keep: WhyOpen | None,
        is_wanted: Callable[[], bool] = lambda: True,
        *,
        cut: bool = True,
        listeners: Iterable[Listener] = (),
        by_nat: bool = False,
    ) -> None:
        self._scope = scope
        self._keep = keep
        self._is_wanted = is_wanted
        self._cut = cut
        self._listeners = {(one.target_number, one.number): one for one in listeners}
        self._by_nat = by_nat
        self._done: dict[bytes, Connection] = {}
        self._open: dict[bytes, Connection] = {}
        self._why: dict[bytes, WhyOpen | None] = {}
        """Why connections were left open when they were found. They are not tried again."""
        self._closed: set[bytes] = set()
        """They were cut or are gone, or their peers have made them."""
        self._searched: tuple[Namespace, ...] | None = None
        self._errors: dict[str, None] = {}
        self._end = SweepEnd.COMPLETE
        self._ends = 0.0
        self._is_extra = False
        self._whole = True
        """Whether the last search had time for everything. Otherwise what it did not find may still be open."""

    def result(self) -> CutResult:
        """Of all searches."""
        found = (tuple(self._done.values()), tuple(self._open.values()))
        is_short = self._end is SweepEnd.COMPLETE and any(one.why_open is WhyOpen.NO_TIME for one in found[1])
        end = SweepEnd.DEADLINE if is_short else self._end
        return CutResult(self._searched or (), tuple(self._errors), *found, end)

    def look(self, policy: Policy, within_s: float = SWEEP_S, *, extra: bool = False) -> None:
        """Searches and cuts until a search finds nothing new, or the time is over.

        An ``extra`` look says nothing of what it had no time for.
        """
        self._ends, self._is_extra = time.monotonic() + within_s, extra
        for _ in range(MAX_SEARCHES):
            if not self._is_wanted():
                self._end = SweepEnd.INTERRUPTED
            if self._end is SweepEnd.INTERRUPTED or not self._search_and_cut(policy):
                return
        self._settle(self._search(policy), {}, WhyOpen.REOPENED)

    def _search_and_cut(self, policy: Policy) -> bool:
        """False when there is nothing more to do."""
        denied = self._search(policy)
        fresh = _in_turns([one for one in denied if self._is_fresh(one)])
        ended = end_each(list(map(_target, fresh)), min(CUT_S, self._left_s()), self._is_wanted, self._cut)
        endings = {one.found.socket.identity: what for one, what in zip(fresh, ended)}
        self._settle(denied, endings, self._keep)
        return any(what.ending in _GO_ON for what in ended) and self._left_s() > 0

    def _is_fresh(self, one: Denied) -> bool:
        identity = one.found.socket.identity
        return one.connection.why_open is None and identity not in self._why and identity not in self._closed

    def _settle(self, denied: Sequence[Denied], endings: dict[bytes, Ended], otherwise: WhyOpen | None) -> None:
        """Notes what became of each socket, and which ones are open after this search."""
        untried = {identity for identity, one in self._open.items() if one.why_open is WhyOpen.NO_TIME}
        if self._whole:
            self._open = {}
        for one in denied:
            identity, connection = one.found.socket.identity, one.connection
            ended = endings.get(identity, Ended(Ending.NOT_CUT))
            if ended.ending is Ending.CUT:
                self._done[identity] = connection
            if ended.ending in (Ending.CUT, Ending.GONE, Ending.ACCEPTED):
                self._closed.add(identity)
                self._open.pop(identity, None)
            if ended.ending is Ending.NOT_TRIED or (ended.ending is Ending.NOT_CUT and identity in untried):
                self._open[identity] = connection._replace(why_open=WhyOpen.NO_TIME)
            elif identity not in self._closed:
                why = self._why.setdefault(identity, connection.why_open or self._why_open(ended) or otherwise)
                self._open[identity] = connection._replace(why_open=why)

    def _why_open(self, ended: Ended) -> WhyOpen | None:
        if ended.ending is Ending.REFUSED and ended.errno != errno.EOPNOTSUPP:
            self._errors[f"ending a connection: {system_text(OSError(ended.errno, os.strerror(ended.errno)))}"] = None
        if ended.ending in (Ending.HELD, Ending.NOT_TRIED):
            self._end = SweepEnd.DEADLINE
        if ended.ending is Ending.NOT_WANTED:
            self._end = SweepEnd.INTERRUPTED
        if ended.ending is Ending.REFUSED and ended.errno == errno.EOPNOTSUPP:
            return WhyOpen.UNSUPPORTED
        return _WHY_OPEN.get(ended.ending)

    # --- searching

    def _search(self, policy: Policy) -> list[Denied]:
        """The connections of the scope that the policy denies."""
        self._whole = True
        rules = Rules(policy, self._listeners, self._by_nat)
        found = self._timed(0.6, find.LIMITS, lambda limits: find_sockets(policy, self._scope, limits))
        inodes = frozenset(one.socket.inode for one in found.sockets)
        holders = self._timed(0.6, socket_holders.LIMITS, lambda limits: holders_of(inodes, limits))
        denied = self._timed(0.6, _JUDGING, lambda limits: judge(rules, found.sockets, holders, limits))
        if self._searched is None:
            self._searched = tuple(found.searched)
        if not self._is_extra:
            self._errors.update(dict.fromkeys([*found.errors, *_not_seen(holders)]))
        return denied

    def _timed(self, share: float, limits: Limits, stage: Callable[[Limits], T]) -> T:
        """Runs a stage of a search, which gets this share of the time that is left."""
        total_s = self._left_s() * share
        until = time.monotonic() + total_s
        result = stage(limits._replace(share_s=min(limits.share_s, total_s), total_s=total_s))
        if time.monotonic() >= until:
            self._whole = False
            if not self._is_extra and self._end is SweepEnd.COMPLETE:
                self._end = SweepEnd.DEADLINE
        return result

    def _left_s(self) -> float:
        return max(0.0, self._ends - time.monotonic())


def _target(one: Denied) -> Target:
    pids = tuple(holder.pid for holder in one.connection.holders)
    return Target(one.found.namespace, one.found.socket, one.found.seems_accepted, pids)


def _in_turns(several: list[Denied]) -> list[Denied]:
    """The first socket of each maker, then the second one of each, and so on: nobody's sockets that hang delay others'.

    The numbers of sub-IDs (subuid(5)) come after those of users.
    """
    seen: Counter[int] = Counter()
    turns = []
    for one in sorted(several, key=lambda one: one.found.socket.uid):
        turns.append((seen[one.found.socket.uid], one))
        seen[one.found.socket.uid] += 1
    return [one for _, one in sorted(turns, key=lambda turn: turn[0])]


_JUDGING = Limits(share_s=0.5)
_GO_ON = (Ending.CUT, Ending.GONE, Ending.NOT_TRIED)
"""After these there may be more to do."""
_WHY_OPEN = {
    Ending.HELD: WhyOpen.HELD,
    Ending.NOT_TRIED: WhyOpen.NO_TIME,
    Ending.NOT_WANTED: WhyOpen.NO_TIME,
    Ending.REFUSED: WhyOpen.REFUSED,
}


def _not_seen(holders: Holders) -> list[str]:
    errors = []
    if holders.hidden:
        errors.append(f"{hidden_processes(holders.hidden)}, so their sockets were not seen")
    if holders.not_read:
        errors.append(f"not all sockets of {holders.not_read} processes were seen before the time was over")
    return errors
