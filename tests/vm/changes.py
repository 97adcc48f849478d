# SPDX-License-Identifier: Apache-2.0
"""Random changes of policy by the real store, and hooks at every moment of them.

A hook at rest between two operations of the store, and one during which operations happen, must leave behind what it
would under the old policy or what it would under the new one: verdict, counters, record, row of the report, mark.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Callable

from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.render import require_fits
from imds_guard.backends.ebpf.store import MapStore
from imds_guard.errors import BadPolicy, GuardError, Unsupported, UsageError
from imds_guard.policy import edit
from imds_guard.policy.model import Identities, Lock, Mode, Policy, Verdict, make_policy
from tests.vm import generate
from tests.vm.machine import Machine
from tests.vm.map_calls import MapCalls, Step, Steps
from tests.vm.moments import Moments
from tests.vm.timeline import Timeline, Verdicts, flip_of

_MOST_MEMBERS = 100
"""In all lists of a policy: each is an operation, and at each of them hooks run."""


# --- policies -------------------------------------------------------------------------------------------------------


def policy(r: Random) -> Policy:
    """A policy of which a change does not take too many operations."""
    while True:
        made = generate.policy(r)
        listed = sum(len(one.users) + len(one.groups) for lock in made.locks for one in (lock.allow, lock.deny))
        if listed <= _MOST_MEMBERS and len(made.locks) <= 8:
            return made


def successor(r: Random, before: Policy) -> Policy:
    """The next policy: often the same with a small change, as by allow and revoke."""
    try:
        changed = _changed(r, before)
        require_fits(changed)
    except (UsageError, BadPolicy, Unsupported):  # revoke under a lock that allows by default, for example
        return policy(r)
    return changed


def _changed(r: Random, before: Policy) -> Policy:
    who = Identities(frozenset({r.choice((0, 1, 1001))}), frozenset({r.choice((0, 33, 1001))}))
    lock = r.choice(before.locks)
    others = [one for one in before.locks if one is not lock]
    change = r.choice(("allow", "revoke", "default", "lists", "strict", "mode", "containers", "less", "other", "other"))
    if change in ("allow", "revoke"):
        return (edit.allow if change == "allow" else edit.revoke)(before, who, lock.endpoints[0])
    if change == "default":
        opposite = Verdict.ALLOW if lock.default is Verdict.DENY else Verdict.DENY
        return _with(before, (*others, lock._replace(default=opposite)))
    if change == "lists":
        return _with(before, (*others, lock._replace(allow=lock.deny, deny=lock.allow)))
    if change == "strict":
        return before._replace(strict=not before.strict)
    if change == "mode":
        return before._replace(mode=Mode.AUDIT if before.mode is Mode.ENFORCE else Mode.ENFORCE)
    if change == "containers":
        opposite = Verdict.ALLOW if before.containers is Verdict.DENY else Verdict.DENY
        return before._replace(containers=opposite)
    if change == "less" and others:  # every number of a lock behind it changes
        return _with(before, others)
    return policy(r)


def _with(before: Policy, locks: Sequence[Lock]) -> Policy:
    return make_policy(locks, before.mode, before.containers, before.strict)


# --- a machine and its store ----------------------------------------------------------------------------------------


Waits = Callable[[tuple[int, ...]], tuple[int, ...]]
"""Leaves out grace periods of a change, for controls: then hooks go on through them."""


def every_wait(waits: tuple[int, ...]) -> tuple[int, ...]:
    """Leaves out nothing."""
    return waits


class Changer(Moments):
    """Hooks of a machine while the real store changes its maps."""

    def __init__(self, machine: Machine, store: MapStore, calls: MapCalls, waits: Waits = every_wait) -> None:
        super().__init__([machine], calls)
        self._store, self._waits = store, waits

    def changes(self, seed: str) -> None:
        """A start, and then a change, or a stop and a start; the last command may be killed and another one follow."""
        r = self.r = Random(f"changes {seed}")
        first = policy(r)
        second, third = successor(r, first), policy(r)
        self.begin(seed, [first, second, third])
        start, started = self._record(first)
        self.replay("start", start, Timeline(self.nothing, (flip_of(start), started)))
        if r.random() < 0.3:
            stop, stopped = self._record(None)
            self.replay("stop", stop, Timeline(started, (flip_of(stop), stopped)))
            started = stopped
        change, changed = self._record(second)
        then = r.choice((self._kill, self._kill, self._fail, None))
        if then:
            then(change, started, changed, third)
            return
        self.replay("change", change, Timeline(started, (flip_of(change), changed)))
        again, restarted = self._record(third)
        self.replay("change again", again, Timeline(changed, (flip_of(again), restarted)))

    def _kill(self, change: Steps, started: Verdicts, changed: Verdicts, third: Policy) -> None:
        """The command of a change is killed somewhere. Another one follows, and no process waited in between."""
        flip = flip_of(change)
        killed = self.r.choice((self.r.randint(1, len(change.operations)), flip, flip, max(1, flip - 1)))
        before = change.operations[:killed]
        if killed < flip:
            self.serials.discard(changed.serial)
        last, finished = self._record(third, before)
        waits = [wait for wait in change.waits if wait < killed] + [killed + wait for wait in last.waits]
        both = Steps(before + last.operations, tuple(waits))
        flips = [(flip, changed)] if flip <= killed else []
        self.replay("a kill, and a change", both, Timeline(started, *flips, (killed + flip_of(last), finished)))

    def _fail(self, change: Steps, started: Verdicts, changed: Verdicts, third: Policy) -> None:
        """An operation fails, and all after it in half of the cases. The command says so; then another one follows."""
        at, forever = self.r.randrange(len(change.operations)), self.r.random() < 0.5
        assert changed.policy is not None
        wanted = changed.policy

        def failing() -> None:
            try:
                self._store.change(wanted)
            except (GuardError, OSError):  # OSError: of a store that a test has made wrong
                return
            raise AssertionError("an operation failed, and the command did not")

        with self.undone():
            self._calls.fails = lambda number: number == at or (forever and number > at)
            failed = self._calls.record(failing)
            self._calls.fails = lambda _: False
        flipped = [(flip_of(failed), changed)] if failed.on(Map.CONFIG) else []
        self.replay("a change that failed", failed, Timeline(started, *flipped))
        if not flipped:
            self.serials.discard(changed.serial)
        last, finished = self._record(third)
        self.replay("the next change", last, Timeline(changed if flipped else started, (flip_of(last), finished)))

    def _record(self, wanted: Policy | None, before: Sequence[Step] = ()) -> tuple[Steps, Verdicts]:
        """What a change does after the operations in ``before``, and the verdicts after it. All is undone."""
        store = self._store
        with self.undone():
            for one in before:
                one.apply()
            steps = self._calls.record(lambda: store.flip(0) if wanted is None else store.change(wanted))
            packets = self.packets(strict=wanted is not None and wanted.strict)
        steps = steps._replace(waits=self._waits(steps.waits))
        if wanted is None:
            return steps, self.nothing
        return steps, self.verdicts(wanted, steps, packets)


@contextmanager
def changer(machine: Machine, store: type[MapStore] = MapStore, waits: Waits = every_wait) -> Iterator[Changer]:
    """A changer for a machine, with the real store or a broken one. The pins of the maps are in a temporary folder."""
    calls = MapCalls(machine)
    with tempfile.TemporaryDirectory() as pins, calls.in_place(), store.create(pins) as made:
        yield Changer(machine, made, calls, waits)
