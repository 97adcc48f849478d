# SPDX-License-Identifier: Apache-2.0
"""Who was denied, or would have been in audit mode, and the policy that would let them through."""

from __future__ import annotations

import shlex
from collections import Counter
from typing import Any, NamedTuple

from imds_guard.backends.ebpf.pins import PinLocation
from imds_guard.backends.ebpf.report import Report, Row, read_report
from imds_guard.commands.look import active_policy
from imds_guard.config.read import Config
from imds_guard.config.write import dump_config
from imds_guard.errors import BadPolicy, GuardError, UsageError
from imds_guard.identity import user_id
from imds_guard.policy import edit
from imds_guard.policy.decide import Reason
from imds_guard.policy.endpoint_syntax import format_endpoint
from imds_guard.policy.model import Identities, Lock, Mode, Policy, make_policy
from imds_guard.text import escaped
from imds_guard.watch.leader import require_ebpf
from imds_guard.watch.process_info import Names, fs_text, iso_time, wall_clock

_LISTING_HELPS = (Reason.NOT_LISTED, Reason.TOO_MANY_GROUPS)
"""Reasons that go away when the user is on the allowlist."""

_OTHERWISE: dict[Reason, str] = {
    Reason.DENIED_USER: "users on a deny list stay out until they are off it",
    Reason.DENIED_GROUP: "members of a denied group stay out until the group is off the list, or they out of the group",
    Reason.CONTAINER: 'containers are let in by containers = "allow" alone, which judges them by their IDs',
    Reason.USER_NAMESPACE: "a default that allows does not reach user namespaces: give them an allowlist",
    Reason.KERNEL_THREAD: "kernel threads are always denied",
    Reason.UNSPECIFIED_DESTINATION: "a connect to 0.0.0.0 must name the address itself",
    Reason.UNREADABLE: "what could not be read is denied: imds-guard status tells more",
    Reason.NO_SETTINGS: "the policy was not whole: imds-guard start repairs it",
    Reason.UNAPPROVED_SOCKET: "packets without an approved connect are dropped: the program must connect by itself",
}

_AUDIT = "audit mode denies nobody: when all who should pass are on the list, start with --mode enforce"


class Way(NamedTuple):
    """What would let users in: the command for each, and the whole policy as TOML; empty when listing helps nobody."""

    commands: tuple[tuple[str, int], ...]
    """(command, how many denials it would end)."""
    config: str


class Reported(NamedTuple):
    """The report, and what would let those in it through."""

    report: Report
    way: Way
    notes: tuple[str, ...]
    """What no allowlist changes, a sentence each."""


def report(cgroup: str | None) -> Reported:
    """Reads the report of the policy in force. Raises Unsupported under iptables, GuardError when nothing is active."""
    require_ebpf(cgroup, "reading the report")
    found = read_report(PinLocation.of(cgroup))
    if found is None:
        raise GuardError("reading the report: imds-guard is not active; run imds-guard start first")
    _, policy = active_policy(cgroup)
    notes = tuple(_OTHERWISE[reason] for reason in sorted({row.reason for row in found.rows}) if reason in _OTHERWISE)
    return Reported(found, way_in(policy, found.rows, cgroup), notes)


def way_in(policy: Policy, rows: tuple[Row, ...], cgroup: str | None) -> Way:
    """Commands and policy that would let through everyone in ``rows`` whom an allowlist helps."""
    helped = [row for row in rows if row.reason in _LISTING_HELPS and row.lock is not None]
    if not helped:
        return Way((), "")
    alike, words = _has_one_list(policy), {row.fsuid: user_word(row.fsuid) for row in helped}
    counts: Counter[str] = Counter()
    for row in helped:
        counts[_command(words[row.fsuid], None if alike else _endpoint_of(policy, row), cgroup)] += row.count
    users: dict[str, set[int]] = {}
    for row in helped:
        users.setdefault(row.lock or "", set()).add(row.fsuid)
    locks = [_with_users(lock, users.get(lock.name, set())) for lock in policy.locks]
    wider = make_policy(locks, policy.mode, policy.containers, policy.strict)
    text = dump_config(Config(wider, cgroup=cgroup))
    return Way(tuple(counts.most_common()), text.partition("\n\n")[2])


def _with_users(lock: Lock, users: set[int]) -> Lock:
    return lock._replace(allow=Identities(lock.allow.users | users, lock.allow.groups))


def _command(user: str, endpoint: str | None, cgroup: str | None) -> str:
    words = ["imds-guard", "allow", "--user", user]
    words += [] if endpoint is None else ["--ip", endpoint]
    words += [] if cgroup is None else ["--cgroup", cgroup]
    return shlex.join(words)


def _has_one_list(policy: Policy) -> bool:
    """True when ``allow`` does without --ip: every lock has the same allowlist."""
    try:
        edit.allow(policy, Identities(frozenset((0,))))
    except UsageError:
        return False
    return True


def _endpoint_of(policy: Policy, row: Row) -> str:
    """The lock's endpoint that was asked for; the address alone where the policy has changed since."""
    for lock in policy.locks:
        for endpoint in lock.endpoints if lock.name == row.lock else ():
            if endpoint.covers(row.address):
                return format_endpoint(endpoint)[0]
    return str(row.address)


def user_word(uid: int) -> str:
    """The user's name where it leads back to the ID and can stand in a command, else the ID."""
    name = Names().user(uid)
    try:
        return name if user_id(name) == uid and name.isprintable() else str(uid)
    except BadPolicy:
        return str(uid)


# --- for JSON -------------------------------------------------------------------------------------------------------


def values(found: Reported) -> dict[str, Any]:
    """The report for JSON."""
    names = Names()
    return {
        "mode": found.report.mode.value,
        "generation": found.report.generation,
        "change": found.report.serial,
        "overflow": found.report.overflow,
        "rows": [_row_values(row, names) for row in found.report.rows],
        "allow": [{"command": command, "denials": count} for command, count in found.way.commands],
        "config": found.way.config or None,
        "notes": list(found.notes),
    }


def _row_values(row: Row, names: Names) -> dict[str, Any]:
    return {
        "lock": row.lock,
        "user": escaped(names.user(row.fsuid)),
        "uid": row.fsuid,
        "reason": row.reason.label,
        "count": row.count,
        "first": iso_time(wall_clock(row.first_ns)),
        "last": iso_time(wall_clock(row.last_ns)),
        "address": str(row.address),
        "port": row.port,
        "protocol": None if row.protocol is None else row.protocol.value,
        "comm": escaped(fs_text(row.comm)),
    }


# --- for people -----------------------------------------------------------------------------------------------------

HEAD = ("WHO, LOCK", "WHY, HOW OFTEN", "FIRST TO, BY", "FIRST, LAST (UTC)")

Cell = tuple[str, str]
"""Two lines of a table."""


MANY = 40
"""So many rows and commands are shown; JSON has them all."""
MANY_LINES = 400
"""A longer configuration is left to JSON."""


def lines(found: Reported) -> list[str]:
    """The whole report."""
    rows = ["", *plain(cells(found))] if found.report.rows else ["", "nobody yet"]
    return [*title(found), *rows, *after(found)]


def title(found: Reported) -> list[str]:
    """What the rows are."""
    audit = found.report.mode is Mode.AUDIT
    who = "Who would have been denied" if audit else "Who was denied"
    since = f"{who} since the policy in force was set{' (audit mode)' if audit else ''}."
    return [since, "A change of policy begins a new report."]


def cells(found: Reported) -> list[tuple[Cell, ...]]:
    """The rows of the table, most denials first."""
    names = Names()
    return [_cells(row, names) for row in found.report.rows[:MANY]]


def _cells(row: Row, names: Names) -> tuple[Cell, ...]:
    name = escaped(names.user(row.fsuid))
    who = name if name == str(row.fsuid) else f"{name} ({row.fsuid})"
    first, last = (iso_time(wall_clock(ns))[:19].replace("T", " ") for ns in (row.first_ns, row.last_ns))
    host = f"[{row.address}]" if row.address.version == 6 else str(row.address)
    protocol = "" if row.protocol is None else f" {row.protocol.value}"
    times = "once" if row.count == 1 else f"{row.count:,} times"
    return (
        (who, row.lock or "no lock"),
        (row.reason.label, times),
        (f"{host}:{row.port}{protocol}", escaped(fs_text(row.comm))),
        (first, last),
    )


def plain(rows: list[tuple[Cell, ...]]) -> list[str]:
    """The table without colour."""
    both = [tuple((word, "") for word in HEAD), *rows]
    widths = [max(len(line) for row in both for line in row[column]) for column in range(len(HEAD))]
    lines = []
    for row in both:
        for half in (0, 1):
            words = (cell[half].ljust(width) for cell, width in zip(row, widths))
            lines.append("  ".join(words).rstrip())
    return [line for line in lines if line]


def after(found: Reported) -> list[str]:
    """What stands below the table."""
    report, way = found.report, found.way
    lines = [f"and {len(report.rows) - MANY} more (--json has them all)"] if len(report.rows) > MANY else []
    if report.overflow:
        lines += ["", f"{report.overflow} denials found no room in the report, since the guard was started."]
    notes = [*found.notes, *([_AUDIT] if report.mode is Mode.AUDIT else [])]
    lines += ["", *(f"note: {note}" for note in notes)] if notes else []
    if not way.commands:
        return lines
    lines += ["", "To let them through, run the lines of those who should be:", ""]
    lines += [f"  {command}    # {count}" for command, count in way.commands[:MANY]]
    lines += [f"  # and {len(way.commands) - MANY} more"] if len(way.commands) > MANY else []
    config = way.config.splitlines()
    if len(config) > MANY_LINES:
        return [*lines, "", f"A configuration file for all of them has {len(config)} lines: --json has it."]
    return [*lines, "", "The same for all of them, as a configuration file:", "", *config]
