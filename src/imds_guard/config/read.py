# SPDX-License-Identifier: Apache-2.0
"""Reads the configuration file (TOML) into a Policy.

The commented sample, data/config.toml, is the grammar. Nothing unknown in a file is ignored.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from imds_guard import CONFIG_PATH
from imds_guard.config.filters import filter_uid, read_filters
from imds_guard.config.known_programs import known_programs
from imds_guard.config.names import GROUPS, USERS, Name, Names, PresentNames
from imds_guard.config.source import Source, parse_source, read_source
from imds_guard.config.table import Table, named_tables
from imds_guard.config.toml_lines import KeyLines, Path, load_toml
from imds_guard.errors import BadPolicy
from imds_guard.identity import group_id, user_id
from imds_guard.kernel.dmi import dmi_text as read_dmi_text
from imds_guard.policy.builtin import preset_endpoints
from imds_guard.policy.emergency import EMERGENCY_LOCK
from imds_guard.policy.endpoint_syntax import doubts_about, parse_endpoint
from imds_guard.policy.model import Endpoint, Identities, Lock, Mode, Policy, Verdict, make_policy
from imds_guard.policy.wireserver import split_off_wireserver

TOP_KEYS = (
    *("mode", "containers", "strict", "on_error", "backend", "cgroup", "forwarded", "resolve_groups"),
    *("known_programs", "lock", "filter"),
)
DROP_IN_KEYS = ("lock", "filter")
LOCK_KEYS = ("endpoints", "preset", "users", "groups", "deny_users", "deny_groups", "default", "nobody")


class Config(NamedTuple):
    """The content of a configuration file."""

    policy: Policy
    on_error: str = "closed"
    """What boot does when the file can't be used: ``closed`` applies the emergency lock, ``open`` locks nothing."""
    backend: str = "auto"
    cgroup: str | None = None
    """The path of the cgroup to guard; None for the whole machine."""
    forwarded: str | None = None
    """``drop`` or ``leave`` packets that this machine forwards. None means drop, unless containers are allowed."""
    resolve_groups: bool = False
    known_programs: tuple[str, ...] = ()
    """Names of other people's BPF programs that are no fault."""
    warnings: tuple[str, ...] = ()
    """Sentences about names that are not as the file says. Not compared by ==."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and tuple(self[:-1]) == tuple(other[:-1])

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(tuple(self[:-1]))


def load_config(path: str = CONFIG_PATH, use_stored_ids: bool = False) -> Config:
    """The configuration of the file ``path`` and its drop-ins. Raises BadPolicy: one sentence with file and line."""
    return config_of(read_source(path), PresentNames(use_stored_ids))


def parse_config(text: str, name: str = "config", use_stored_ids: bool = False, dmi_text: str | None = None) -> Config:
    """The configuration in ``text``. Raises BadPolicy; ``name`` is the name of the file in errors.

    A name that is stored with another ID than it has now is an error. With ``use_stored_ids`` the stored ID is used,
    with a warning. ``preset = "default"`` depends on ``dmi_text``; None reads it from the machine.
    """
    return config_of(parse_source(text, name), PresentNames(use_stored_ids), dmi_text)


def config_of(source: Source, names: Names, dmi_text: str | None = None) -> Config:
    """The configuration in ``source``, with the IDs that ``names`` has. Raises BadPolicy."""
    try:
        return _Reader(names, dmi_text).config([_top(part) for part in source.parts])
    except (ValueError, RecursionError, MemoryError) as error:
        # Python's own limits: of the digits of a number that becomes text, of nested calls, of memory.
        raise BadPolicy(f"{source.name}: it can't be used: {str(error) or type(error).__name__}") from None


def _top(part: Source) -> Table:
    return Table(part.name, KeyLines(part.text), (), part.values)


def locks_by_table(text: str) -> dict[str, tuple[Lock, ...]]:
    """The locks of each [lock.NAME] of a usable configuration: one, or two when it contains the WireServer.

    A stored ID is used as it is.
    """
    reader = _Reader(PresentNames(use_stored_ids=True), dmi_text=None)
    lines = KeyLines(text)
    tables = load_toml(text, "config").get("lock", {})
    return {
        name: make_policy(reader.lock(Table("config", lines, ("lock", name), values))).locks
        for name, values in tables.items()
    }


class _Reader:
    """Reads one configuration: the top of its file, and those of its drop-ins."""

    def __init__(self, names: Names, dmi_text: str | None) -> None:
        self.names = names
        self.dmi_text = dmi_text

    def config(self, tops: Sequence[Table]) -> Config:
        top = tops[0]
        top.check_keys(TOP_KEYS)
        for drop_in in tops[1:]:
            _check_drop_in(drop_in)
        mode = Mode(top.choice("mode", ("enforce", "audit")))
        containers = Verdict(top.choice("containers", ("deny", "allow")))
        on_error = top.choice("on_error", ("closed", "open"))
        backend = top.choice("backend", ("auto", "ebpf", "iptables"))
        cgroup = cgroup_path(top)
        policy = self.policy(tops, mode, containers)
        forwarded = _forwarded(top, cgroup)
        resolve, known = top.flag("resolve_groups"), known_programs(top)
        return Config(policy, on_error, backend, cgroup, forwarded, resolve, known, tuple(self.names.warnings))

    def policy(self, tops: Sequence[Table], mode: Mode, containers: Verdict) -> Policy:
        locks = self.locks(tops)
        filters = read_filters(named_tables(tops, "filter"), self.names, self.identities)
        strict = tops[0].flag("strict")
        try:
            return make_policy(locks, mode, containers, strict, filters, filter_uid(filters, self.names))
        except BadPolicy as error:
            _fail_at_table(tops, str(error))

    def locks(self, tops: Sequence[Table]) -> list[Lock]:
        tables = named_tables(tops, "lock")
        if not tables:
            tops[0].fail(None, "no lock is described: add [lock.NAME]")
        return [lock for table in tables for lock in self.lock(table)]

    def lock(self, table: Table) -> tuple[Lock, ...]:
        """The lock of a table; two where the WireServer is one of its endpoints."""
        if table.name == EMERGENCY_LOCK:
            table.fail(None, f"{table.name!r} is reserved for the emergency lock; choose another name")
        table.check_keys(LOCK_KEYS)
        endpoints = self.endpoints(table)
        default = _default(table)
        allow = self.identities(table, "users", "groups")
        missing = len(self.names.missing)
        deny = self.identities(table, "deny_users", "deny_groups")
        if len(self.names.missing) > missing:
            allow, default = _root_at_most(allow, deny, default), Verdict.DENY
        lock = Lock(table.name, endpoints, allow, deny, default)
        try:
            return split_off_wireserver(lock)
        except BadPolicy as error:
            table.fail("endpoints", str(error))

    def endpoints(self, table: Table) -> tuple[Endpoint, ...]:
        found = [table.convert("endpoints", text, parse_endpoint) for text in table.strings("endpoints")]
        self.names.warnings += doubts_about(table.strings("endpoints"))
        for name in table.strings("preset", single=True):
            found += table.convert("preset", name, self.preset)
        if not found:
            table.fail(None, f"lock {table.name!r} locks nothing: add endpoints or a preset")
        return tuple(found)

    def preset(self, name: str) -> tuple[Endpoint, ...]:
        if self.dmi_text is None:
            self.dmi_text = read_dmi_text()
        return preset_endpoints(name, self.dmi_text)

    def identities(self, table: Table, users: str, groups: str) -> Identities:
        return Identities(self.ids(table, users, USERS), self.ids(table, groups, GROUPS))

    def ids(self, table: Table, key: str, kind: str) -> frozenset[int]:
        """The IDs of a list, without the entries that are left out."""
        found = (self.placed_identity(table, key, kind, entry) for entry in table.entries(key))
        return frozenset(number for number in found if number is not None)

    def placed_identity(self, table: Table, key: str, kind: str, entry: Any) -> int | None:
        """identity(); what is wrong with its name gets its place, since a later sentence is about all files."""
        changed, missing = len(self.names.changed), len(self.names.missing)
        found = self.identity(table, key, kind, entry)
        if len(self.names.changed) > changed:
            self.names.changed[-1] = f"{table.place_of(key, entry['name'])}: {self.names.changed[-1]}"
        if len(self.names.missing) > missing and not missing:
            self.names.place_of_missing = table.place_of(key, str(entry))
        return found

    def identity(self, table: Table, key: str, kind: str, entry: Any) -> int | None:
        if isinstance(entry, dict):
            return self.stored_identity(table, key, kind, entry)
        if isinstance(entry, bool) or not isinstance(entry, (str, int)):
            table.fail(key, f"{key} contains {entry!r}: write a name, a number or {{ name = ..., id = ... }}")
        return table.convert(key, entry, lambda one: self.names.number(key, kind, one))

    def stored_identity(self, table: Table, key: str, kind: str, entry: dict[str, Any]) -> int:
        """The ID of ``{ name = ..., id = ... }``."""
        name, number = entry.get("name"), entry.get("id")
        if set(entry) != {"name", "id"} or not isinstance(name, str) or type(number) is not int:
            table.fail(key, f"{key} contains {entry!r}: such an entry has a name (text) and an id (number) only")
        stored = table.convert(key, number, user_id if kind == USERS else group_id)
        return table.convert(key, name, lambda one: self.names.stored(key, Name(kind, one), stored))


def cgroup_path(top: Table) -> str | None:
    """The value of ``cgroup``. None: the whole machine."""
    value = top.values.get("cgroup")
    if value is not None and not (isinstance(value, str) and os.path.isabs(value) and value.isprintable()):
        top.fail("cgroup", f"cgroup = {value!r} must be an absolute path")
    return None if value is None else os.fsdecode(value.encode())  # a path is UTF-8 here, whatever the locale


def _forwarded(top: Table, cgroup: str | None) -> str | None:
    if "forwarded" not in top.values:
        return None
    if cgroup is not None:
        top.fail("forwarded", "forwarded is about the packets of the whole machine, so it can't be used with cgroup")
    return top.choice("forwarded", ("drop", "leave"))


def _check_drop_in(top: Table) -> None:
    for key in top.values:
        if key in TOP_KEYS and key not in DROP_IN_KEYS:
            top.fail(
                key, f"{key} is for the whole configuration, so it stands in config.toml; here are locks and filters"
            )
    top.check_keys(DROP_IN_KEYS)


def _fail_at_table(tops: Sequence[Table], sentence: str) -> NoReturn:
    """Raises BadPolicy at the table that the sentence is about. One about two tables is shown at the later one."""
    kind = "filter" if sentence.startswith("filter ") or "filter name" in sentence else "lock"
    named = [
        (number, top.lines.find((kind, name)) or 0, name)
        for number, top in enumerate(tops)
        for name in top.values.get(kind, {})
        if repr(name) in sentence
    ]
    number, _, name = max(named, default=(0, 0, ""))
    path: Path = (kind, name) if named else ()
    Table(tops[number].file, tops[number].lines, path, {}).fail(None, sentence)


def _root_at_most(allow: Identities, deny: Identities, default: Verdict) -> Identities:
    """The allowlist while an entry of the deny list has no ID: anybody but root may be who is to be denied.

    Root alone can let go of any group, and a machine may not come up without it (the WireServer of Azure).
    """
    stays = 0 in allow.users or (default is Verdict.ALLOW and 0 not in deny.users)
    return Identities(frozenset({0} if stays else ()))


def _default(table: Table) -> Verdict:
    allow = bool(table.entries("users") or table.entries("groups"))
    deny = bool(table.entries("deny_users") or table.entries("deny_groups"))
    nobody = table.flag("nobody")
    absent = "allow" if deny and not allow and not nobody else "deny"
    default = Verdict(table.choice("default", ("deny", "allow"), absent))
    if nobody and (allow or default is Verdict.ALLOW):
        table.fail("nobody", f"lock {table.name!r} allows somebody, which contradicts nobody = true")
    if default is Verdict.DENY and not allow and not nobody:
        table.fail(None, f"lock {table.name!r} allows nobody: add users or groups, or nobody = true if that is meant")
    return default
