# SPDX-License-Identifier: Apache-2.0
"""The state of the guard, as text and as JSON: status and verify."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from imds_guard.identity import user_name
from imds_guard.policy.decide import Reason
from imds_guard.policy.endpoint_syntax import format_endpoint
from imds_guard.policy.model import Mode, Policy, Verdict
from imds_guard.present.connections import connection_lines, connection_warnings, connections_values
from imds_guard.present.forwarded import forwarding_lines, forwarding_values
from imds_guard.present.policy import filter_lines, identities_text, identities_values, lock_lines, policy_values
from imds_guard.present.surroundings import surroundings_lines, surroundings_values
from imds_guard.present.wrap import MAX_SHOWN, named, wrapped
from imds_guard.text import count_of, some_of
from imds_guard.watch.timestamps import iso_time, utc_text

if TYPE_CHECKING:
    from imds_guard.backends.ebpf import State
    from imds_guard.backends.ebpf.hooks import Hook
    from imds_guard.commands.look import Status
    from imds_guard.commands.surroundings import Surroundings
    from imds_guard.commands.temporary import Right
    from imds_guard.commands.verify import VerifyResult


SCREEN_LINES = 23
"""Lines of a terminal, without the one of the next prompt."""


def status_word(status: Status) -> str:
    """``active``, ``degraded`` or ``inactive``."""
    if status.faults:
        return "degraded"
    return "inactive" if status.backend is None else "active"


def state_line(status: Status) -> str:
    """The first line of status: state, backend and mode."""
    backend = f" ({status.backend})" if status.backend else ""
    mode = ", audit mode: nobody is denied" if status.policy and status.policy.mode is Mode.AUDIT else ""
    emergency = ": emergency lock" if status.emergency else ""
    return f"imds-guard: {status_word(status)}{emergency}{backend}{mode}"


def status_lines(status: Status, seen: Surroundings | None = None, verbose: bool = False) -> list[str]:
    """The state as text, the most important line first. Unless ``verbose`` the locks take what is left of a screen."""
    lines = [state_line(status)]
    for fault in status.faults:
        lines += wrapped("  fault: ", fault)
    for neighbour in status.known:
        lines += wrapped("  known: ", neighbour.fault)
    if status.ebpf is not None:
        lines += _ebpf_lines(status.ebpf, verbose)
    if seen is not None:
        lines += surroundings_lines(seen, status.backend is not None)
    if status.forwarded is not None:
        lines += forwarding_lines(status.forwarded)
    lines += [part for one in status.temporary for part in temporary_lines(one)]
    lines += [part for note in status.notes for part in wrapped("note: ", note)]
    if status.policy is None:
        return lines
    lines += _caller_lines(status.policy)
    return lines + _lock_lines(status.policy, status.backend, None if verbose else SCREEN_LINES - len(lines))


def temporary_lines(one: Right) -> list[str]:
    """What allow --for has allowed, and until when."""
    texts = [text for endpoint in one.endpoints for text in format_endpoint(endpoint)]
    return wrapped(f"until {utc_text(one.until)}: ", f"{identities_text(one.who)} at {some_of(texts, 1, ' ')}")


def _temporary_values(one: Right) -> dict[str, Any]:
    texts = [text for endpoint in one.endpoints for text in format_endpoint(endpoint)]
    return {"until": iso_time(one.until), "endpoints": texts, **identities_values(one.who)}


def _caller_lines(policy: Policy) -> list[str]:
    """What holds for all locks."""
    lines = [f"containers: {'judged by their IDs' if policy.containers is Verdict.ALLOW else 'denied'}"]
    if policy.strict:
        done = "dropped" if policy.mode is Mode.ENFORCE else "counted, and pass"
        lines.append(f"strict: packets of sockets that were not let through are {done}")
    if policy.filter_uid is not None:
        lines.append(f"user {named(policy.filter_uid, user_name(policy.filter_uid))} runs the filters, and may connect")
    return lines


def _lock_lines(policy: Policy, backend: str | None, room: int | None) -> list[str]:
    """Locks, then filters, whole ones as long as there is ``room``, and at least one lock."""
    blocks = [lock_lines(lock) for lock in policy.locks[:MAX_SHOWN]]
    more_locks = len(policy.locks)
    blocks_of_filters = [filter_lines(one, policy, backend) for one in policy.filters[:MAX_SHOWN]]
    shown = blocks[: _fitting(blocks, room)]
    used = sum(map(len, shown))
    shown_filters = blocks_of_filters[: _fitting(blocks_of_filters, None if room is None else room - used, 0)]
    lines = [line for block in (*shown, *shown_filters) for line in block]
    left = [(more_locks - len(shown), "more lock"), (len(policy.filters) - len(shown_filters), "more filter")]
    texts = [count_of(number, noun) for number, noun in left if number]
    return [*lines, f"and {' and '.join(texts)} (--json has them all)"] if texts else lines


def _fitting(blocks: list[list[str]], room: int | None, least: int = 1) -> int:
    """How many of the first blocks fit, with a line for how many more there are."""
    if room is None:
        return len(blocks)
    used = 0
    for number, block in enumerate(blocks):
        used += len(block)
        if used > room - (number + 1 < len(blocks)):
            return max(number, least)
    return len(blocks)


def _ebpf_lines(state: State, verbose: bool) -> list[str]:
    where = f"{state.cgroup}, every process of the machine" if state.cgroup_is_root else state.cgroup
    lines = [f"attached to: {where}"]
    if verbose:
        lines.append(f"version: {', '.join(state.versions) or 'none'}, generation {state.generation}")
        lines += [part for hook in state.hooks for part in _hook_lines(hook)]
    counted = [
        f"{reason.label} {enforced + audited}" + (f" ({audited} let through by audit mode)" if audited else "")
        for reason, (enforced, audited) in zip(Reason, state.counters)
        if enforced or audited
    ]
    return lines + wrapped("connects to locked endpoints: ", ", ".join(counted) or "none yet")


def _hook_lines(hook: Hook) -> list[str]:
    order = ", ".join(
        f"{program.name or '(unnamed)'} (id {program.id})" + (" [ours]" if program is hook.ours else "")
        for program in hook.attached
    )
    return wrapped(f"  {hook.name}: ", order or "nothing attached")


def status_values(status: Status, seen: Surroundings | None = None) -> dict[str, Any]:
    """The state as plain values for JSON."""
    values: dict[str, Any] = {
        "state": status_word(status),
        "backend": status.backend,
        "emergency": status.emergency,
        "faults": status.faults,
        "known": [neighbour.fault for neighbour in status.known],
        "policy": policy_values(status.policy, status.backend),
        "temporary": [_temporary_values(one) for one in status.temporary],
        "notes": list(status.notes),
    }
    if seen is not None:
        values.update(surroundings_values(seen))
    if status.forwarded is not None:
        values["forwarded"] = forwarding_values(status.forwarded)
    if status.ebpf is not None:
        values["ebpf"] = _ebpf_values(status.ebpf)
    return values


def _ebpf_values(state: State) -> dict[str, Any]:
    return {
        "cgroup": state.cgroup,
        "cgroup_is_root": state.cgroup_is_root,
        "pins": state.pins,
        "generation": state.generation,
        "versions": state.versions,
        "hooks": [
            {
                "hook": hook.name,
                "programs": [
                    {"id": program.id, "name": program.name, "ours": program is hook.ours} for program in hook.attached
                ],
            }
            for hook in state.hooks
        ],
        "other_programs": [
            {
                "hook": other.hook,
                "id": other.id,
                "name": other.name,
                "runs": other.order.name.lower(),
                "cgroups": list(other.cgroups) or [state.cgroup],
            }
            for other in state.others
        ],
        "counters": {
            reason.label: {"enforced": enforced, "audited": audited}
            for reason, (enforced, audited) in zip(Reason, state.counters)
        },
    }


def verify_lines(found: VerifyResult) -> list[str]:
    """A line for each repair and for each fault that is left; the last line is the state."""
    lines = [f"repaired: {line}" for line in found.repaired]
    if found.existing is not None and found.existing.cut:
        lines += connection_lines(found.existing)
    lines += [f"fault: {line}" for line in found.after.faults]
    return [*lines, state_line(found.after)]


def verify_warnings(found: VerifyResult) -> list[str]:
    """Warnings, and connections that were left open. What could not be searched was said by start."""
    if found.existing is None or found.after.policy is None:
        return list(found.warnings)
    return [*found.warnings, *connection_warnings(found.existing._replace(errors=()), found.after.policy.strict)]


def verify_values(found: VerifyResult) -> dict[str, Any]:
    """The result of verify as plain values for JSON."""
    return {
        "state": status_word(found.after),
        "backend": found.after.backend,
        "emergency": found.after.emergency,
        "state_before": status_word(found.before),
        "repaired": found.repaired,
        "faults": found.after.faults,
        "notes": found.warnings,
        "connections": None if found.existing is None else connections_values(found.existing),
    }
