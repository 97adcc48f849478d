# SPDX-License-Identifier: Apache-2.0
"""Each call of a command fails in turn. Afterwards the old or the new policy holds, and the error says what failed.

By default, a sample of the calls is tried. With ``IMDS_GUARD_FULL=1``, every call fails alone, with one of its errors,
and every third call fails together with all later calls. With ``IMDS_GUARD_FULL=2``, every call fails with each of its
errors, and every call fails together with all later ones.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Callable

from imds_guard.errors import GuardError
from tests.faults import injector
from tests.faults.injector import Call, Fault

FULL = os.environ.get("IMDS_GUARD_FULL", "")

_ALL = 10**9


@dataclass(frozen=True)
class Before:
    """An observation: the users that are allowed at each place, and the policy that the backend reads."""

    passing: tuple[frozenset[int], ...]
    read: object


@dataclass
class Trial:
    """One command, the state before it, and a way to observe its effect.

    ``look`` returns what is in force now, which must be ``old`` or ``new``. ``repair`` is the next command, after which
    ``look`` must return ``new``.
    """

    prepare: Callable[[], object]
    command: Callable[[], object]
    look: Callable[[], Before]
    old: Before
    new: Before
    repair: Callable[[], object]
    least_calls: int
    problems: list[str] = field(default_factory=list)
    sentences: dict[str, int] = field(default_factory=dict)
    failed: int = 0
    succeeded: int = 0


def calls_of(trial: Trial) -> list[Call]:
    """The calls of a run in which none fails. It must lead from the old policy to the new one."""
    trial.prepare()
    assert trial.look() == trial.old
    with injector.planted(Fault()) as fault:
        trial.command()
    assert trial.look() == trial.new
    return fault.calls


def plan(calls: Sequence[Call], *, maximum: int) -> list[Fault]:
    """The faults to plant: all of them, or about ``maximum``, spread over the calls and their kinds."""
    numbered = list(enumerate(calls, 1))
    every = max(1, -(-len(calls) // maximum))
    sample = [(n, call) for n, call in numbered if n % every == 0 or (_is_first_of_its_kind(calls, n) and n % 2)]
    chosen = numbered if FULL else sample
    lasting = numbered if FULL == "2" else chosen[::3] if FULL else chosen[::5]
    alone = [
        Fault(n, None, code)
        for at, (n, call) in enumerate(chosen)
        for code in injector.codes_for(call.kind, at, FULL == "2")
    ]
    return alone + [Fault(n, _ALL, injector.codes_for(call.kind, n, False)[0]) for n, call in lasting]


def _is_first_of_its_kind(calls: Sequence[Call], number: int) -> bool:
    return calls[number - 1] not in calls[: number - 1]


def run(trial: Trial, *, maximum: int = 16) -> None:
    """Plants each fault and checks its effect. Raises AssertionError with everything that went wrong."""
    calls = calls_of(trial)
    assert len(calls) >= trial.least_calls, (
        f"only {len(calls)} calls were seen: injector.py no longer intercepts all of them"
    )
    faults = plan(calls, maximum=maximum)
    for fault in faults:
        _try(trial, fault)
    _report(trial, len(calls), len(faults))
    assert not trial.problems, "\n".join([f"{len(trial.problems)} of {len(faults)} faults:", *trial.problems])
    assert trial.failed > len(faults) // 3, (
        "hardly any fault made the command fail: they are planted at the wrong calls"
    )


def _try(trial: Trial, fault: Fault) -> None:
    trial.prepare()
    fds = _open_fds()
    said: BaseException | None = None
    with injector.planted(fault):
        try:
            trial.command()
        except (GuardError, OSError) as error:
            said = error
    what = _description(fault, said)
    complaints = _judge(trial, fault, said)
    more = sorted(_open_fds() - fds)  # fewer are no fault: something of before was collected meanwhile
    if more:
        complaints.append(f"descriptors: {more} stay open")
    try:
        trial.repair()
        if trial.look() != trial.new:
            complaints.append(f"the next command left {trial.look()}")
    except (GuardError, OSError) as error:
        complaints.append(f"the next command failed: {error}")
    trial.problems += [f"{what}: {one}" for one in complaints]


def _judge(trial: Trial, fault: Fault, said: BaseException | None) -> list[str]:
    seen = trial.look()
    if said is None:
        trial.succeeded += 1
        return [] if seen == trial.new else [f"it succeeded, and {seen} is in force"]
    trial.failed += 1
    whole = seen in (trial.old, trial.new) if fault.last is None else _each_is_whole(trial, seen)
    complaints = [] if whole else [f"{seen} is in force"]
    trial.sentences[str(said)] = trial.sentences.get(str(said), 0) + 1
    return complaints + [f"its message: {fault}" for fault in faults_of_sentence(said, fault)]


def _each_is_whole(trial: Trial, seen: Before) -> bool:
    """Each place is judged by the old policy or by the new one.

    When all later calls fail, nothing can be rolled back: as after a kill, one hook or one address family may have the
    new policy, and another one the old policy. Of the fallback's tables one may have the old policy and one the new:
    then each caller is judged by the one that denies it.
    """
    places = zip(seen.passing, trial.old.passing, trial.new.passing)
    return all(there in (old, new, old & new) for there, old, new in places)


def faults_of_sentence(said: BaseException, fault: Fault | None = None) -> list[str]:
    """What is wrong with an error, which must be one sentence with what was tried and what the system said."""
    text = str(said)
    if not isinstance(said, GuardError):
        return [f"a bare {type(said).__name__}: {text}"]
    wrong = []
    if "\n" in text or not text.strip():
        wrong.append("it is not one line")
    if ": " not in text:
        wrong.append("it does not say what was tried and what the system said")
    if re.search(r"Traceback|Errno|<class|0x[0-9a-f]{6}", text):
        wrong.append("it shows Python")
    # Without membarrier(2), the command uses another call, and its error names that one.
    if fault is not None and fault.code > 0 and fault.hit is not None and fault.hit.kind != injector.SYSCALL:
        symbols = sorted({errno.errorcode[fault.error(call.kind).errno or 0] for call in fault.causes})
        if not any(symbol in text for symbol in symbols):
            wrong.append(f"it does not say {' or '.join(symbols)}")
    return wrong


def _description(fault: Fault, said: BaseException | None) -> str:
    hit = fault.hit
    code = {injector.REFUSES: "refuses", injector.IS_KILLED: "is killed"}.get(fault.code) or errno.errorcode[fault.code]
    where = f"{hit.kind} {hit.what}" if hit else "(not reached)"
    scope = "" if fault.last is None else " and all that follow"
    return f"call {fault.first} ({where}){scope} says {code}, the command says {said!s:.300}"


def _open_fds() -> frozenset[tuple[str, str]]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return frozenset(found)


def _report(trial: Trial, calls: int, faults: int) -> None:
    path = os.environ.get("IMDS_GUARD_FAULTS_REPORT")
    if path:
        with open(path, "a", encoding="utf-8") as report:
            report.write(f"{calls} calls, {faults} faults, {trial.failed} failures, {trial.succeeded} went on\n")
            report.writelines(f"  {count:4} {text}\n" for text, count in sorted(trial.sentences.items()))
            report.writelines(f"  PROBLEM {text}\n" for text in trial.problems)
