# SPDX-License-Identifier: Apache-2.0
"""The events that ``watch`` prints: plain values, and a line for each in one of two forms."""

from __future__ import annotations

import ipaddress
import json
from typing import Any

from imds_guard.backends.ebpf.abi import EGRESS
from imds_guard.backends.ebpf.record import Record
from imds_guard.text import JSON_SCHEMA, host_port, key_value
from imds_guard.watch.cgroup_info import CgroupInfo
from imds_guard.watch.process_info import ProcessInfo, decoded, os_text
from imds_guard.watch.timestamps import iso_time_of

Values = dict[str, Any]
"""One event. For a record ``event`` is one of VERDICTS; else it is about the watch itself: ``began``, ``waiting``,
``ended``, ``lost``, ``left-out``, ``gap``. With ``rule`` it is about requests that a filter ``refused``, or passed on
in audit mode (``audited``).
"""

VERDICTS = ("denied", "audited", "allowed")


def record_values(record: Record, lock: str | None, user: str, cgroup: CgroupInfo, program: ProcessInfo) -> Values:
    """A record with what is known of its caller. None for what is not known.

    The hooks read no caller where the settings of the policy are missing. Of a packet they know the socket's user.
    """
    has_process = record.tgid != 0
    has_user = has_process or record.hook == EGRESS
    return {
        "event": record.verdict,
        "time": iso_time_of(record.time_ns),
        "count": 1,
        "lock": lock,
        "reason": record.reason.label,
        "user": user if has_user else None,
        "uid": record.fsuid if has_user else None,
        "gid": record.fsgid if has_process else None,
        "groups": record.groups if has_process else None,
        "pid": record.tgid or None,
        "thread": record.pid or None,
        "comm": decoded(record.comm) or None,
        "exe": _printable(program.exe),
        "cmdline": _printable(program.command_line),
        "unit": _printable(cgroup.unit),
        "container": _printable(cgroup.container),
        "cgroup": _printable(cgroup.path),
        "cgroup_id": record.cgroup_id or None,
        "netns_cookie": record.netns_cookie or None,
        "address": str(record.address),
        "port": record.port,
        "protocol": None if record.protocol is None else record.protocol.value,
        "hook": record.hook,
    }


def _printable(text: str | None) -> str | None:
    return None if text is None else os_text(text)


def as_json(values: Values) -> str:
    """One line of ASCII. Everything else is escaped, so that no control character reaches a terminal."""
    return json.dumps({"schema": JSON_SCHEMA, **values}, ensure_ascii=True).replace("\x7f", "\\u007f")


# --- lines for people -----------------------------------------------------------------------------------------------

_CALLER_KEYS = ("lock", "reason", "user", "uid", "pid", "comm", "exe", "cmdline", "unit", "container")
_COUNT_KEYS = ("count", "processes", "since")


def as_line(values: Values) -> str:
    """One line of key=value. Unknown values are left out."""
    event = values["event"]
    if "rule" in values:
        return _refusal_line(values)
    if event not in VERDICTS:
        rest = [(key, value) for key, value in values.items() if key not in ("event", "time")]
        return _pairs([("time", values["time"]), ("watch", event), *rest])
    pairs: list[tuple[str, Any]] = [("time", values["time"]), ("verdict", event), ("to", _destination(values))]
    pairs += [(key, values[key]) for key in _CALLER_KEYS]
    pairs.append(("hook", values["hook"]))
    if values["count"] > 1:
        pairs += [(key, values.get(key)) for key in _COUNT_KEYS]
    pairs.append(("would_allow", values.get("would_allow")))
    return _pairs(pairs)


_REFUSAL_KEYS = ("filter", "user", "uid", "method", "path", "rule", "status")


def _refusal_line(values: Values) -> str:
    pairs: list[tuple[str, Any]] = [("time", values["time"]), ("verdict", values["event"])]
    pairs += [(key, values[key]) for key in _REFUSAL_KEYS]
    if values["count"] > 1:
        pairs += [("count", values["count"]), ("since", values.get("since"))]
    return _pairs(pairs)


def _destination(values: Values) -> str:
    protocol = f"/{values['protocol']}" if values["protocol"] else ""
    return host_port(ipaddress.ip_address(values["address"]), values["port"]) + protocol


def _pairs(pairs: list[tuple[str, Any]]) -> str:
    return " ".join(f"{key}={key_value(str(value))}" for key, value in pairs if value is not None)
