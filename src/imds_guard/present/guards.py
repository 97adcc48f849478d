# SPDX-License-Identifier: Apache-2.0
"""The guards of a machine, as text and as JSON: status, stop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from imds_guard.policy.emergency import is_emergency
from imds_guard.policy.model import Mode, Policy
from imds_guard.present.wrap import wrapped
from imds_guard.text import count_of, escaped, some_of
from imds_guard.watch.timestamps import iso_time, utc_text

if TYPE_CHECKING:
    from imds_guard.commands.all_guards import GuardFound

_MAX_SHOWN = 3
"""Guards that the text names. JSON has all of them."""


def left_warnings(found: Iterable[GuardFound]) -> list[str]:
    """What ``stop`` of one guard has left, and how all of it goes."""
    guards = list(found)
    locked = [escaped(one.name) for one in guards if not one.is_gone]
    gone = [str(one.cgroup_id) for one in guards if one.is_gone]
    parts = [f"still locked: {some_of(locked, _MAX_SHOWN)}"] if locked else []
    parts += [f"left: pins of guards whose cgroup is gone (ID {some_of(gone, _MAX_SHOWN)})"] if gone else []
    return [f"{'; '.join(parts)}; imds-guard stop --all removes every guard"] if parts else []


def other_guard_lines(found: Iterable[GuardFound], with_gone: bool) -> list[str]:
    """A line for each guard that is in force; ``with_gone``: and one for those whose cgroup is gone."""
    guards = list(found)
    others = [one for one in guards if not one.is_gone]
    lines = [part for one in others[:_MAX_SHOWN] for part in wrapped("also locked: ", _guard_text(one))]
    if len(others) > _MAX_SHOWN:
        lines.append(f"and {count_of(len(others) - _MAX_SHOWN, 'more guard')} (--json has them all)")
    return lines + (_gone_lines(guards) if with_gone else [])


def _gone_lines(guards: list[GuardFound]) -> list[str]:
    gone = [str(one.cgroup_id) for one in guards if one.is_gone]
    text = f"pins of guards whose cgroup is gone (ID {some_of(gone, _MAX_SHOWN)}); imds-guard stop --all removes them"
    return wrapped("left: ", text) if gone else []


def _guard_text(one: GuardFound) -> str:
    parts = [count_of(_endpoints(one.policy), "endpoint"), _kind(one.policy)] if one.policy is not None else []
    parts += [one.fault] if one.fault is not None else []
    parts += [] if one.since is None else [f"since {utc_text(one.since)}"]
    return f"{escaped(one.name)} ({' and '.join(one.backends)}): {', '.join(parts)}"


def _kind(policy: Policy) -> str:
    if is_emergency(policy):
        return "emergency lock"
    return "audit mode" if policy.mode is Mode.AUDIT else "enforced"


def _endpoints(policy: Policy) -> int:
    return sum(len(lock.endpoints) for lock in policy.locks)


def guard_values(one: GuardFound) -> dict[str, Any]:
    """A guard as plain values for JSON."""
    policy = one.policy
    return {
        "cgroup": one.cgroup,
        "cgroup_id": one.cgroup_id,
        "backends": list(one.backends),
        "state": "gone" if one.is_gone else "unreadable" if policy is None else "in-force",
        "emergency": policy is not None and is_emergency(policy),
        "mode": None if policy is None else policy.mode.value,
        "endpoints": None if policy is None else _endpoints(policy),
        "pins": one.pins,
        "since": None if one.since is None else iso_time(one.since),
        "fault": one.fault,
    }
