# SPDX-License-Identifier: Apache-2.0
"""Hooks at every moment of a command: at rest between two of its operations, and while operations happen."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.render import render
from imds_guard.policy.decide import Reason
from imds_guard.policy.model import Policy
from tests.vm import generate
from tests.vm.machine import ANY_TIME_NS, NOTHING, Controls, Machine
from tests.vm.map_calls import MapCalls, Step, Steps
from tests.vm.model import Expected, Model
from tests.vm.structs import OutcomeC
from tests.vm.timeline import Subjects, Timeline, Verdicts, tcp_packet
from tests.vm.values import ESTABLISHED, IPPROTO_TCP, Attempt, Outcome, Packet, Socket, Task, outcome_of

TASKS, ATTEMPTS, PACKETS = 4, 7, 5
SPANNING = 4
"""Runs during which operations happen, for each operation."""

_SIZE = ctypes.sizeof(OutcomeC)


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

    def __init__(self, operations: Sequence[Step], r: Random) -> None:
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


class Moments:
    """Hooks that run at every moment of what a command does to the maps of machines."""

    test = "tests/vm/test_changes.py"
    """The file to name where something is wrong."""

    def __init__(self, machines: Sequence[Machine], calls: MapCalls) -> None:
        self.machines, self._calls = tuple(machines), calls
        self.report = Report()
        self.r = Random(0)
        self._seed = ""
        self.serials: set[int] = set()
        """Those that were given to a policy."""
        self._subjects = Subjects((), (), ())
        self.nothing = Verdicts((), (), 0)

    def machine_of(self, hook: str) -> Machine | None:
        """The machine on whose maps a hook runs now; None where it is not attached."""
        return self.machines[0]

    @contextmanager
    def undone(self) -> Iterator[None]:
        """What happens in the block is undone at its end."""
        with self.machines[0].rollback():
            yield

    # --- one step -----------------------------------------------------------------------------------------------------

    def begin(self, seed: str, policies: Sequence[Policy]) -> None:
        """Empty maps. Tasks, attempts and packets that have to do with these policies."""
        r = self.r
        self._seed = seed
        self.serials.clear()
        self._calls.batches = r.random() < 0.5
        tasks = tuple(_task(r, r.choice(policies)) for _ in range(TASKS))
        attempts = tuple(generate.attempt(r, r.choice(policies))._replace(repeat=1) for _ in range(ATTEMPTS))
        destinations = [one for one in attempts if one.protocol == IPPROTO_TCP][:PACKETS]
        packets = tuple((_packet(one), _socket(r, one, r.choice(tasks))) for one in destinations)
        reuse = r.random() < 0.5
        for machine in self.machines:
            machine.reset()
            machine.reuse_freed(reuse)
            machine.set_tasks(tasks)
        self._subjects = Subjects(tasks, attempts, packets)
        self.nothing = self._measure_nothing()

    def _measure_nothing(self) -> Verdicts:
        """While nothing is in force, everything passes and leaves nothing behind."""
        tasks, attempts, _ = self._subjects
        raw = self.machines[0].cross("plain", attempts, len(tasks))
        pieces = [raw[at : at + _SIZE] for at in range(0, len(raw), _SIZE)]
        for number, piece in enumerate(pieces):
            outcome = outcome_of(OutcomeC.from_buffer_copy(piece))
            mark = attempts[number // len(tasks)].mark
            assert outcome == Outcome(1, {}, 0, b"", None, 0, mark), outcome
        return Verdicts(
            [Expected(piece, Reason.NOT_LOCKED) for piece in pieces], self.packets(strict=False), len(tasks)
        )

    def packets(self, *, strict: bool) -> list[Outcome]:
        """How the packets fare now. All pass where the policy is not strict."""
        found = [self._packet("plain", number) for number in range(len(self._subjects.packets))]
        assert strict or all(one.allowed and not one.counts for one in found)
        assert not any(one.traps for one in found)
        return found

    def _packet(self, form: str, number: int, controls: Controls = NOTHING) -> Outcome:
        machine = self.machine_of(abi.EGRESS)
        if machine is None:
            return Outcome(1, {}, 0, b"", None, 0, self._subjects.packets[number][1].mark)
        packet, socket = self._subjects.packets[number]
        machine.set_sockets([socket])
        return machine.packet(form, packet, controls)

    def _all(self, form: str) -> bytes:
        """Each attempt by each task now: a struct outcome each."""
        tasks, attempts, _ = self._subjects
        (machine, *others) = {self.machine_of(one.hook) for one in attempts}
        if machine is not None and not others:
            return machine.cross(form, attempts, len(tasks))
        return b"".join(
            self._one(form, number, task, NOTHING) for number in range(len(attempts)) for task in range(len(tasks))
        )

    def _one(self, form: str, tried: int, task: int, controls: Controls) -> bytes:
        attempt = self._subjects.attempts[tried]
        machine = self.machine_of(attempt.hook)
        if machine is None:
            at = (tried * len(self._subjects.tasks) + task) * _SIZE
            return self.nothing.whole[at : at + _SIZE]
        return machine.attempt_bytes(form, attempt, task, controls)

    def verdicts(self, wanted: Policy, steps: Steps, packets: Sequence[Outcome] | None) -> Verdicts:
        """What must come out under a policy, in the generation and with the serial number that the steps gave it."""
        (generation,) = (abi.CONFIG.unpack(one.value or b"")[0] for one in steps.on(Map.CONFIG))
        key = abi.ARRAY_KEY.pack(generation)
        settings = [one.value for one in steps.on(Map.SETTINGS) if one.key == key][-1]
        serial = abi.SETTINGS.unpack(settings or b"")[6]
        if serial in self.serials:
            self._complain(
                "any moment", "any", f"serial {serial} again: a mark of another policy would pass for one of this"
            )
        self.serials.add(serial)
        model = Model(wanted, render(wanted, generation), serial, False, ANY_TIME_NS)
        tasks, attempts, _ = self._subjects
        return Verdicts(
            [model.expected(task, one) for one in attempts for task in tasks], packets, len(tasks), wanted, serial
        )

    def replay(self, what: str, steps: Steps, timeline: Timeline) -> None:
        """The operations one by one, with hooks at rest after each, and hooks that begin there and end later."""
        last = len(steps.operations)
        for at in range(last + 1):
            if at:
                steps.operations[at - 1].apply()
            self._at_rest(what, at, timeline)
            # A hook that runs now ends before the next grace period does.
            until = next((wait for wait in steps.waits if wait > at), last)
            for _ in range(SPANNING if until > at else 0):
                self._spanning(what, at, steps.operations[at : self.r.randint(at + 1, until)], timeline)
        self.report.runs["operations"] += last

    def _at_rest(self, what: str, at: int, timeline: Timeline) -> None:
        tasks, attempts, packets = self._subjects
        allowed = timeline.between(at, at)
        form = self.r.choice(self.machines[0].forms)
        raw = self._all(form)
        self.report.runs["at rest"] += len(attempts) * len(tasks)
        if not any(verdicts.accepts_all(raw) for verdicts in allowed):
            for number in range(len(attempts) * len(tasks)):
                piece = raw[number * _SIZE : (number + 1) * _SIZE]
                tried, one = divmod(number, len(tasks))
                self._check_attempt(f"{what}, at rest after {at}", form, tried, one, piece, allowed)
        for number in range(len(packets)):
            outcome = self._packet(form, number)
            self._check_packet(f"{what}, at rest after {at}", form, number, outcome, allowed)
        self.report.runs["at rest"] += len(packets)

    def _spanning(self, what: str, at: int, operations: Sequence[Step], timeline: Timeline) -> None:
        tasks, attempts, packets = self._subjects
        r, form = self.r, self.r.choice(self.machines[0].forms)
        meanwhile = Meanwhile(operations, r)
        controls = Controls(before_call=meanwhile)
        self.report.runs["spanning"] += 1
        if packets and r.random() < 0.2:
            number = r.randrange(len(packets))
            with self.undone():
                outcome = self._packet(form, number, controls)
            where = f"{what}, from {at} to {at + meanwhile.done}"
            self._check_packet(where, form, number, outcome, timeline.between(at, at + meanwhile.done))
        else:
            tried, one = r.randrange(len(attempts)), r.randrange(len(tasks))
            with self.undone():
                raw = self._one(form, tried, one, controls)
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
        again = f"pytest {self.test} --vm-seed {self._seed} --vm-cases 1"
        self.report.wrong.append(f"{again}  # {where} operations, form {form}: {what}")


def _task(r: Random, under: Policy) -> Task:
    """With few groups: the walk through many is the same at each moment, and slow."""
    made = generate.task(r, under)
    return made if len(made.groups) < 200 else made._replace(groups=made.groups[:200])


def _packet(attempt: Attempt) -> Packet:
    to = attempt.to
    sender = bytes((10, 0, 0, 1)) if len(to) == 4 else bytes((0x20, 1)) + bytes(13) + b"\1"
    return tcp_packet(to, attempt.port, sender)._replace(socket=0)


def _socket(r: Random, attempt: Attempt, owner: Task) -> Socket:
    """The socket of a connection that an earlier policy approved, or nobody did."""
    gid = r.choice((owner.fsgid, *owner.groups[:3]))
    mark = abi.MARK.pack(r.randint(1, 4), owner.fsuid, gid, r.randint(0, 2), r.randint(1, 5), r.randint(0, 1))
    return Socket(
        bytes(len(attempt.to)), attempt.to, 40000, attempt.port, ESTABLISHED, mark if r.random() < 0.9 else None
    )
