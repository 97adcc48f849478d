# SPDX-License-Identifier: Apache-2.0
"""Random policies, tasks and destinations: what the hooks do, against what the model says."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from imds_guard.errors import Unsupported
from imds_guard.policy.decide import Reason
from imds_guard.policy.model import Policy
from tests.vm.generate import attempt, chance, policy, task
from tests.vm.machine import ANY_TIME_NS, Controls, Machine
from tests.vm.model import Expected, Model
from tests.vm.show import differing_fields, given, policy_text
from tests.vm.structs import OutcomeC
from tests.vm.values import Attempt, Outcome, Task, outcome_of

TASKS, ATTEMPTS = 24, 48
"""For each policy. Each attempt is made by each task, in each form."""

_SIZE = ctypes.sizeof(OutcomeC)


class Scene(NamedTuple):
    """A policy as it is in force, and what is tried under it."""

    policy: Policy
    generation: int
    serial: int
    log_allowed: bool
    tasks: tuple[Task, ...]
    attempts: tuple[Attempt, ...]
    other: Policy | None = None
    """The policy of the other generation. It must not matter."""


@dataclass(frozen=True)
class Difference:
    """One run that was not as the model says."""

    form: str
    scene: Scene
    """With the one task and the one attempt."""
    expected: Outcome
    got: Outcome

    def __str__(self) -> str:
        scene = self.scene
        lines = [f"in form {self.form}, {given(scene.attempts[0])}", f"by {given(scene.tasks[0])}, under"]
        lines += [policy_text(scene.policy), f"log_allowed {scene.log_allowed}, generation {scene.generation}"]
        return "\n".join([*lines, *differing_fields(self.expected, self.got)])


def scene_of(seed: int, number: int, *, filters: bool = True) -> Scene:
    """The scene with this number; the same seed gives the same scenes. ``filters``: Machine.has_filters."""
    r = Random(f"{seed} {number}")
    locked, serial = policy(r, filters=filters), r.getrandbits(63) | 1
    return Scene(
        locked,
        generation=r.choice((1, 2)),
        serial=serial,
        log_allowed=chance(r, 0.5),
        tasks=tuple(task(r, locked) for _ in range(TASKS)),
        attempts=tuple(attempt(r, locked, serial) for _ in range(ATTEMPTS)),
        other=policy(r) if chance(r, 0.5) else None,
    )


def runs_of(scene: Scene, machine: Machine) -> int:
    """The number of runs that a scene makes."""
    return len(scene.tasks) * len(scene.attempts) * len(machine.forms)


def put_in_force(scene: Scene, machine: Machine) -> Model:
    """Loads the policies and the tasks. Raises Unsupported for a policy that the maps can't hold."""
    image = machine.load(scene.policy, scene.generation, scene.serial, scene.log_allowed)
    if scene.other is not None:
        machine.fill_generation(scene.other, 3 - scene.generation, scene.serial + 1)
    machine.set_tasks(scene.tasks)
    return Model(scene.policy, image, scene.serial, scene.log_allowed, ANY_TIME_NS)


def differences(scene: Scene, machine: Machine, reasons: Counter[Reason] | None = None) -> Iterator[Difference]:
    """Every run of the scene, in every form, that the model does not expect. ``reasons`` counts what was met."""
    model = put_in_force(scene, machine)
    wanted = [model.expected(one, tried) for tried in scene.attempts for one in scene.tasks]
    if reasons is not None:
        reasons.update(expected.reason for expected in wanted)
    whole = b"".join(expected.raw for expected in wanted)
    for form in machine.forms:
        got = machine.cross(form, scene.attempts, len(scene.tasks), Controls(time_ns=ANY_TIME_NS))
        if got != whole:
            yield from _compare(form, scene, wanted, got)


def _compare(form: str, scene: Scene, wanted: Sequence[Expected], got: bytes) -> Iterator[Difference]:
    for number, expected in enumerate(wanted):
        raw = got[number * _SIZE : (number + 1) * _SIZE]
        if expected.accepts(raw):
            continue
        tried, one = divmod(number, len(scene.tasks))
        case = scene._replace(tasks=(scene.tasks[one],), attempts=(scene.attempts[tried],))
        outcome = outcome_of(OutcomeC.from_buffer_copy(expected.with_group_of(raw)))
        yield Difference(form, case, outcome, outcome_of(OutcomeC.from_buffer_copy(raw)))


def first_difference(scene: Scene, machine: Machine) -> Difference | None:
    """The first one; None when there is none, or when the maps can't hold the policy."""
    try:
        return next(differences(scene, machine), None)
    except Unsupported:
        return None
