# SPDX-License-Identifier: Apache-2.0
"""Runs in which calls of helpers fail, one at a time and all from the n-th on: what gets through that must not."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import NamedTuple, Protocol

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.policy.decide_packet import PacketReason
from imds_guard.policy.model import Mode
from tests.vm.decisions import Scene, put_in_force
from tests.vm.egress import EgressScene, egress_forms
from tests.vm.egress import put_in_force as put_egress_in_force
from tests.vm.machine import NOTHING, Controls, Machine, failing
from tests.vm.packets import PacketCase
from tests.vm.values import Call, Outcome

ALL = 1 << 30
"""Beyond the last call of any run."""
_FIRST, _BETWEEN, _LAST = 50, 30, 30
"""Of a run with more calls (a walk through very many groups) only so many fail in turn."""

Weak = tuple[str, str, "Map | None"]
"""Hook, helper, and the helper's map: what must not fail, or what else happens is in the table of the test."""


class Run(Protocol):
    """One case, with what goes wrong in it."""

    def __call__(self, *, controls: Controls) -> Outcome:
        """Runs it."""


@dataclass
class Findings:
    """What came of it."""

    opens: set[Weak] = field(default_factory=set)
    """A failure lets through what the model denies."""
    shuts: set[Weak] = field(default_factory=set)
    """A failure denies what the policy does not lock, or, under audit, anything."""
    tried: set[Weak] = field(default_factory=set)
    """All calls that have failed."""
    wrong: list[str] = field(default_factory=list)
    """What no failure may lead to."""
    runs: int = 0
    paths: Counter[str] = field(default_factory=Counter)
    """Different paths through a hook that were tried: hook -> how many."""


class Failures:
    """Makes calls fail in the runs of many cases, once for each path that a run can take."""

    def __init__(self, machine: Machine, r: Random) -> None:
        self.found = Findings()
        self._machine, self._r = machine, r
        self._seen: set[object] = set()

    def connects(self, scene: Scene, tasks: int, attempts: int) -> None:
        """Some of the connects of a scene. Raises Unsupported as loading its policy does."""
        model = put_in_force(scene, self._machine)
        some = [one._replace(repeat=1) for one in scene.attempts[:attempts]]
        for form, tried, number in itertools.product(self._machine.forms, some, range(tasks)):
            run = partial(self._machine.attempt, form, tried, number)
            locked = bool(model.expected(scene.tasks[number], tried).outcome.counts)
            self._try(form, tried.hook, run, _Given(scene.policy.mode, scene.policy.strict, locked, tried.mark))

    def packets(self, scene: EgressScene, count: int) -> None:
        """Some of the packets of a scene."""
        model = put_egress_in_force(scene, self._machine)
        for form, case in itertools.product(egress_forms(self._machine), scene.cases[:count]):
            locked = model.decision(case)[1].reason not in (PacketReason.NOT_IP, PacketReason.NOT_LOCKED)
            given = _Given(scene.policy.mode, True, locked, case.sockets[0].mark)
            self._try(form, abi.EGRESS, partial(self._packet, form, case), given)

    def _packet(self, form: str, case: PacketCase, controls: Controls) -> Outcome:
        self._machine.set_sockets(case.sockets)
        return self._machine.packet(form, case.packet, controls)

    def _try(self, form: str, hook: str, run: Run, given: _Given) -> None:
        base = run(controls=NOTHING)
        calls = self._machine.trace()
        path = (form, hook, given[:3], base.returned, base.reason, frozenset(one.instruction for one in calls))
        if path in self._seen:
            return
        self._seen.add(path)
        self.found.paths[hook] += 1
        case = _Case(hook, run, base, calls, *given)
        self._one_by_one(case)
        self._from_each_on(case)

    def _one_by_one(self, case: _Case) -> None:
        for number in self._numbers(case.calls):
            outcome = case.run(controls=failing(number))
            self.found.runs += 1
            weak = _weak(case.hook, case.calls[number - 1])
            self.found.tried.add(weak)
            if case.is_opened(outcome):
                self.found.opens.add(weak)
            if case.is_shut(outcome):
                self.found.shuts.add(weak)
            self.found.wrong += case.faults(outcome, f"call {number} of {case.hook} fails: {case.calls[number - 1]}")

    def _from_each_on(self, case: _Case) -> None:
        """From the last call to the first: where one more failure changes the verdict, it is that one's doing."""
        before = case.base
        for number in reversed(self._numbers(case.calls)):
            outcome = case.run(controls=failing(number, ALL))
            self.found.runs += 1
            weak = _weak(case.hook, case.calls[number - 1])
            if case.is_opened(outcome) and not case.is_opened(before):
                self.found.opens.add(weak)
            if case.is_shut(outcome) and not case.is_shut(before):
                self.found.shuts.add(weak)
            self.found.wrong += [] if not outcome.traps else [f"calls fail from {number} on: {outcome.traps}"]
            before = outcome

    def _numbers(self, calls: Sequence[Call]) -> list[int]:
        """Those of the calls that can fail; of very many some."""
        numbers = [number for number, call in enumerate(calls, 1) if call.can_fail]
        if len(numbers) <= _FIRST + _BETWEEN + _LAST:
            return numbers
        between = sorted(self._r.sample(numbers[_FIRST:-_LAST], _BETWEEN))
        return [*numbers[:_FIRST], *between, *numbers[-_LAST:]]


class _Given(NamedTuple):
    """What is known of a case beforehand."""

    mode: Mode
    strict: bool
    locked: bool
    mark: bytes | None


@dataclass(frozen=True)
class _Case:
    """One run that is repeated with failures."""

    hook: str
    run: Run
    base: Outcome
    """Without a failure. Other tests compare it with the model."""
    calls: Sequence[Call]
    mode: Mode
    strict: bool
    locked: bool
    """The destination is locked, or for a packet: not known to be open."""
    mark: bytes | None
    """Of the socket before."""

    def is_opened(self, outcome: Outcome) -> bool:
        """It was denied, or sent to a filter, and now it is let through to the endpoint, or to another filter.

        Under audit: its socket is approved as if it were allowed.
        """
        if self.mode is Mode.AUDIT:
            kind = abi.MARK.unpack(outcome.mark)[4] if outcome.mark and outcome.mark != self.mark else 0
            audited = any(count[1] for count in self.base.counts.values())
            return audited and kind in (abi.MARK_USER, abi.MARK_GROUP, abi.MARK_DEFAULT)
        return outcome.allowed and (not self.base.allowed or outcome.to != self.base.to)

    def is_shut(self, outcome: Outcome) -> bool:
        """It is denied, though nothing is locked there, or the policy only audits."""
        return self.base.allowed and not outcome.allowed and (self.mode is Mode.AUDIT or not self.locked)

    def faults(self, outcome: Outcome, what: str) -> Iterator[str]:
        """What one failure must not lead to."""
        if outcome.traps:
            yield f"{what}: {sorted(outcome.traps)}"
        if outcome.allowed:
            return
        reasons = [pair for label, pair in outcome.counts.items() if label not in ("lost-events", "report-overflow")]
        told = (reasons == [(1, 0)], outcome.events == 1, outcome.rows == 1)
        if sum(told) < 2:  # the counter, the record, the row: one failure may cost one of them
            yield f"{what}: a denial that is not reported: {outcome}"
        if outcome.mark not in (self.mark, self.base.mark, bytes(abi.MARK.size)):
            yield f"{what}: a denied socket is marked: {outcome}"


def _weak(hook: str, call: Call) -> Weak:
    return hook, call.helper, call.map
