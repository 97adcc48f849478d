# SPDX-License-Identifier: Apache-2.0
"""A configuration as TOML: the words that config_reader reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable, Union

from imds_guard.config.read import Config
from imds_guard.errors import BadPolicy
from imds_guard.identity import group_id, group_name, user_id, user_name
from imds_guard.policy.endpoint_syntax import format_endpoint
from imds_guard.policy.model import Lock

IdList = tuple[str, frozenset[int], Callable[[int], str], Callable[[str], int]]
"""A key of a lock, the IDs in it, and how these and names lead to each other."""


def dump_config(config: Config) -> str:
    """TOML that parse_config() reads as the same configuration. Names stand with their IDs."""
    lines = ["# Written by imds-guard --save.", ""]
    lines += [f"{key} = {scalar(value)}" for key, value, _ in top_values(config) if value is not None]
    for lock in config.policy.locks:
        lines += dump_lock(lock)
    return "\n".join(lines) + "\n"


Scalar = Union[str, bool]


def scalar(value: Scalar) -> str:
    """A TOML string or boolean."""
    return quoted(value) if isinstance(value, str) else str(value).lower()


def top_values(config: Config) -> list[tuple[str, Scalar | None, Scalar | None]]:
    """The keys at the top with their values, and with those that an absent key stands for; None is an absent key."""
    return [
        ("mode", config.policy.mode.value, "enforce"),
        ("containers", config.policy.containers.value, "deny"),
        ("strict", config.policy.strict, False),
        ("on_error", config.on_error, "closed"),
        ("backend", config.backend, "auto"),
        ("cgroup", config.cgroup, None),
        ("forwarded", config.forwarded, None),
        ("resolve_groups", config.resolve_groups, False),
    ]


def dump_lock(lock: Lock) -> list[str]:
    """The table of a lock, after an empty line."""
    lines = ["", f"[lock.{quoted(lock.name)}]", *dump_endpoints(lock)]
    for key, ids, name_of, id_of in id_lists(lock):
        lines += dump_list(key, [dump_id(number, name_of(number), id_of) for number in sorted(ids)])
    lines.append(f"default = {quoted(lock.default.value)}")
    if lock.allows_nobody:
        lines.append("nobody = true")
    return lines


def dump_endpoints(lock: Lock) -> list[str]:
    """The list of endpoints."""
    return dump_list("endpoints", [quoted(word) for item in lock.endpoints for word in format_endpoint(item)])


def id_lists(lock: Lock) -> list[IdList]:
    """The lists of a lock, in the order in which they are written."""
    return [
        ("users", lock.allow.users, user_name, user_id),
        ("groups", lock.allow.groups, group_name, group_id),
        ("deny_users", lock.deny.users, user_name, user_id),
        ("deny_groups", lock.deny.groups, group_name, group_id),
    ]


def dump_list(key: str, items: Sequence[str]) -> list[str]:
    """A key with a list, an item a line; nothing for an empty one."""
    return [f"{key} = [", *(f"  {item}," for item in items), "]"] if items else []


def dump_id(number: int, name: str, id_of: Callable[[str], int]) -> str:
    """The name with its ID; the ID alone where no name leads back to it, or none that TOML could hold."""
    if name == str(number) or not name.isprintable():
        return str(number)
    try:
        leads_back = id_of(name) == number
    except BadPolicy:
        leads_back = False
    return f"{{ name = {quoted(name)}, id = {number} }}" if leads_back else str(number)


def quoted(text: str) -> str:
    """A TOML basic string (https://toml.io/en/v1.0.0#string)."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(f"\\u{ord(c):04x}" if c < " " or c == "\x7f" else c for c in escaped) + '"'
