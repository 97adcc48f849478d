# SPDX-License-Identifier: Apache-2.0
"""The configuration file (TOML) read into a Policy.

The grammar is the commented sample, data/config.toml. Nothing unknown in a file is ignored.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple, NoReturn, TypeVar, Union

from imds_guard import CONFIG_PATH
from imds_guard.config.toml_lines import KeyLines, Path, load_toml
from imds_guard.errors import BadPolicy, GuardError, system_text
from imds_guard.identity import group_id, user_id
from imds_guard.kernel.dmi import dmi_text as read_dmi_text
from imds_guard.policy.builtin import preset_endpoints
from imds_guard.policy.emergency import EMERGENCY_LOCK
from imds_guard.policy.endpoint_syntax import parse_endpoint
from imds_guard.policy.model import Endpoint, Identities, Lock, Mode, Policy, Verdict, make_policy
from imds_guard.policy.wireserver import split_off_wireserver

_TOP_KEYS = (
    *("mode", "containers", "strict", "on_error", "backend", "cgroup", "forwarded", "resolve_groups"),
    "lock",
)
_LOCK_KEYS = ("endpoints", "preset", "users", "groups", "deny_users", "deny_groups", "default", "nobody")

Word = TypeVar("Word", bound=Union[str, int])
Meaning = TypeVar("Meaning")
Resolve = Callable[[Union[str, int]], int]


class Config(NamedTuple):
    """What a configuration file says. ``warnings`` are sentences about names that have changed since it was saved."""

    policy: Policy
    on_error: str = "closed"
    """What a policy that is unusable at boot leads to: ``closed`` (all but root locked out) or ``open``."""
    backend: str = "auto"
    cgroup: str | None = None
    forwarded: str | None = None
    """As Place.forwarded."""
    resolve_groups: bool = False
    warnings: tuple[str, ...] = ()
    """Configurations that differ in these alone are equal."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and tuple(self[:-1]) == tuple(other[:-1])

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(tuple(self[:-1]))


def load_config(path: str = CONFIG_PATH, use_stored_ids: bool = False, dmi_text: str | None = None) -> Config:
    """The configuration in the file ``path``. Raises BadPolicy, one sentence with the file and the line."""
    return parse_config(read_text(path), path, use_stored_ids, dmi_text)


def read_text(path: str) -> str:
    """What stands in a configuration file. Raises BadPolicy."""
    try:
        # newline="": a file with Windows' line ends is given back with them.
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except OSError as error:
        raise BadPolicy(f"the configuration {path} could not be read: {system_text(error)}") from error
    except UnicodeDecodeError as error:
        raise BadPolicy(f"{path}: this is not TOML: octet {error.start} is not UTF-8") from error


def top_level_string(path: str, key: str) -> str | None:
    """The string of a key that is in no table, of a file that is TOML, whatever else is wrong with it; or None."""
    try:
        said = load_toml(read_text(path), path).get(key)
    except GuardError:
        return None
    return said if isinstance(said, str) else None


def parse_config(text: str, name: str = "config", use_stored_ids: bool = False, dmi_text: str | None = None) -> Config:
    """The configuration in ``text``; ``name`` stands for the file in errors.

    Where an ID is stored beside a name and they no longer agree: BadPolicy, or with ``use_stored_ids`` (at boot) the ID
    and a warning. ``dmi_text`` are for ``preset = "default"``; None reads them from the machine.
    """
    raw = load_toml(text, name)
    return _File(name, KeyLines(text), use_stored_ids, dmi_text).config(raw)


def locks_by_table(text: str, use_stored_ids: bool = False) -> dict[str, tuple[Lock, ...]]:
    """The locks that each table of a usable configuration stands for: one, or two where the WireServer is among it."""
    file = _File("config", KeyLines(text), use_stored_ids, None)
    tables = load_toml(text, "config").get("lock", {})
    return {name: make_policy(file.lock(name, table)).locks for name, table in tables.items()}


class _File:
    """One file being read: where its keys stand, and the warnings so far."""

    def __init__(self, name: str, lines: KeyLines, use_stored_ids: bool, dmi_text: str | None) -> None:
        self.name = name
        self.lines = lines
        self.use_stored_ids = use_stored_ids
        self.dmi_text = dmi_text
        self.warnings: list[str] = []

    def fail(self, path: Path, sentence: str, word: str = "") -> NoReturn:
        """Raises BadPolicy with the line of ``word`` in the value of ``path``."""
        line = self.lines.find(path, word)
        raise BadPolicy(f"{self.name}:{line}: {sentence}" if line else f"{self.name}: {sentence}")

    def config(self, raw: dict[str, Any]) -> Config:
        self.check_keys((), raw, _TOP_KEYS)
        mode = self.choice((), raw, "mode", ("enforce", "audit"))
        containers = self.choice((), raw, "containers", ("deny", "allow"))
        on_error = self.choice((), raw, "on_error", ("closed", "open"))
        backend = self.choice((), raw, "backend", ("auto", "ebpf", "iptables"))
        cgroup = self.cgroup(raw)
        policy = self.policy(self.locks(raw), Mode(mode), Verdict(containers), self.flag((), raw, "strict"))
        forwarded = self.forwarded(raw, cgroup)
        resolve_groups = self.flag((), raw, "resolve_groups")
        return Config(policy, on_error, backend, cgroup, forwarded, resolve_groups, tuple(self.warnings))

    def forwarded(self, raw: dict[str, Any], cgroup: str | None) -> str | None:
        if "forwarded" not in raw:
            return None
        if cgroup is not None:
            self.fail(("forwarded",), "forwarded is about the packets of the whole machine: it does not go with cgroup")
        return self.choice((), raw, "forwarded", ("drop", "leave"))

    def cgroup(self, raw: dict[str, Any]) -> str | None:
        value = raw.get("cgroup")
        if value is not None and not (isinstance(value, str) and os.path.isabs(value)):
            self.fail(("cgroup",), f"cgroup = {value!r} must be an absolute path")
        return value

    def policy(self, locks: Sequence[Lock], mode: Mode, containers: Verdict, strict: bool) -> Policy:
        try:
            return make_policy(locks, mode, containers, strict)
        except BadPolicy as error:
            named = [("lock", lock.name) for lock in locks if repr(lock.name) in str(error)]
            line = max((self.lines.find(path) or 0 for path in named), default=0)
            raise BadPolicy(f"{self.name}:{line}: {error}" if line else f"{self.name}: {error}") from None

    def locks(self, raw: dict[str, Any]) -> list[Lock]:
        tables = raw.get("lock", {})
        if not isinstance(tables, dict):
            self.fail(("lock",), "locks are tables with a name: write [lock.NAME]")
        if not tables:
            self.fail((), "no lock is described: add [lock.NAME]")
        found: list[Lock] = []
        for name, table in tables.items():
            if not isinstance(table, dict):
                self.fail(("lock", name), f"lock.{name} must be a table: write [lock.{name}]")
            found += self.lock(name, table)
        return found

    def lock(self, name: str, table: dict[str, Any]) -> Sequence[Lock]:
        path = ("lock", name)
        if name == EMERGENCY_LOCK:
            self.fail(path, f"{name!r} is what the lock is called that boot puts on when this file is unusable: rename")
        self.check_keys(path, table, _LOCK_KEYS)
        endpoints = self.endpoints(path, table)
        allow = self.identities(path, table, "users", "groups")
        deny = self.identities(path, table, "deny_users", "deny_groups")
        default = self.default(path, table, allow, deny)
        try:
            return split_off_wireserver(Lock(name, endpoints, allow, deny, default))
        except BadPolicy as error:
            self.fail((*path, "endpoints"), str(error))

    def default(self, path: Path, table: dict[str, Any], allow: Identities, deny: Identities) -> Verdict:
        nobody = self.flag(path, table, "nobody")
        usual = "allow" if deny and not allow and not nobody else "deny"
        default = Verdict(self.choice(path, table, "default", ("deny", "allow"), usual))
        if nobody and (allow or default is Verdict.ALLOW):
            self.fail((*path, "nobody"), f"lock {path[-1]!r} lets somebody in, which nobody = true contradicts")
        if default is Verdict.DENY and not allow and not nobody:
            self.fail(path, f"lock {path[-1]!r} allows nobody: give users or groups, or say so with nobody = true")
        return default

    def endpoints(self, path: Path, table: dict[str, Any]) -> tuple[Endpoint, ...]:
        found: list[Endpoint] = []
        for word in self.words(path, table, "endpoints"):
            found.append(self.resolved((*path, "endpoints"), word, parse_endpoint))
        for word in self.words(path, table, "preset"):
            found += self.resolved((*path, "preset"), word, self.preset)
        if not found:
            self.fail(path, f"lock {path[-1]!r} locks nothing: give endpoints or a preset")
        return tuple(found)

    def preset(self, name: str) -> tuple[Endpoint, ...]:
        if self.dmi_text is None:
            self.dmi_text = read_dmi_text()
        return preset_endpoints(name, self.dmi_text)

    def identities(self, path: Path, table: dict[str, Any], users: str, groups: str) -> Identities:
        return Identities(
            frozenset(self.identity((*path, users), entry, user_id) for entry in self.entries(path, table, users)),
            frozenset(self.identity((*path, groups), entry, group_id) for entry in self.entries(path, table, groups)),
        )

    def identity(self, path: Path, entry: Any, resolve: Resolve) -> int:
        if isinstance(entry, dict):
            return self.stored_identity(path, entry, resolve)
        if isinstance(entry, bool) or not isinstance(entry, (str, int)):
            self.fail(path, f"{path[-1]} holds {entry!r}: give a name, a number or {{ name = ..., id = ... }}")
        return self.resolved(path, entry, resolve)

    def stored_identity(self, path: Path, entry: dict[str, Any], resolve: Resolve) -> int:
        name, number = entry.get("name"), entry.get("id")
        if set(entry) != {"name", "id"} or not isinstance(name, str) or type(number) is not int:
            self.fail(path, f"{path[-1]} holds {entry!r}: such an entry has a name and a number, id, and nothing else")
        stored = self.resolved(path, number, resolve)
        try:
            current: int | None = resolve(name)
        except BadPolicy:
            current = None
        if current == stored:
            return stored
        change = "is not known now" if current is None else f"is {current} now"
        sentence = f"{path[-1]}: {name!r} was {stored} when it was saved and {change}"
        if not self.use_stored_ids:
            self.fail(path, f"{sentence}: correct the name or the id", name)
        self.warnings.append(f"{sentence}; the saved ID counts")
        return stored

    def resolved(self, path: Path, word: Word, resolve: Callable[[Word], Meaning]) -> Meaning:
        """``resolve(word)``, with the line where ``word`` stands in the error."""
        try:
            return resolve(word)
        except BadPolicy as error:
            self.fail(path, str(error), str(word))

    def check_keys(self, path: Path, table: dict[str, Any], known: Sequence[str]) -> None:
        for key in table:
            if key not in known:
                where = f"in lock {path[-1]!r}" if path else "at the top"
                self.fail((*path, key), f"unknown key {key!r} {where}: known are {', '.join(known)}")

    def flag(self, path: Path, table: dict[str, Any], key: str) -> bool:
        """True or false; false where the key is absent."""
        value = table.get(key, False)
        if not isinstance(value, bool):
            self.fail((*path, key), f"{key} = {value!r} must be true or false")
        return bool(value)

    def choice(
        self, path: Path, table: dict[str, Any], key: str, words: Sequence[str], usual: str | None = None
    ) -> str:
        """One of ``words``; ``usual``, or the first, where the key is absent."""
        value = table.get(key, words[0] if usual is None else usual)
        if value not in words:
            self.fail((*path, key), f"{key} = {value!r} must be {' or '.join(repr(word) for word in words)}")
        return str(value)

    def entries(self, path: Path, table: dict[str, Any], key: str) -> list[Any]:
        value = table.get(key, [])
        if not isinstance(value, list):
            self.fail((*path, key), f"{key} = {value!r} must be a list")
        return value

    def words(self, path: Path, table: dict[str, Any], key: str) -> list[str]:
        """The strings of a list; for ``preset`` a single string is a list of one."""
        value = table.get(key, [])
        listed = [value] if key == "preset" and isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(word, str) for word in listed):
            self.fail((*path, key), f"{key} = {value!r} must be a list of strings")
        return listed
