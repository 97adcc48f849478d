# SPDX-License-Identifier: Apache-2.0
"""Writes a configuration as TOML that config/read.py reads."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Callable, NamedTuple, Union

from imds_guard.config.read import Config
from imds_guard.config.spelling import NO_PRESETS, Presets, Spelling, spellings
from imds_guard.errors import BadPolicy
from imds_guard.identity import group_id, group_name, user_id, user_name
from imds_guard.kernel.name_service import NoAnswer
from imds_guard.policy.endpoint_syntax import format_endpoint
from imds_guard.policy.filters import PLAIN_HTTP, Filter
from imds_guard.policy.model import Lock

Value = Union[str, bool, list[str]]


class IdList(NamedTuple):
    """A list of users or groups in a lock's table."""

    key: str
    ids: frozenset[int]
    name_of: Callable[[int], str]
    id_of: Callable[[str | int], int]

    def format(self, number: int) -> str:
        """The TOML entry for one ID."""
        return format_id(number, self.name_of(number), self.id_of)


class TopValue(NamedTuple):
    """A key outside all tables. A value of None means that the key is absent."""

    key: str
    value: Value | None
    default: Value | None
    """The value that an absent key stands for."""


def dump_config(config: Config, presets: Presets = NO_PRESETS) -> str:
    """TOML that parse_config() reads as the same configuration. Names are written with their IDs."""
    lines = ["# Written by imds-guard --save.", ""]
    lines += [f"{top.key} = {format_value(top.value)}" for top in top_values(config) if top.value is not None]
    lines += dump_locks({lock.name: lock for lock in config.policy.locks}, presets)
    for one in config.policy.filters:
        lines += dump_filter(one)
    return "\n".join(lines) + "\n"


def top_values(config: Config) -> list[TopValue]:
    """All keys outside the tables of locks, in the order in which they are written."""
    return [
        TopValue("mode", config.policy.mode.value, "enforce"),
        TopValue("containers", config.policy.containers.value, "deny"),
        TopValue("strict", config.policy.strict, False),
        TopValue("on_error", config.on_error, "closed"),
        TopValue("backend", config.backend, "auto"),
        TopValue("cgroup", None if config.cgroup is None else _path_text(config.cgroup), None),
        TopValue("forwarded", config.forwarded, None),
        TopValue("resolve_groups", config.resolve_groups, False),
        TopValue("known_programs", list(config.known_programs) or None, None),
    ]


def _path_text(path: str) -> str:
    try:
        return os.fsencode(path).decode()
    except UnicodeDecodeError as error:
        raise BadPolicy(f"writing the path {path!r}: it is not UTF-8, and TOML has nothing else") from error


def dump_locks(locks: Mapping[str, Lock], presets: Presets) -> list[str]:
    """The lines of the tables of these locks, each after an empty line."""
    tables = spellings(locks, presets)
    return [line for name, written in tables.items() for line in _dump_lock(locks[name], written)]


def _dump_lock(lock: Lock, written: Spelling) -> list[str]:
    lines = ["", f"[lock.{quoted(lock.name)}]", *dump_preset(written), *dump_endpoints(written)]
    for listed in id_lists(lock):
        lines += dump_list(listed.key, [listed.format(number) for number in sorted(listed.ids)])
    lines.append(f"default = {quoted(lock.default.value)}")
    if lock.allows_nobody:
        lines.append("nobody = true")
    return lines


def dump_filter(one: Filter) -> list[str]:
    """The lines of a filter's table, after an empty line."""
    rules = one.rules
    lines = ["", f"[filter.{quoted(one.name)}]", *dump_filter_locks(one)]
    if one.everyone:
        lines.append("everyone = true")
    for listed in (
        IdList("users", one.who.users, user_name, user_id),
        IdList("groups", one.who.groups, group_name, group_id),
    ):
        lines += dump_list(listed.key, [listed.format(number) for number in sorted(listed.ids)])
    if one.port != PLAIN_HTTP:
        lines.append(f"port = {one.port}")
    headers = () if rules.headers is None else (rules.headers,)
    for key, texts in (
        ("rules", rules.sets),
        ("allow", rules.allow),
        ("deny", rules.deny),
        ("headers", headers),
        ("user_agents", rules.user_agents),
    ):
        lines += dump_list(key, [quoted(text) for text in texts])
    lines += ["require_imdsv2 = true"] if rules.require_imdsv2 else []
    return [*lines, 'mode = "audit"'] if rules.audit else lines


def dump_filter_locks(one: Filter) -> list[str]:
    """The lines of the key ``locks``."""
    return dump_list("locks", [quoted(name) for name in one.locks])


def dump_preset(written: Spelling) -> list[str]:
    """The line of the key ``preset``; none without presets."""
    names = list(written.presets)
    return [f"preset = {format_value(names[0] if len(names) == 1 else names)}"] if names else []


def dump_endpoints(written: Spelling) -> list[str]:
    """The lines of the key ``endpoints``."""
    return dump_list("endpoints", [quoted(text) for item in written.endpoints for text in format_endpoint(item)])


def id_lists(lock: Lock) -> list[IdList]:
    """The lists of a lock, in the order in which they are written."""
    return [
        IdList("users", lock.allow.users, user_name, user_id),
        IdList("groups", lock.allow.groups, group_name, group_id),
        IdList("deny_users", lock.deny.users, user_name, user_id),
        IdList("deny_groups", lock.deny.groups, group_name, group_id),
    ]


def dump_list(key: str, items: Sequence[str]) -> list[str]:
    """The lines of a list, one per item; no lines for an empty list."""
    return [f"{key} = [", *(f"  {item}," for item in items), "]"] if items else []


def format_id(number: int, name: str, id_of: Callable[[str | int], int]) -> str:
    """The name with its ID; the ID alone where the name has another ID or TOML can't hold the name."""
    if name == str(number) or not name.isprintable():
        return str(number)
    try:
        leads_back = id_of(name) == number
    except (BadPolicy, NoAnswer):
        leads_back = False
    return f"{{ name = {quoted(name)}, id = {number} }}" if leads_back else str(number)


def format_value(value: Value) -> str:
    """A TOML string, boolean or list of strings."""
    if isinstance(value, list):
        return f"[{', '.join(map(quoted, value))}]"
    return quoted(value) if isinstance(value, str) else str(value).lower()


def quoted(text: str) -> str:
    """A TOML basic string (https://toml.io/en/v1.0.0#string)."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(f"\\u{ord(c):04x}" if c < " " or c == "\x7f" else c for c in escaped) + '"'
