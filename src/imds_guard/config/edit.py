# SPDX-License-Identifier: Apache-2.0
"""Changes a configuration file that a person wrote: comments, order and spelling stay.

tomlkit changes and removes existing keys. New keys are inserted as text, because tomlkit puts them after the comment of
the next table. The result is read again, and used only if it is the configuration that was wanted.
"""

from __future__ import annotations

from typing import Any

from imds_guard.config.read import Config, locks_by_table, parse_config
from imds_guard.config.toml_lines import KeyLines, Path
from imds_guard.config.write import (
    IdList,
    dump_endpoints,
    dump_filter,
    dump_filter_locks,
    dump_list,
    dump_lock,
    format_value,
    id_lists,
    quoted,
    top_values,
)
from imds_guard.errors import BadPolicy, GuardError, Unsupported
from imds_guard.policy.filters import Filter
from imds_guard.policy.model import Lock, Verdict, make_policy
from imds_guard.policy.wireserver import split_off_wireserver

Insertion = tuple[Path, list[str]]
"""New lines, and the table whose header they follow; the empty path is the top of the file."""


def require_tomlkit(path: str) -> Any:
    """The module that edits TOML. Raises Unsupported where it is not installed."""
    try:
        import tomlkit  # noqa: PLC0415 -- start-up time, and a machine may be without it
    except ImportError as error:
        raise Unsupported(
            f"saving to {path}: the file exists, and changing it without losing its comments needs tomlkit; install "
            "the package python3-tomlkit, or move the file away"
        ) from error
    return tomlkit


def edit(text: str, path: str, config: Config) -> str:
    """``text``, a usable configuration, changed so that it means ``config``. Raises GuardError."""
    require_tomlkit(path)
    # tomlkit before 0.11 breaks lists when an item is added or removed: then the whole list is written anew.
    for in_place in (True, False):
        edited = _try(text, config, in_place)
        if edited is not None:
            return edited
    raise GuardError(f"saving to {path}: the file can't be changed without losing its comments; move the file away")


def _try(text: str, config: Config, in_place: bool) -> str | None:
    """The changed text; None when it does not mean ``config``."""
    import tomlkit  # noqa: PLC0415
    from tomlkit.exceptions import TOMLKitError  # noqa: PLC0415

    try:
        document = tomlkit.parse(text)
        edited = _Edit(document, text, config, in_place).run()
        return edited if _same(parse_config(edited, use_stored_ids=True), config) else None
    except (TOMLKitError, BadPolicy):
        return None


def _same(one: Config, other: Config) -> bool:
    """True for the same configuration. The account of the filters is the machine's, not the file's."""
    return one == other._replace(policy=other.policy._replace(filter_uid=one.policy.filter_uid))


class _Edit:
    """One change of a file. ``in_place``: change lists item by item."""

    def __init__(self, document: Any, text: str, config: Config, in_place: bool) -> None:
        self.document = document
        self.config = config
        self.in_place = in_place
        self.tables = locks_by_table(text)
        self.unwritten: dict[str, Lock] = {lock.name: lock for lock in config.policy.locks}
        self.new_filters: list[Filter] = []
        self.insertions: list[Insertion] = []

    def run(self) -> str:
        self.edit_top()
        for name, locks in self.tables.items():
            self.edit_lock(name, locks)
        self.edit_filters()
        text = _insert(self.document.as_string(), self.insertions)
        new = [line for lock in self.unwritten.values() for line in dump_lock(lock)]
        new += [line for one in self.new_filters for line in dump_filter(one)]
        return text.rstrip("\r\n") + "\n" + "".join(line + "\n" for line in new) if new else text

    def edit_filters(self) -> None:
        """Filters change only in their locks, when a lock is split; all else in their tables stays as written."""
        tables = self.document.get("filter", {})
        wanted = {one.name: one for one in self.config.policy.filters}
        for name in list(tables):
            if name not in wanted:
                del tables[name]
            elif tuple(sorted(set(tables[name]["locks"]))) != wanted[name].locks:
                tables[name]["locks"] = _parse_value("\n".join(dump_filter_locks(wanted[name])), "locks")
        self.new_filters = [one for one in wanted.values() if one.name not in tables]

    def edit_top(self) -> None:
        for key, value, default in top_values(self.config):
            if key in self.document:
                if value is None and self.document[key] != []:
                    del self.document[key]
                elif value is not None and self.document[key] != value:
                    self.document[key] = value
            elif value is not None and value != default:
                self.insertions.append(((), [f"{key} = {format_value(value)}"]))

    def edit_lock(self, name: str, locks: tuple[Lock, ...]) -> None:
        """Change the table ``name``, which means ``locks``, to the wanted lock of that name, or remove the table.

        A table that already means wanted locks stays as it is.
        """
        if self.mark_written(locks):
            return
        wanted = self.unwritten.get(name)
        if wanted is None:
            del self.document["lock"][name]
            return
        before = next(lock for lock in locks if lock.name == name)
        # Endpoints and presets can stay as written if, with the new lists, every lock that they mean is wanted.
        endpoints = tuple(endpoint for lock in locks for endpoint in lock.endpoints)
        if not self.mark_written(make_policy(split_off_wireserver(wanted._replace(endpoints=endpoints))).locks):
            del self.unwritten[name]
            table = self.document["lock"][name]
            if "preset" in table:
                del table["preset"]  # pop() of tomlkit before 0.8 leaves the text in the file
            self.set_key(name, table, "endpoints", dump_endpoints(wanted))
        self.edit_lists(name, self.document["lock"][name], wanted, before)

    def mark_written(self, locks: tuple[Lock, ...]) -> bool:
        """Remove ``locks`` from the unwritten ones. False, and no change, unless all of them are unwritten."""
        if any(self.unwritten.get(lock.name) != lock for lock in locks):
            return False
        for lock in locks:
            del self.unwritten[lock.name]
        return True

    def edit_lists(self, name: str, table: Any, lock: Lock, before: Lock) -> None:
        for new, old in zip(id_lists(lock), id_lists(before)):
            if new.ids == old.ids:
                continue
            if self.in_place and new.key in table and new.ids:
                _edit_list(table[new.key], new, old)
            else:
                self.set_key(name, table, new.key, dump_list(new.key, [new.format(one) for one in sorted(new.ids)]))
        self.edit_default(name, table, lock)

    def edit_default(self, name: str, table: Any, lock: Lock) -> None:
        nobody = lock.allows_nobody
        if bool(table.get("nobody", False)) != nobody:
            self.set_key(name, table, "nobody", ["nobody = true"] if nobody else [])
        absent = Verdict.ALLOW if lock.deny and not lock.allow and not nobody else Verdict.DENY
        if table.get("default", absent.value) != lock.default.value:
            self.set_key(name, table, "default", [f"default = {quoted(lock.default.value)}"])

    def set_key(self, name: str, table: Any, key: str, lines: list[str]) -> None:
        """Set a key of a lock's table to the value in ``lines``. Without lines, remove it."""
        if key not in table:
            self.insertions.append((("lock", name), lines))
        elif lines:
            table[key] = _parse_value("\n".join(lines), key)
        else:
            del table[key]


def _edit_list(array: Any, new: IdList, old: IdList) -> None:
    """Remove and add entries; the others stay as written."""
    for index in range(len(array) - 1, -1, -1):
        if _id_of_entry(array[index], new) not in new.ids:
            del array[index]
    for number in sorted(new.ids - old.ids):
        array.append(_parse_value(f"x = {new.format(number)}", "x"))


def _id_of_entry(entry: Any, listed: IdList) -> int:
    if isinstance(entry, dict):
        return int(entry["id"])
    return listed.id_of(int(entry) if isinstance(entry, int) else str(entry))


def _parse_value(text: str, key: str) -> Any:
    import tomlkit  # noqa: PLC0415

    return tomlkit.parse(text + "\n")[key]


def _insert(text: str, insertions: list[Insertion]) -> str:
    """``text`` with the new lines. Those of the top follow the last key there."""
    for path, new in insertions:
        lines = text.splitlines(keepends=True)
        key_lines = KeyLines(text)
        at = key_lines.find(path) if path else key_lines.last_at_top()
        lines[at or 0 : at or 0] = [line + "\n" for line in new]
        text = "".join(lines)
    return text
