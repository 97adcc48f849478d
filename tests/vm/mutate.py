# SPDX-License-Identifier: Apache-2.0
"""Runs each one-instruction mutant of the hooks against what the hooks themselves do, and counts those that are found.

    python3 -m tests.vm.mutate [--form better] [--sample N] [--seed N] [--only connect|egress]

The first stages are comparisons with the model (decisions, packets), the last ones failing calls and states that should
not be. Each run is first compared with the model, where there is one; then the mutants are compared with the run:
verdict, counters, record, row of the report, mark, traps. A mutant that no stage finds is printed with its line of
source and with what it is likely to be (class_of()), and counted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import NamedTuple
from unittest.mock import patch

from imds_guard.backends.ebpf import abi
from imds_guard.policy.decide import Reason
from imds_guard.policy.decide_packet import PacketReason
from imds_guard.policy.model import NOBODY, Identities, Policy
from tests.vm import egress, test_egress, test_failing_calls, test_odd_states
from tests.vm.decisions import Scene, put_in_force, scene_of
from tests.vm.egress import EgressScene, egress_scene
from tests.vm.failing import ALL
from tests.vm.lines import Line, lines
from tests.vm.machine import Machine
from tests.vm.model import OUTCOME, Expected
from tests.vm.mutants import MOVE, Decoded, Mutant, decoded, is_condition, is_operation, mutants
from tests.vm.packets import PacketCase
from tests.vm.programs import ADDRESS_HOOKS, ALL_FORMS
from tests.vm.replay import Replays
from tests.vm.structs import PacketCaseC, ReplayC

SEED = 17
STEP_LIMIT = 400_000
HOOKS_OF = {"connect": ADDRESS_HOOKS, "egress": (abi.EGRESS,)}

Accepts = Callable[[int, bytes], bool]
"""Whether another outcome of a run is as good: which allowed group is in a mark does not matter."""


class Stage(NamedTuple):
    """Runs in one state of the maps."""

    name: str
    program: str
    """connect or egress."""
    replays: Replays
    accepts: Accepts


def _never(number: int, raw: bytes) -> bool:
    return False


class Stages:
    """The runs that mutants are tried with, in one form."""

    def __init__(self, machine: Machine, form: str, scale: float) -> None:
        self._machine, self._form, self._scale = machine, form, scale

    def all(self, programs: Sequence[str]) -> Iterator[Stage]:
        """Every stage for these programs. What one leaves in the maps is there until the next is asked for."""
        if "connect" in programs:
            yield from self._decisions()
        if "egress" in programs:
            yield from self._packets()
        yield from self._failing(programs)
        if "connect" in programs:
            yield from self._odd_states()
        if "egress" in programs:
            yield from self._odd_packets()

    def _count(self, number: int) -> range:
        return range(max(1, int(number * self._scale)))

    # --- against the model ----------------------------------------------------------------------------------------

    def _decisions(self) -> Iterator[Stage]:
        for number in self._count(30):
            scene = scene_of(SEED, number, filters=self._machine.has_filters)
            yield self._connects("decisions", scene)
        yield self._connects("decisions", test_odd_states.odd_addresses())

    def _connects(self, name: str, scene: Scene) -> Stage:
        model = put_in_force(scene, self._machine)
        expected = [model.expected(task, one) for one in scene.attempts for task in scene.tasks]
        replays = self._machine.replays(
            [self._connect(one.hook, one.to_c(), task) for one in scene.attempts for task in range(len(scene.tasks))],
            step_limit=STEP_LIMIT,
        )
        _require_same(replays, expected)
        return Stage(name, "connect", replays, lambda number, raw: expected[number].accepts(raw))

    def _connect(self, hook: str, attempt: object, task: int, **controls: int) -> ReplayC:
        return ReplayC(slot=self._machine.slot(self._form, hook), task=task, attempt=attempt, **controls)

    def _packets(self) -> Iterator[Stage]:
        for scene in _small_spaces(self._machine):
            yield self._egress("packets", scene)
        yield self._egress("packets", test_odd_states.odd_packets())
        for number in self._count(16):
            yield self._egress("packets", egress_scene(SEED, number))

    def _egress(self, name: str, scene: EgressScene) -> Stage:
        model = egress.put_in_force(scene, self._machine)
        expected = [_exactly(model.expected(case, *model.decision(case))) for case in scene.cases]
        runs, data = self._packet_runs(scene.cases)
        replays = self._machine.replays(runs, data, STEP_LIMIT)
        _require_same(replays, expected)
        return Stage(name, "egress", replays, _never)

    def _packet_runs(self, cases: Sequence[PacketCase], **controls: int) -> tuple[list[ReplayC], bytes]:
        slot, runs, data = self._machine.slot(self._form, abi.EGRESS), [], bytearray()
        for case in cases:
            packet = PacketCaseC.from_buffer_copy(egress.packed_case(case, len(data)))
            runs.append(ReplayC(slot=slot, is_packet=True, packet=packet, **controls))
            data += case.packet.data
        return runs, bytes(data)

    # --- what goes wrong ------------------------------------------------------------------------------------------

    def _failing(self, programs: Sequence[str]) -> Iterator[Stage]:
        if "connect" in programs:
            filters = self._machine.has_filters
            scenes = [scene_of(SEED, number, filters=filters) for number in self._count(test_failing_calls.SCENES)]
            for deny in (NOBODY, Identities(groups=frozenset({test_failing_calls.DENIED}))):
                scenes.append(test_failing_calls.with_very_many_groups(deny))
                scenes.append(test_failing_calls.with_some_groups(deny))
            for scene in scenes:
                yield self._failing_connects(scene)
        if "egress" in programs:
            for number in self._count(test_failing_calls.EGRESS_SCENES):
                yield self._failing_packets(egress_scene(SEED, number))

    def _failing_connects(self, scene: Scene) -> Stage:
        put_in_force(scene, self._machine)
        runs, r, seen = [], Random(SEED), set[object]()
        for one in scene.attempts[: test_failing_calls.ATTEMPTS]:
            for task in range(min(len(scene.tasks), test_failing_calls.TASKS)):
                outcome = self._machine.attempt(self._form, one._replace(repeat=1), task)
                path = outcome.returned, outcome.reason, one.hook, frozenset(self._called())
                if path in seen:
                    continue
                seen.add(path)
                given = one._replace(repeat=1).to_c()
                runs += [self._connect(one.hook, given, task, **bad) for bad in self._failures(r, outcome.loads)]
        replays = self._machine.replays(runs, step_limit=STEP_LIMIT)
        return Stage("failing calls", "connect", replays, _never)

    def _called(self) -> Iterator[int]:
        return (call.instruction for call in self._machine.trace())

    def _failures(self, r: Random, loads: int) -> Iterator[dict[str, int]]:
        """Of the run that has just been made."""
        numbers = [number for number, call in enumerate(self._machine.trace(), 1) if call.can_fail]
        if len(numbers) > 130:
            numbers = numbers[:60] + sorted(r.sample(numbers[60:-40], 30)) + numbers[-40:]
        for number in numbers:
            yield {"fail_first": number, "fail_last": number}
            yield {"fail_first": number, "fail_last": ALL}
        for number in range(1, loads + 1):
            yield {"fail_load": number}
        yield {"ring_full": 1}

    def _failing_packets(self, scene: EgressScene) -> Stage:
        egress.put_in_force(scene, self._machine)
        runs: list[ReplayC] = []
        data, r, seen = bytearray(), Random(SEED), set[object]()
        for case in scene.cases[: test_failing_calls.PACKETS]:
            self._machine.set_sockets(case.sockets)
            outcome = self._machine.packet(self._form, case.packet)
            path = outcome.returned, frozenset(self._called())
            if path in seen:
                continue
            seen.add(path)
            for bad in self._failures(r, 0):
                made, _ = self._packet_runs([case], **bad)
                made[0].packet.bytes_at = len(data)
                runs += made
            data += case.packet.data
        return Stage("failing calls", "egress", self._machine.replays(runs, bytes(data), STEP_LIMIT), _never)

    def _odd_packets(self) -> Iterator[Stage]:
        for case in test_odd_states.every_odd_packet(self._machine):
            runs, data = self._packet_runs([case])
            yield Stage("odd states", "egress", self._machine.replays(runs, data, STEP_LIMIT), _never)

    def _odd_states(self) -> Iterator[Stage]:
        for _ in test_odd_states.every_odd_state(self._machine):
            runs = [self._connect(one.hook, one.to_c(), 0) for one in test_odd_states.TRIED]
            yield Stage("odd states", "connect", self._machine.replays(runs, step_limit=STEP_LIMIT), _never)


def _exactly(raw: bytes) -> Expected:
    return Expected(raw, Reason.UNAPPROVED_SOCKET)


def _require_same(replays: Replays, expected: Sequence[Expected]) -> None:
    for number, one in enumerate(expected):
        assert one.accepts(replays.outcome(number)), f"run {number} is not as the model says"


def _small_spaces(machine: Machine) -> list[EgressScene]:
    """The packets of test_egress.py: every mark, every pair of sockets, every length."""
    found: list[EgressScene] = []

    def collect(on: Machine, policy: Policy, cases: Sequence[PacketCase]) -> Counter[PacketReason]:
        found.append(EgressScene(policy, 1, test_egress.SERIAL, tuple(cases)))
        return compare(on, policy, cases)

    compare = test_egress.require_same
    with patch.object(test_egress, "require_same", collect):
        test_egress.try_small_spaces(machine)
    return found


# --- the mutants ------------------------------------------------------------------------------------------------------


class Tally:
    """Which mutants still live, and what has found the others."""

    def __init__(self, machine: Machine, form: str, programs: Sequence[str], sample: int, seed: int) -> None:
        self._machine, self._form = machine, form
        r = Random(seed)
        self.live: dict[str, list[Mutant]] = {}
        self.found: Counter[str] = Counter()
        self.by_traps = 0
        for program in programs:
            some = list(mutants(self.instructions(program)))
            share = min(len(some), sample) if sample else len(some)
            self.live[program] = sorted(r.sample(some, share))
        self.total = sum(map(len, self.live.values()))

    def instructions(self, program: str) -> bytes:
        """Of the program, as bcc made them."""
        return self._machine.instructions(self._form, HOOKS_OF[program][0])

    def try_all(self, stage: Stage) -> None:
        """The mutants of the stage's program."""
        covered = stage.replays.covered
        left = []
        for one in self.live[stage.program]:
            if not covered >> one.at & 1 or not self._differs(one, stage):
                left.append(one)
            else:
                self.found[stage.name] += 1
        self.live[stage.program] = left

    def _differs(self, one: Mutant, stage: Stage) -> bool:
        machine, hooks = self._machine, HOOKS_OF[stage.program]
        with machine.rollback(), machine.patched(self._form, hooks, one.at, one.instruction):
            found = stage.replays.difference(one.at)
            while found is not None and stage.accepts(*found):
                found = stage.replays.difference(one.at, found[0] + 1)
        if found is None:
            return False
        self.by_traps += OUTCOME.unpack(found[1])[1] != 0
        return True


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _main(arguments: argparse.Namespace) -> None:
    programs = [arguments.only] if arguments.only else list(HOOKS_OF)
    begin = time.process_time()
    with Machine(forms=[arguments.form]) as machine:
        tally = Tally(machine, arguments.form, programs, arguments.sample, arguments.seed)
        _say(f"form {arguments.form}: {tally.total} mutants of {' and '.join(programs)}, seed {arguments.seed}")
        last = ""
        for stage in Stages(machine, arguments.form, arguments.scale).all(programs):
            tally.try_all(stage)
            if stage.name != last or arguments.verbose:
                last = stage.name
                alive = sum(map(len, tally.live.values()))
                _say(f"{time.process_time() - begin:.0f} s, {stage.name} begins: {alive} live")
        _report(tally, arguments.form, machine.total_runs)
    _say(f"{time.process_time() - begin:.0f} s of CPU")


def _report(tally: Tally, form: str, runs: int) -> None:
    survivors = [(program, one) for program, some in tally.live.items() for one in some]
    dead = tally.total - len(survivors)
    _say(f"found {dead} of {tally.total} ({100 * dead / tally.total:.1f} %): {dict(tally.found)}; {runs} runs")
    _say(f"of these {tally.by_traps} by a trap, which the verifier would refuse")
    classes: Counter[str] = Counter()
    originals = {program: dict(decoded(tally.instructions(program))) for program in tally.live}
    for program, one in survivors:
        line = lines(form, HOOKS_OF[program][0])[one.at]
        kind = class_of(line, originals[program][one.at], one.kind)
        classes[kind] += 1
        _say(f"{kind:36} {program} {one.at} {one.kind:22} {line}")
    _say("\n".join(f"{count:5} {kind}" for kind, count in classes.most_common()))


_SPEED = ("bitmap", "host", "ig_likely", "IG_LIST_USERS", "IG_LIST_GROUPS", "bits")
"""In lines that only save a further look-up, when they say no."""
_VERIFIER = ("the verifier demands", "return sk ? ", "asm volatile")


def class_of(line: Line, original: Decoded, kind: str) -> str:
    """Why a mutant may live, by its line and its instruction. It is no proof: what it names can be looked at."""
    operation = original.code & 0xF0
    if any(word in line.text for word in _VERIFIER):
        return "for the verifier"
    if any(word in line.text for word in _SPEED):
        return "speed alone"
    if kind == "jumps further":
        return "skips what changes nothing there"
    if is_condition(original):
        return "another test says the same"
    if is_operation(original) and operation != MOVE:
        return "bits that are always the same"
    if kind == "another size":
        return "bits that are always the same"
    return "nobody reads the value on that path"


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m tests.vm.mutate")
    parser.add_argument("--form", choices=ALL_FORMS, default="better")
    parser.add_argument("--only", choices=HOOKS_OF)
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="so many mutants of each program")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--scale", type=float, default=1.0, help="more runs, or fewer")
    parser.add_argument("--verbose", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    _main(_parsed())
