# SPDX-License-Identifier: Apache-2.0
"""Random changes of policy by the real store, and hooks at every moment of them.

A hook at rest between two operations of the store, and one during which operations happen, must leave behind what it
would under the old policy or what it would under the new one: verdict, counters, record, row of the report, mark.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from random import Random
from typing import Callable

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.render import render
from imds_guard.backends.ebpf.store import MapStore
from imds_guard.errors import BadPolicy, UsageError
from imds_guard.policy import edit
from imds_guard.policy.decide import Reason
from imds_guard.policy.model import Identities, Lock, Mode, Policy, Verdict, make_policy
from tests.vm import generate
from tests.vm.machine import ANY_TIME_NS, NOTHING, Controls, Machine
from tests.vm.map_calls import MapCalls, Operation, Steps
from tests.vm.model import Expected, Model
from tests.vm.structs import OutcomeC
from tests.vm.timeline import Subjects, Timeline, Verdicts, flips, tcp_packet
from tests.vm.values import (
    ESTABLISHED,
    IPPROTO_TCP,
    Attempt,
    Outcome,
    Packet,
    Socket,
    Task,
    outcome_of,
)

TASKS, ATTEMPTS, PACKETS = 4, 7, 5
SPANNING = 4
"""Runs during which operations happen, for each operation."""
_MOST_MEMBERS = 100
"""In all lists of a policy: each is an operation, and at each of them hooks run."""

_SIZE = ctypes.sizeof(OutcomeC)


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
    who = Identities(frozenset({r.choice((0, 1, 1001))}), frozenset({r.choice((0, 33, 1001))}))
    lock = r.choice(before.locks)
    others = [one for one in before.locks if one is not lock]
    change = r.choice(("allow", "revoke", "default", "lists", "strict", "mode", "containers", "less", "other", "other"))
    try:
        if change in ("allow", "revoke"):
            endpoint = lock.endpoints[0]
            return (edit.allow if change == "allow" else edit.revoke)(before, who, endpoint)
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
    except (UsageError, BadPolicy):
        pass  # revoke under a lock that allows by default, for example
    return policy(r)


def _with(before: Policy, locks: Sequence[Lock]) -> Policy:
    return make_policy(locks, before.mode, before.containers, before.strict)


# --- a machine and its store ----------------------------------------------------------------------------------------


@dataclass
class Report:
    """What came of it: ``wrong`` is empty when all is well."""

    wrong: list[str] = field(default_factory=list)
    runs: Counter[str] = field(default_factory=Counter)
    """Operations, and runs of hooks: at rest, and spanning operations."""

    @property
    def hooks(self) -> int:
        """Runs of hooks."""
        return self.runs["at rest"] + self.runs["spanning"]


class Meanwhile:
    """Operations that happen during one run of a hook: all of them before one call of a helper, or some before each."""

    def __init__(self, operations: Sequence[Operation], r: Random) -> None:
        self._left, self._r = list(operations), r
        self._at = r.choice((0, r.randint(1, 6), r.randint(1, 12), r.randint(1, 40)))
        self.done = 0
        self.errors: list[OSError] = []

    def __call__(self, call: int) -> None:
        """Before a call of a helper."""
        if self._at:
            count = len(self._left) if call == self._at else 0
        else:
            count = self._r.choice((0, 0, 1, 1, 2, 7, len(self._left)))
        now, self._left = self._left[:count], self._left[count:]
        self.done += len(now)
        try:
            for one in now:
                one.apply()
        except OSError as error:  # ctypes would print it and go on
            self.errors.append(error)


Waits = Callable[[tuple[int, ...]], tuple[int, ...]]
"""Leaves out grace periods of a change, for controls: then hooks go on through them."""


def every_wait(waits: tuple[int, ...]) -> tuple[int, ...]:
    """Leaves out nothing."""
    return waits


class Changer:
    """Hooks of a machine while the real store changes its maps."""

    def __init__(self, machine: Machine, store: MapStore, calls: MapCalls, waits: Waits = every_wait) -> None:
        self.machine, self._store, self._calls, self._waits = machine, store, calls, waits
        self.report = Report()
        self._r = Random(0)
        self._seed = ""
        self._serials: set[int] = set()
        self._subjects = Subjects((), (), ())
        self._nothing = Verdicts((), (), 0)

    def changes(self, seed: str) -> None:
        """A start, and then a change, or a stop and a start; the last command may be killed and another one follow."""
        r = self._r = Random(f"changes {seed}")
        self._seed = seed
        first = policy(r)
        second, third = successor(r, first), policy(r)
        self._begin([first, second, third])
        start, started = self._record(first)
        self._replay("start", start, Timeline(self._nothing, (_flip(start), started)))
        if r.random() < 0.3:
            stop, stopped = self._record(None)
            self._replay("stop", stop, Timeline(started, (_flip(stop), stopped)))
            started = stopped
        change, changed = self._record(second)
        if r.random() < 0.5:
            self._kill(change, started, changed, third)
            return
        self._replay("change", change, Timeline(started, (_flip(change), changed)))
        again, restarted = self._record(third)
        self._replay("change again", again, Timeline(changed, (_flip(again), restarted)))

    def _kill(self, change: Steps, started: Verdicts, changed: Verdicts, third: Policy) -> None:
        """The command of a change is killed somewhere. Another one follows, and no process waited in between."""
        flip = _flip(change)
        killed = self._r.choice((self._r.randint(1, len(change.operations)), flip, flip, max(1, flip - 1)))
        before = change.operations[:killed]
        if killed < flip:
            self._serials.discard(changed.serial)
        last, finished = self._record(third, before)
        waits = [wait for wait in change.waits if wait < killed] + [killed + wait for wait in last.waits]
        both = Steps(before + last.operations, tuple(waits))
        flips = [(flip, changed)] if flip <= killed else []
        self._replay("a kill, and a change", both, Timeline(started, *flips, (killed + _flip(last), finished)))

    # --- one step -----------------------------------------------------------------------------------------------------

    def _begin(self, policies: Sequence[Policy]) -> None:
        r, machine = self._r, self.machine
        machine.reset()
        self._serials.clear()
        machine.reuse_freed(r.random() < 0.5)
        self._calls.batches = r.random() < 0.5
        tasks = tuple(_task(r, r.choice(policies)) for _ in range(TASKS))
        attempts = tuple(generate.attempt(r, r.choice(policies))._replace(repeat=1) for _ in range(ATTEMPTS))
        machine.set_tasks(tasks)
        destinations = [one for one in attempts if one.protocol == IPPROTO_TCP][:PACKETS]
        packets = tuple(_packet(one)._replace(socket=number) for number, one in enumerate(destinations, 1))
        # The first one is that of attempts: each has its own.
        machine.set_sockets([Socket(), *(_socket(r, one, r.choice(tasks)) for one in destinations)])
        self._subjects = Subjects(tasks, attempts, packets)
        self._nothing = self._measure_nothing()

    def _measure_nothing(self) -> Verdicts:
        """While nothing is in force, everything passes and leaves nothing behind."""
        tasks, attempts, _ = self._subjects
        raw = self.machine.cross("plain", attempts, len(tasks))
        pieces = [raw[at : at + _SIZE] for at in range(0, len(raw), _SIZE)]
        for number, piece in enumerate(pieces):
            outcome = outcome_of(OutcomeC.from_buffer_copy(piece))
            mark = attempts[number // len(tasks)].mark
            assert outcome == Outcome(1, {}, 0, b"", None, 0, mark), outcome
        return Verdicts(
            [Expected(piece, Reason.NOT_LOCKED) for piece in pieces], self._packets(strict=False), len(tasks)
        )

    def _packets(self, *, strict: bool) -> list[Outcome]:
        found = [self._packet("plain", number) for number in range(len(self._subjects.packets))]
        assert strict or all(one.allowed and not one.counts for one in found)
        return found

    def _packet(self, form: str, number: int, controls: Controls = NOTHING) -> Outcome:
        """The outcome without a mark: that would be the one of the last attempt."""
        return replace(self.machine.packet(form, self._subjects.packets[number], controls), mark=None)

    def _record(self, wanted: Policy | None, before: Sequence[Operation] = ()) -> tuple[Steps, Verdicts]:
        """What a change does after the operations in ``before``, and the verdicts after it. All is undone."""
        store = self._store
        with self.machine.rollback():
            for one in before:
                one.apply()
            steps = self._calls.record(lambda: store.flip(0) if wanted is None else store.change(wanted))
            packets = self._packets(strict=wanted is not None and wanted.strict)
        steps = steps._replace(waits=self._waits(steps.waits))
        if wanted is None:
            return steps, self._nothing
        return steps, self._verdicts(wanted, steps, packets)

    def _verdicts(self, wanted: Policy, steps: Steps, packets: Sequence[Outcome]) -> Verdicts:
        (generation,) = (abi.CONFIG.unpack(one.value or b"")[0] for one in steps.operations if one.number is Map.CONFIG)
        key = abi.ARRAY_KEY.pack(generation)
        settings = [one.value for one in steps.operations if one.number is Map.SETTINGS and one.key == key][-1]
        serial = abi.SETTINGS.unpack(settings or b"")[6]
        if serial in self._serials:
            self._complain(
                "any moment", "any", f"serial {serial} again: a mark of another policy would pass for one of this"
            )
        self._serials.add(serial)
        model = Model(wanted, render(wanted, generation), serial, False, ANY_TIME_NS)
        tasks, attempts, _ = self._subjects
        return Verdicts([model.expected(task, one) for one in attempts for task in tasks], packets, len(tasks), serial)

    def _replay(self, what: str, steps: Steps, timeline: Timeline) -> None:
        """The operations one by one, with hooks at rest after each, and hooks that begin there and end later."""
        last = len(steps.operations)
        for at in range(last + 1):
            if at:
                steps.operations[at - 1].apply()
            self._at_rest(what, at, timeline)
            # A hook that runs now ends before the next grace period does.
            until = next((wait for wait in steps.waits if wait > at), last)
            for _ in range(SPANNING if until > at else 0):
                self._spanning(what, at, steps.operations[at : self._r.randint(at + 1, until)], timeline)
        self.report.runs["operations"] += last

    def _at_rest(self, what: str, at: int, timeline: Timeline) -> None:
        tasks, attempts, packets = self._subjects
        (verdicts,) = timeline.between(at, at)
        form = self._r.choice(self.machine.forms)
        raw = self.machine.cross(form, attempts, len(tasks))
        self.report.runs["at rest"] += len(attempts) * len(tasks)
        if not verdicts.accepts_all(raw):
            for number in range(len(attempts) * len(tasks)):
                piece = raw[number * _SIZE : (number + 1) * _SIZE]
                tried, one = divmod(number, len(tasks))
                self._check_attempt(f"{what}, at rest after {at}", form, tried, one, piece, [verdicts])
        if packets:
            number = self._r.randrange(len(packets))
            outcome = self._packet(form, number)
            self.report.runs["at rest"] += 1
            self._check_packet(f"{what}, at rest after {at}", form, number, outcome, [verdicts])

    def _spanning(self, what: str, at: int, operations: Sequence[Operation], timeline: Timeline) -> None:
        tasks, attempts, packets = self._subjects
        r, form = self._r, self._r.choice(self.machine.forms)
        meanwhile = Meanwhile(operations, r)
        controls = Controls(before_call=meanwhile)
        self.report.runs["spanning"] += 1
        if packets and r.random() < 0.2:
            number = r.randrange(len(packets))
            with self.machine.rollback():
                outcome = self._packet(form, number, controls)
            where = f"{what}, from {at} to {at + meanwhile.done}"
            self._check_packet(where, form, number, outcome, timeline.between(at, at + meanwhile.done))
        else:
            tried, one = r.randrange(len(attempts)), r.randrange(len(tasks))
            with self.machine.rollback():
                raw = self.machine.attempt_bytes(form, attempts[tried], one, controls)
            where = f"{what}, from {at} to {at + meanwhile.done}"
            self._check_attempt(where, form, tried, one, raw, timeline.between(at, at + meanwhile.done))
        assert meanwhile.errors == []

    # --- what is wrong ------------------------------------------------------------------------------------------------

    def _check_attempt(
        self, where: str, form: str, tried: int, one: int, raw: bytes, allowed: Sequence[Verdicts]
    ) -> None:
        if any(verdicts.accepts(tried, one, raw) for verdicts in allowed):
            return
        tasks, attempts, _ = self._subjects
        got = outcome_of(OutcomeC.from_buffer_copy(raw))
        self._complain(where, form, f"{attempts[tried]} by {tasks[one]}: {got}")

    def _check_packet(self, where: str, form: str, number: int, outcome: Outcome, allowed: Sequence[Verdicts]) -> None:
        if not any(verdicts.accepts_packet(number, outcome) for verdicts in allowed):
            self._complain(where, form, f"{self._subjects.packets[number]}: {outcome}")

    def _complain(self, where: str, form: str, what: str) -> None:
        again = f"pytest tests/vm/test_changes.py --vm-seed {self._seed} --vm-cases 1"
        self.report.wrong.append(f"{again}  # {where} operations, form {form}: {what}")


def _flip(steps: Steps) -> int:
    """After how many operations another generation is in force. There is one such operation in each change."""
    (flip,) = flips(steps)
    return flip


def _task(r: Random, under: Policy) -> Task:
    """With few groups: the walk through many is the same at each moment, and slow."""
    made = generate.task(r, under)
    return made if len(made.groups) < 200 else made._replace(groups=made.groups[:200])


def _packet(attempt: Attempt) -> Packet:
    to = attempt.to
    sender = bytes((10, 0, 0, 1)) if len(to) == 4 else bytes((0x20, 1)) + bytes(13) + b"\1"
    return tcp_packet(to, attempt.port, sender)


def _socket(r: Random, attempt: Attempt, owner: Task) -> Socket:
    """The socket of a connection that an earlier policy approved, or nobody did."""
    gid = r.choice((owner.fsgid, *owner.groups[:3]))
    mark = abi.MARK.pack(r.randint(1, 4), owner.fsuid, gid, r.randint(0, 2), r.randint(1, 5), r.randint(0, 1))
    return Socket(
        bytes(len(attempt.to)), attempt.to, 40000, attempt.port, ESTABLISHED, mark if r.random() < 0.9 else None
    )


@contextmanager
def changer(machine: Machine, store: type[MapStore] = MapStore, waits: Waits = every_wait) -> Iterator[Changer]:
    """A changer for a machine, with the real store or a broken one. The pins of the maps are in a temporary folder."""
    calls = MapCalls(machine)
    with tempfile.TemporaryDirectory() as pins, calls.in_place(), store.create(pins) as made:
        yield Changer(machine, made, calls, waits)
