# SPDX-License-Identifier: Apache-2.0
"""The result of start, allow, revoke and ip-lockdown, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from imds_guard.policy.model import Mode
from imds_guard.present.connections import connection_lines, connection_warnings, connections_values
from imds_guard.present.policy import lock_lines, policy_values
from imds_guard.present.wrap import wrapped
from imds_guard.text import count_of

if TYPE_CHECKING:
    from imds_guard.commands.guard import Outcome
    from imds_guard.commands.preflight import ShutOut


def outcome_lines(outcome: Outcome) -> list[str]:
    """What was done, and the policy in force now."""
    policy = outcome.policy
    endpoints = sum(len(lock.endpoints) for lock in policy.locks)
    state = "active" if policy.mode is Mode.ENFORCE else "active in audit mode, which denies nobody"
    lines = [part for line in outcome.done for part in wrapped("", line)]
    lines.append(f"imds-guard is {state} ({outcome.backend}): {count_of(endpoints, 'endpoint')} locked")
    for lock in policy.locks:
        lines += ["  " + line for line in lock_lines(lock)]
    return lines + (connection_lines(outcome.existing) if outcome.existing is not None else [])


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
        "policy": policy_values(outcome.policy),
        "done": outcome.done,
        "warnings": outcome.warnings,
        "shut_out": shut_out_values(outcome.shut_out),
        "connections": None if outcome.existing is None else connections_values(outcome.existing),
    }


def shut_out_lines(shut_out: Sequence[ShutOut]) -> list[str]:
    """A sentence for each process or installed client that the policy shuts out."""
    return [
        f"{one.name} (pid {one.pid}, user {one.user}) is shut out: it {one.why}"
        if one.pid is not None
        else f"{one.name} is shut out: it {one.why}"
        for one in shut_out
    ]


def shut_out_values(shut_out: Sequence[ShutOut]) -> list[dict[str, Any]]:
    """The processes and clients that are shut out, as plain values for JSON."""
    return [{"pid": one.pid, "name": one.name, "user": one.user, "why": one.why} for one in shut_out]
