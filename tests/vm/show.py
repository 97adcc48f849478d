# SPDX-License-Identifier: Apache-2.0
"""Outcomes and cases in words, for a failure: only what differs, field by field."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import NamedTuple

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.record import decode
from imds_guard.config.read import Config
from imds_guard.config.write import dump_config
from imds_guard.policy.decide import Reason
from imds_guard.policy.model import Policy
from tests.vm.values import Attempt, Outcome

_ROW_KEY = ("generation", "reason", "lock", "who", "id")
_ROW = ("count", "first_ns", "last_ns", "address", "port", "protocol", "comm")
_MARK = ("serial", "fsuid", "gid", "list", "kind", "container_unchecked")
_ABSENT = "nothing"
_LABELS: dict[object, str] = {reason: reason.label for reason in Reason}


def differing_fields(expected: Outcome, got: Outcome) -> list[str]:
    """One line for each field: what was expected, and what there was."""
    wanted, found = _fields(expected), _fields(got)
    return [
        f"  {name}: expected {wanted.get(name, _ABSENT)}, got {found.get(name, _ABSENT)}"
        for name in {**wanted, **found}
        if wanted.get(name, _ABSENT) != found.get(name, _ABSENT)
    ]


def _fields(outcome: Outcome) -> dict[str, object]:
    found: dict[str, object] = {
        "returned": outcome.returned,
        "counts": outcome.counts,
        "records": outcome.events,
        "rows of the report": outcome.rows,
        "traps": sorted(outcome.traps),
    }
    if outcome.event:
        found.update(_prefixed("record", decode(outcome.event)._asdict()))
        found["record, raw"] = outcome.event.hex()
    if outcome.row is not None:
        key, value = outcome.row
        found.update(_prefixed("row", dict(zip(_ROW_KEY, abi.REPORT_KEY.unpack(key)))))
        found.update(_prefixed("row", dict(zip(_ROW, abi.REPORT.unpack(value)))))
        found["row, raw"] = value.hex()
    if outcome.mark is not None:
        found.update(_prefixed("mark", dict(zip(_MARK, abi.MARK.unpack(outcome.mark)))))
        found["mark, raw"] = outcome.mark.hex()
    return found


def _prefixed(name: str, values: Mapping[str, object]) -> dict[str, object]:
    return {f"{name}.{key}": _LABELS.get(value, value) if key == "reason" else value for key, value in values.items()}


def policy_text(policy: Policy) -> str:
    """As a configuration file has it, which can be started."""
    lines = dump_config(Config(policy)).splitlines()
    return "\n".join(f"    {line}" for line in lines if line and not line.startswith("#"))


def given(value: NamedTuple) -> str:
    """A task or an attempt, without the fields that have their default."""
    defaults = value._field_defaults
    shown = {name: one for name, one in value._asdict().items() if name not in defaults or one != defaults[name]}
    if isinstance(value, Attempt):
        addresses = ("to", "source", "message_source")
        shown.update({name: str(ipaddress.ip_address(shown[name])) for name in addresses if name in shown})
    return f"{type(value).__name__}({', '.join(f'{name}={one!r}' for name, one in shown.items())})"
