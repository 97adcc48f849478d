# SPDX-License-Identifier: Apache-2.0
"""What the commands print: text for people, and the same as plain values for JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from imds_guard.identity import group_name, user_name
from imds_guard.policy.builtin import BUILT_IN, BuiltIn, default_entries
from imds_guard.policy.endpoint_syntax import endpoint_words
from imds_guard.policy.model import Caller, Decision, Destination, Identities, Lock, Mode, Policy, Reason, Verdict
from imds_guard.present.connections import (
    connection_lines,
    connection_warnings,
    connections_values,
    would_cut_lines,
)

if TYPE_CHECKING:
    from imds_guard.backends.ebpf import State
    from imds_guard.backends.ebpf.hooks import Hook
    from imds_guard.commands.demo import DemoResult
    from imds_guard.commands.guard import Outcome
    from imds_guard.commands.look import CheckResult, Status
    from imds_guard.commands.preflight import ShutOut
    from imds_guard.commands.verify import VerifyResult

WIDTH = 78

MANY = 12
"""Of a longer list the text shows so many, and how many more there are; JSON has them all."""


# --- policies -------------------------------------------------------------------------------------------------------


def _named(number: int, name: str) -> str:
    return f"{name} ({number})" if name != str(number) else name


def _some(items: Sequence[str]) -> str:
    rest = len(items) - MANY
    return ", ".join(items[:MANY]) + (f", and {rest} more" if rest > 0 else "")


def identities_text(who: Identities) -> str:
    """``user foo (1001), group canAccessIP (999)``; ``nobody``."""
    users = [f"user {_named(uid, user_name(uid))}" for uid in sorted(who.users)[: MANY + 1]]
    groups = [f"group {_named(gid, group_name(gid))}" for gid in sorted(who.groups)[: MANY + 1]]
    shown = (users + groups)[:MANY]
    rest = len(who.users) + len(who.groups) - len(shown)
    return (", ".join(shown) + (f", and {rest} more" if rest else "")) or "nobody"


def lock_lines(lock: Lock) -> list[str]:
    """A lock in a few lines, the first one its name."""
    words = [word for endpoint in lock.endpoints for word in endpoint_words(endpoint)]
    lines = [f"lock {lock.name}", *_wrapped("  endpoints: ", _some(words))]
    if lock.deny:
        lines += _wrapped("  denied:    ", identities_text(lock.deny))
    allowed = identities_text(lock.allow) if lock.allow else "everyone else" if _lets_rest(lock) else "nobody"
    lines += _wrapped("  allowed:   ", allowed)
    if lock.allow and _lets_rest(lock):
        lines.append("  others:    allowed")
    return lines


def _wrapped(title: str, text: str, indent: str = "") -> list[str]:
    """Lines of at most WIDTH, unless a word (a path, an endpoint that someone will copy) is longer than that."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=title,
        subsequent_indent=indent or " " * len(title),
        break_on_hyphens=False,
        break_long_words=False,
    )


def _lets_rest(lock: Lock) -> bool:
    return lock.default is Verdict.ALLOW


def _ids(who: Identities) -> dict[str, Any]:
    return {
        "users": [{"id": uid, "name": user_name(uid)} for uid in sorted(who.users)],
        "groups": [{"id": gid, "name": group_name(gid)} for gid in sorted(who.groups)],
    }


def policy_values(policy: Policy | None) -> dict[str, Any] | None:
    """A policy for JSON."""
    if policy is None:
        return None
    return {
        "mode": policy.mode.value,
        "containers": policy.containers.value,
        "strict": policy.strict,
        "locks": [
            {
                "name": lock.name,
                "endpoints": [word for endpoint in lock.endpoints for word in endpoint_words(endpoint)],
                "allow": _ids(lock.allow),
                "deny": _ids(lock.deny),
                "default": lock.default.value,
            }
            for lock in policy.locks
        ],
    }


# --- start, allow, revoke -------------------------------------------------------------------------------------------


def outcome_lines(outcome: Outcome) -> list[str]:
    """What was done, and what holds now."""
    policy = outcome.policy
    endpoints = sum(len(lock.endpoints) for lock in policy.locks)
    state = "active" if policy.mode is Mode.ENFORCE else "active in audit mode, which denies nobody"
    lines = [part for line in outcome.done for part in _wrapped("", line)]
    count = f"{endpoints} endpoint{'' if endpoints == 1 else 's'}"
    lines.append(f"imds-guard is {state} ({outcome.backend}): {count} locked")
    for lock in policy.locks:
        lines += ["  " + line for line in lock_lines(lock)]
    return lines + (connection_lines(outcome.existing) if outcome.existing is not None else [])


def outcome_warnings(outcome: Outcome) -> list[str]:
    """What to look at, a sentence each."""
    warnings = list(outcome.warnings)
    for lock in outcome.policy.locks:
        if lock.allows_nobody:
            warnings.append(f"lock {lock.name} lets nobody through, root included")
    if outcome.existing is not None:
        warnings += connection_warnings(outcome.existing, outcome.policy.strict)
    return warnings + shut_out_lines(outcome.shut_out)


def shut_out_lines(shut_out: Sequence[ShutOut]) -> list[str]:
    """A sentence for each process that the policy shuts out."""
    return [
        f"{one.name} (pid {one.pid}, user {one.user}) is shut out: it {one.why}"
        if one.pid is not None
        else f"{one.name} is shut out: it {one.why}"
        for one in shut_out
    ]


def shut_out_values(shut_out: Sequence[ShutOut]) -> list[dict[str, Any]]:
    """The same for JSON."""
    return [{"pid": one.pid, "name": one.name, "user": one.user, "why": one.why} for one in shut_out]


def outcome_values(outcome: Outcome) -> dict[str, Any]:
    """An outcome for JSON."""
    return {
        "backend": outcome.backend,
        "policy": policy_values(outcome.policy),
        "done": outcome.done,
        "warnings": outcome.warnings,
        "shut_out": shut_out_values(outcome.shut_out),
        "connections": None if outcome.existing is None else connections_values(outcome.existing),
    }


# --- status ---------------------------------------------------------------------------------------------------------


def status_word(status: Status) -> str:
    """``active``, ``degraded`` or ``inactive``."""
    if status.faults:
        return "degraded"
    return "inactive" if status.backend is None else "active"


def state_line(status: Status) -> str:
    """The state in a line."""
    backend = f" ({status.backend})" if status.backend else ""
    mode = ", audit mode: nobody is denied" if status.policy and status.policy.mode is Mode.AUDIT else ""
    emergency = ": emergency lock" if status.emergency else ""
    return f"imds-guard: {status_word(status)}{emergency}{backend}{mode}"


def status_lines(status: Status) -> list[str]:
    """The state for people, most important line first."""
    lines = [state_line(status)]
    for fault in status.faults:
        lines += _wrapped("  fault: ", fault)
    if status.ebpf is not None:
        lines += _ebpf_lines(status.ebpf)
    if status.policy is not None:
        lines.append(f"containers: {'judged by their IDs' if status.policy.containers is Verdict.ALLOW else 'denied'}")
        if status.policy.strict:
            fate = "dropped" if status.policy.mode is Mode.ENFORCE else "counted, and pass"
            lines.append(f"strict: packets of sockets that were not let through are {fate}")
        for lock in status.policy.locks[:MANY]:
            lines += lock_lines(lock)
        if len(status.policy.locks) > MANY:
            lines.append(f"and {len(status.policy.locks) - MANY} more locks (--json has them all)")
    return lines


def _ebpf_lines(state: State) -> list[str]:
    where = f"{state.cgroup}, every process of the machine" if state.cgroup_is_root else state.cgroup
    lines = [f"attached to: {where}", f"version: {', '.join(state.versions) or 'none'}, generation {state.generation}"]
    for hook in state.hooks:
        lines += _hook_lines(hook)
    counted = [
        f"{reason.word} {enforced + audited}" + (f" ({audited} let through by audit mode)" if audited else "")
        for reason, (enforced, audited) in zip(Reason, state.counters)
        if enforced or audited
    ]
    return lines + _wrapped("connects to locked endpoints: ", ", ".join(counted) or "none yet")


def _hook_lines(hook: Hook) -> list[str]:
    order = ", ".join(
        f"{program.name or '(unnamed)'} (id {program.id})" + (" [ours]" if program is hook.ours else "")
        for program in hook.attached
    )
    return _wrapped(f"  {hook.name}: ", order or "nothing attached")


def status_values(status: Status) -> dict[str, Any]:
    """The state for JSON."""
    values: dict[str, Any] = {
        "state": status_word(status),
        "backend": status.backend,
        "emergency": status.emergency,
        "faults": status.faults,
        "policy": policy_values(status.policy),
    }
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
        "counters": {
            reason.word: {"enforced": enforced, "audited": audited}
            for reason, (enforced, audited) in zip(Reason, state.counters)
        },
    }


# --- explain and endpoints ------------------------------------------------------------------------------------------


def decision_lines(caller: Caller, destination: Destination, decision: Decision) -> list[str]:
    """The answer to "would it be allowed, and by which rule"."""
    host = f"[{destination.address}]" if destination.address.version == 6 else str(destination.address)
    who = (
        f"fsuid {_named(caller.fsuid, user_name(caller.fsuid))}, fsgid {_named(caller.fsgid, group_name(caller.fsgid))}"
    )
    groups = ", ".join(_named(gid, group_name(gid)) for gid in sorted(caller.groups)[:MANY]) or "none"
    more = len(caller.groups) - MANY
    lines = [
        f"{'allowed' if decision.allowed else 'denied'}: {decision.reason.word}",
        f"  caller:      {who}",
        *_wrapped("  groups:      ", groups + (f", and {more} more" if more > 0 else "")),
        f"  destination: {host}:{destination.port} {destination.protocol.value}",
        f"  lock:        {decision.lock or 'none'}",
    ]
    if decision.matched is not None:
        kind, number = decision.matched
        name = user_name(number) if kind == "user" else group_name(number)
        lines.append(f"  by:          {kind} {_named(number, name)} on the list")
    if decision.allowed and not decision.reason.permits:
        lines.append("  audit mode lets it through")
    return lines


def decision_values(caller: Caller, destination: Destination, decision: Decision) -> dict[str, Any]:
    """The same for JSON."""
    return {
        "allowed": decision.allowed,
        "reason": decision.reason.word,
        "lock": decision.lock,
        "matched": None if decision.matched is None else {"kind": decision.matched[0], "id": decision.matched[1]},
        "caller": {
            "fsuid": caller.fsuid,
            "fsgid": caller.fsgid,
            "groups": sorted(caller.groups),
            "in_container": caller.in_container,
        },
        "destination": {
            "address": str(destination.address),
            "port": destination.port,
            "protocol": destination.protocol.value,
        },
    }


def endpoint_rows(dmi_words: str) -> list[dict[str, Any]]:
    """The built-in table: a row for each service at each address."""
    here = {entry.address for entry in default_entries(dmi_words)}
    return [_endpoint_row(entry, entry.address in here) for entry in BUILT_IN]


def _endpoint_row(entry: BuiltIn, locked_here: bool) -> dict[str, Any]:
    return {
        "address": str(entry.address),
        "endpoint": endpoint_words(entry.endpoint),
        "protocol": "tcp",
        "presets": sorted(entry.presets),
        "default": entry.standing.value,
        "locked_by_default_here": locked_here,
        "services": [
            {"name": service.name, "ports": service.ports, "source": service.source} for service in entry.services
        ],
        "note": entry.note,
    }


def endpoint_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table for people: 80 columns, but for the sources."""
    lines = []
    for row in rows:
        mark = "*" if row["locked_by_default_here"] else " "
        lines.append(f"{mark} {', '.join(row['endpoint'])}")
        lines += _wrapped("    ", f"default: {row['default']}; presets: {', '.join(row['presets'])}")
        for service in row["services"]:
            lines += _wrapped("    ", f"{service['name']} (port {service['ports']}): {service['source']}", " " * 6)
        if row["note"]:
            lines += _wrapped("    note: ", row["note"])
    return [*lines, "* locked on this machine when nothing else is asked for"]


# --- verify ---------------------------------------------------------------------------------------------------------


def verify_lines(found: VerifyResult) -> list[str]:
    """A line for each repair and for each fault that is left; the state last."""
    lines = [f"repaired: {line}" for line in found.repaired]
    lines += [f"fault: {line}" for line in found.after.faults]
    return [*lines, state_line(found.after)]


def verify_values(found: VerifyResult) -> dict[str, Any]:
    """The same for JSON."""
    return {
        "state": status_word(found.after),
        "backend": found.after.backend,
        "emergency": found.after.emergency,
        "state_before": status_word(found.before),
        "repaired": found.repaired,
        "faults": found.after.faults,
        "notes": found.warnings,
    }


# --- check ----------------------------------------------------------------------------------------------------------


def check_lines(found: CheckResult) -> list[str]:
    """What each backend says, and which one start would take."""
    lines = []
    for checked in found.backends:
        answer = "works here" if checked.refusal is None else str(checked.refusal)
        lines += _wrapped(f"{checked.backend.name}: ", answer)
    lines.append(f"start would take: {found.chosen or 'nothing, it would fail'}")
    lines += [part for line in shut_out_lines(found.shut_out) for part in _wrapped("", line)]
    cut = would_cut_lines(found.existing) if found.existing is not None else []
    return lines + [part for line in cut for part in ([line] if line.startswith(" ") else _wrapped("", line))]


def check_values(found: CheckResult) -> dict[str, Any]:
    """The same for JSON."""
    return {
        "backends": [
            {
                "name": checked.backend.name,
                "works": checked.refusal is None,
                "reason": None if checked.refusal is None else str(checked.refusal),
            }
            for checked in found.backends
        ],
        "taken": found.chosen,
        "shut_out": shut_out_values(found.shut_out),
        "connections": None if found.existing is None else connections_values(found.existing),
    }


def demo_values(result: DemoResult) -> dict[str, Any]:
    """The demonstration for JSON."""
    rows = [
        {"caller": row.caller, "address": row.address, "before": row.before, "after": row.after, "why": row.why}
        for row in result.rows
    ]
    return {"backend": result.backend, "as_decided": result.whole, "rows": rows}
