# SPDX-License-Identifier: Apache-2.0
"""What is told of denials, as plain values for JSON and as one line for people."""

from __future__ import annotations

import json
from typing import Any

from imds_guard.backends.ebpf.watch import Record
from imds_guard.policy.decide import Reason
from imds_guard.text import escaped, key_value
from imds_guard.watch.process_info import Home, Names, Program, fs_text, iso_time, lenient, wall_clock

Values = dict[str, Any]
"""One thing to tell. ``event`` is ``denied``, ``audited`` or ``allowed``, or says what else it is about: ``lost``,
``left-out``, ``gap`` or ``watch``."""

COUNTED = ("denied", "audited", "allowed")

_SOME_GROUPS = 3

_HELP: dict[Reason, str] = {
    Reason.DENIED_USER: "take user {user} off the deny list",
    Reason.DENIED_GROUP: "take user {user} out of the denied group, or the group off the deny list",
    Reason.CONTAINER: 'containers = "allow" (--containers allow), which judges containers by their IDs',
    Reason.USER_NAMESPACE: "an allow list with user {user}: a default that allows does not reach user namespaces",
    Reason.TOO_MANY_GROUPS: "user {user} by itself (imds-guard allow --user {user}), or at most 128 groups on the list",
    Reason.UNSPECIFIED_DESTINATION: "a connect to the address itself, not to 0.0.0.0",
    Reason.NO_SETTINGS: "imds-guard start, which repairs the policy",
    Reason.UNREADABLE: "imds-guard start, which repairs the policy",
    Reason.UNAPPROVED_SOCKET: "a connection of its own, opened by an allowed user",
}
"""What would have let it through. Nothing does for kernel threads."""


def would_allow(reason: Reason, uid: int, allowed_groups: frozenset[int], names: Names) -> str | None:
    """What would have let a denied caller through; None where nothing would, or nobody knows."""
    user = escaped(names.user(uid))
    if reason is Reason.NOT_LISTED:
        return _list_words(user, allowed_groups, names)
    return _HELP[reason].format(user=user) if reason in _HELP else None


def _list_words(user: str, allowed_groups: frozenset[int], names: Names) -> str:
    by_user = f"imds-guard allow --user {user}"
    groups = sorted(allowed_groups)
    if not groups or user.isdecimal():  # who has no account can't be put into a group
        return by_user
    named = " or ".join(escaped(names.group(gid)) for gid in groups[:_SOME_GROUPS])
    more = len(groups) - _SOME_GROUPS
    return f"add {user} to group {named}{f' (or {more} more)' if more > 0 else ''}, or {by_user}"


def denial(record: Record, lock: str | None, names: Names, home: Home, program: Program) -> Values:
    """One record with what is known of its caller; what is not known is None."""
    has_process = record.tgid != 0
    return {
        "event": record.verdict,
        "time": iso_time(wall_clock(record.time_ns)),
        "count": 1,
        "lock": lock,
        "reason": record.reason.label,
        "user": names.user(record.fsuid),
        "uid": record.fsuid,
        "gid": record.fsgid if has_process else None,
        "groups": record.groups if has_process else None,
        "pid": record.tgid or None,
        "thread": record.pid or None,
        "comm": fs_text(record.comm) or None,
        "exe": None if program.exe is None else lenient(program.exe),
        "cmdline": None if program.command_line is None else lenient(program.command_line),
        "unit": None if home.unit is None else lenient(home.unit),
        "container": None if home.container is None else lenient(home.container),
        "cgroup": None if home.path is None else lenient(home.path),
        "cgroup_id": record.cgroup_id or None,
        "netns_cookie": record.netns_cookie or None,
        "address": str(record.address),
        "port": record.port,
        "protocol": None if record.protocol is None else record.protocol.value,
        "hook": record.hook,
    }


def as_json(values: Values) -> str:
    """One line of ASCII: what is not ASCII is escaped, so that no letter reaches a terminal as it is."""
    return json.dumps(values, ensure_ascii=True).replace("\x7f", "\\u007f")


# --- for people -----------------------------------------------------------------------------------------------------

_SHOWN = ("lock", "reason", "user", "uid", "pid", "comm", "exe", "cmdline", "unit", "container")


def as_line(values: Values) -> str:
    """One line of key=value; what is not known is left out."""
    event = values["event"]
    if event not in COUNTED:
        return _pairs([("time", values["time"]), ("watch", event), *_rest(values)])
    pairs: list[tuple[str, Any]] = [("time", values["time"]), ("verdict", event)]
    pairs.append(("to", _destination(values)))
    pairs += [(key, values[key]) for key in _SHOWN]
    pairs.append(("hook", values["hook"]))
    if values["count"] > 1:
        pairs += [("count", values["count"]), ("processes", values.get("processes")), ("since", values.get("since"))]
    pairs.append(("would_allow", values.get("would_allow")))
    return _pairs(pairs)


def _rest(values: Values) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in values.items() if key not in ("event", "time")]


def _destination(values: Values) -> str:
    address = values["address"]
    host = f"[{address}]" if ":" in address else address
    return f"{host}:{values['port']}" + (f"/{values['protocol']}" if values["protocol"] else "")


def _pairs(pairs: list[tuple[str, Any]]) -> str:
    return " ".join(f"{key}={key_value(str(value))}" for key, value in pairs if value is not None)
