# SPDX-License-Identifier: Apache-2.0
"""The result of start, allow, revoke and ip-lockdown, as text and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from imds_guard.policy.model import Mode
from imds_guard.present.connections import connection_lines, connection_warnings, connections_values
from imds_guard.present.difference import change_lines, difference_values
from imds_guard.present.policy import filter_lines, lock_lines, policy_values
from imds_guard.present.wrap import MAX_SHOWN, wrapped
from imds_guard.text import count_of, some_of

if TYPE_CHECKING:
    from imds_guard.commands.outcome import Outcome
    from imds_guard.commands.preflight import Preflight, ShutOut


_DRY_RUN = "nothing was changed (--dry-run)"


def outcome_lines(outcome: Outcome) -> list[str]:
    """What differs from before, what was done, and the policy in force now."""
    policy = outcome.policy
    done = [part for line in outcome.done for part in wrapped("", line)]
    if outcome.dry_run:
        same = outcome.difference is not None and not outcome.difference
        return [*(["nothing would change"] if same else change_lines(outcome.difference)), *done, _DRY_RUN]
    lines = [*change_lines(outcome.difference), *done, _headline(outcome)]
    for lock in policy.locks:
        lines += ["  " + line for line in lock_lines(lock)]
    for one in policy.filters:
        lines += ["  " + line for line in filter_lines(one, policy, outcome.backend)]
    return lines + (connection_lines(outcome.existing) if outcome.existing is not None else [])


def outcome_sentence(outcome: Outcome) -> str:
    """What was done and what is in force now, as one entry of a log. What differs has an entry of its own."""
    return "; ".join([_headline(outcome), *outcome.done])


def _headline(outcome: Outcome) -> str:
    policy = outcome.policy
    endpoints = sum(len(lock.endpoints) for lock in policy.locks)
    state = "active" if policy.mode is Mode.ENFORCE else "active in audit mode, which denies nobody"
    return f"imds-guard is {state} ({outcome.backend}): {count_of(endpoints, 'endpoint')} locked"


def outcome_warnings(outcome: Outcome) -> list[str]:
    """The warnings, a sentence each."""
    warnings = list(outcome.warnings)
    for lock in outcome.policy.locks:
        if lock.allows_nobody:
            warnings.append(f"lock {lock.name} lets nobody through, root included")
    if outcome.existing is not None:
        warnings += connection_warnings(outcome.existing, outcome.policy.strict)
    return warnings + shut_out_lines(outcome.shut_out)


def outcome_values(outcome: Outcome) -> dict[str, Any]:
    """The result as plain values for JSON."""
    return {
        "backend": outcome.backend,
        "policy": policy_values(outcome.policy, outcome.backend),
        "done": outcome.done,
        "dry_run": outcome.dry_run,
        "difference": difference_values(outcome.difference),
        "warnings": outcome.warnings,
        "shut_out": shut_out_values(outcome.shut_out),
        "not_inspected": not_inspected_values(outcome.shut_out),
        "connections": None if outcome.existing is None else connections_values(outcome.existing),
    }


def shut_out_lines(found: Preflight | None) -> list[str]:
    """A sentence for each client that the policy shuts out, and for the processes that were not looked at."""
    if found is None:
        return []
    lines = [f"{one.name}{_who(one)} is shut out: it {one.why}" for one in found.shut_out]
    if found.more:
        lines.append(f"{count_of(found.more, 'more metadata client')} would be shut out")
    if found.hung:
        pids = some_of([str(pid) for pid in found.hung], MAX_SHOWN)
        lines.append(
            f"the command line of {_processes(len(found.hung))} could not be read in time (pid {pids}): judged by the "
            "name alone"
        )
    if found.not_asked:
        lines.append(
            f"{_processes(found.not_asked)} not looked at, since time was over: metadata clients may be among them"
        )
    return lines


def _who(one: ShutOut) -> str:
    if one.pid is None:
        return ""
    more = f" and {one.processes - 1} more" if one.processes > 1 else ""
    return f" (pid {one.pid}{more}, user {one.user})"


def _processes(number: int) -> str:
    return f"{number} process{'' if number == 1 else 'es'}"


def shut_out_values(found: Preflight | None) -> list[dict[str, Any]]:
    """The processes that are shut out, as plain values for JSON: those of one client and user are one entry."""
    return [
        {"pid": one.pid, "name": one.name, "user": one.user, "why": one.why, "processes": one.processes}
        for one in (found.shut_out if found is not None else ())
    ]


def not_inspected_values(found: Preflight | None) -> dict[str, Any]:
    """What preflight left out, as plain values for JSON."""
    if found is None:
        return {"more_shut_out": 0, "hung": [], "processes": 0}
    return {"more_shut_out": found.more, "hung": list(found.hung), "processes": found.not_asked}
