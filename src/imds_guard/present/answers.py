# SPDX-License-Identifier: Apache-2.0
"""The answers of check, explain, endpoints and demo, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from imds_guard.identity import group_name, user_name
from imds_guard.policy.builtin import BUILT_IN, BuiltIn, default_entries
from imds_guard.policy.decide import Caller, Decision, Destination
from imds_guard.policy.endpoint_syntax import format_endpoint
from imds_guard.present.connections import connections_values, would_cut_lines
from imds_guard.present.outcome import not_inspected_values, shut_out_lines, shut_out_values
from imds_guard.present.wrap import MAX_SHOWN, named, wrapped
from imds_guard.text import and_more, count_of, escaped, host_port

if TYPE_CHECKING:
    from imds_guard.commands.demo import DemoResult
    from imds_guard.commands.look import CheckResult, Explanation
    from imds_guard.commands.place import Place
    from imds_guard.policy.model import Policy


# --- check ----------------------------------------------------------------------------------------------------------


def check_lines(found: CheckResult) -> list[str]:
    """Each backend's answer, which backend start would take, and what start would cut."""
    lines = [] if found.file is None or found.policy is None else wrapped("", _fine(found.file, found.policy))
    for checked in found.backends:
        answer = "works here" if checked.refusal is None else str(checked.refusal)
        lines += wrapped(f"{checked.backend.name}: ", answer)
    lines.append(f"start would take: {found.chosen}" if found.chosen else "start would fail: no backend works here")
    lines += [part for line in shut_out_lines(found.shut_out) for part in wrapped("", line)]
    cut = would_cut_lines(found.existing) if found.existing is not None else []
    return lines + [part for line in cut for part in ([line] if line.startswith(" ") else wrapped("", line))]


def _fine(file: str, policy: Policy) -> str:
    endpoints = sum(len(lock.endpoints) for lock in policy.locks)
    locks, filters = count_of(len(policy.locks), "lock"), count_of(len(policy.filters), "filter")
    parts = [locks, *([filters] if policy.filters else []), count_of(endpoints, "endpoint")]
    return f"{file} is fine: {', '.join(parts)}"


def check_values(found: CheckResult) -> dict[str, Any]:
    """The answer of check as plain values for JSON."""
    return {
        "backends": [
            {
                "name": checked.backend.name,
                "works": checked.refusal is None,
                "reason": None if checked.refusal is None else str(checked.refusal),
            }
            for checked in found.backends
        ],
        "configuration": found.file,
        "taken": found.chosen,
        "shut_out": shut_out_values(found.shut_out),
        "not_inspected": not_inspected_values(found.shut_out),
        "connections": None if found.existing is None else connections_values(found.existing),
    }


# --- explain --------------------------------------------------------------------------------------------------------


_FATES = {
    "rejected": "rejected", "dropped": "dropped", "counted": "counted, and pass", "left": "left alone",
    "open": "not rejected",
}  # fmt: skip
_FORWARDED = (
    "the process is in another network namespace; packets of it that this machine forwards to a locked port are {}, "
    "whatever the decision above"
)


_OLDER = {
    "would-pass": "a new process of this user would pass: the groups have changed since this one started; restart it",
    "would-be-denied": "a new process of this user would be denied: the groups have changed since this one started; "
    "restart it, or end it",
}


def explanation_lines(caller: Caller, found: Explanation) -> list[str]:
    """The answer of explain, and what others have beside ours that may change it."""
    lines = decision_lines(caller, found.destination, found.decision, found.place)
    if found.older is not None:
        lines += wrapped("  groups now:  ", _OLDER[found.older.value])
    if found.advice is not None:
        lines += wrapped("  to allow:    ", found.advice)
    return lines + [part for sentence in found.neighbours for part in wrapped("  but:         ", sentence)]


def explanation_values(caller: Caller, found: Explanation) -> dict[str, Any]:
    """The answer of explain as plain values for JSON."""
    return {
        **decision_values(caller, found.destination, found.decision, found.place),
        "neighbours": found.neighbours,
        "would_allow": found.advice,
        "new_process": None if found.older is None else found.older.value,
    }


def decision_lines(caller: Caller, destination: Destination, decision: Decision, place: Place) -> list[str]:
    """The answer of explain: would the connect be allowed, and by which rule."""
    user, group = named(caller.fsuid, user_name(caller.fsuid)), named(caller.fsgid, group_name(caller.fsgid))
    groups = ", ".join(named(gid, group_name(gid)) for gid in sorted(caller.groups)[:MAX_SHOWN]) or "none"
    lines = [
        f"{'allowed' if decision.allowed else 'denied'}: {decision.reason.label}",
        f"  caller:      fsuid {user}, fsgid {group}",
        *wrapped("  groups:      ", groups + and_more(len(caller.groups), MAX_SHOWN)),
        *([] if place.container is None else wrapped("  container:   ", escaped(place.container))),
        f"  destination: {host_port(destination.address, destination.port)} {destination.protocol.value}",
        f"  lock:        {decision.lock or 'none'}",
    ]
    if decision.filter is not None:
        lines.append(f"  filter:      {decision.filter}")
    if decision.matched is not None:
        kind, number = decision.matched
        name = user_name(number) if kind == "user" else group_name(number)
        lines.append(f"  by:          {kind} {named(number, name)} on the list")
    if decision.allowed and not decision.reason.permits:
        lines.append("  audit mode lets it through")
    if place.forwarded is not None and decision.lock is not None:
        lines += wrapped("  forwarded:   ", _FORWARDED.format(_FATES[place.forwarded.value]))
    return lines


def decision_values(caller: Caller, destination: Destination, decision: Decision, place: Place) -> dict[str, Any]:
    """The answer of explain as plain values for JSON."""
    return {
        "allowed": decision.allowed,
        "reason": decision.reason.label,
        "lock": decision.lock,
        "filter": decision.filter,
        "matched": None if decision.matched is None else {"kind": decision.matched[0], "id": decision.matched[1]},
        "caller": {
            "fsuid": caller.fsuid,
            "fsgid": caller.fsgid,
            "groups": sorted(caller.groups),
            "in_container": caller.in_container,
        },
        "container": place.container,
        "forwarded": None if place.forwarded is None or decision.lock is None else place.forwarded.value,
        "destination": {
            "address": str(destination.address),
            "port": destination.port,
            "protocol": destination.protocol.value,
        },
    }


# --- endpoints ------------------------------------------------------------------------------------------------------


def endpoint_rows(dmi_text: str) -> list[dict[str, Any]]:
    """The built-in table as plain values for JSON: a row for each address."""
    here = {entry.address for entry in default_entries(dmi_text)}
    return [_endpoint_row(entry, entry.address in here) for entry in BUILT_IN]


def _endpoint_row(entry: BuiltIn, locked_here: bool) -> dict[str, Any]:
    return {
        "address": str(entry.address),
        "endpoint": format_endpoint(entry.endpoint),
        "protocol": "tcp",
        "presets": sorted(entry.presets),
        "default": entry.default_on.value,
        "locked_by_default_here": locked_here,
        "services": [
            {"name": service.name, "ports": service.ports, "source": service.source} for service in entry.services
        ],
        "note": entry.note,
    }


def endpoint_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The built-in table as text. Only the sources may be longer than 80 columns."""
    lines = []
    for row in rows:
        mark = "*" if row["locked_by_default_here"] else " "
        lines.append(f"{mark} {', '.join(row['endpoint'])}")
        lines += wrapped("    ", f"default: {row['default']}; presets: {', '.join(row['presets'])}")
        for service in row["services"]:
            lines += wrapped("    ", f"{service['name']} (port {service['ports']}): {service['source']}", " " * 6)
        if row["note"]:
            lines += wrapped("    note: ", row["note"])
    return [*lines, "* locked on this machine when nothing else is asked for"]


# --- demo -----------------------------------------------------------------------------------------------------------


def demo_values(result: DemoResult) -> dict[str, Any]:
    """The result of demo as plain values for JSON."""
    rows = [
        {"caller": row.caller, "address": row.address, "before": row.before, "after": row.after, "why": row.why}
        for row in result.rows
    ]
    return {"backend": result.backend, "as_decided": result.whole, "rows": rows}
