# SPDX-License-Identifier: Apache-2.0
"""Changes the files of a configuration that a person wrote: comments, order and spelling stay.

tomlkit changes and removes existing keys. New keys are inserted as text, because tomlkit puts them after the comment of
the next table. The result is read again, and used only if it is the configuration that was wanted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from imds_guard.config.names import PresentNames
from imds_guard.config.read import Config, config_of, locks_by_table
from imds_guard.config.source import Source, parse_source
from imds_guard.config.spelling import NO_PRESETS, Presets, known_presets, spelling
from imds_guard.config.toml_lines import KeyLines, Path
from imds_guard.config.write import (
    IdList,
    dump_endpoints,
    dump_filter,
    dump_filter_locks,
    dump_list,
    dump_locks,
    dump_preset,
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


def edit(source: Source, config: Config, presets: Presets = NO_PRESETS) -> dict[str, str]:
    """The texts of a usable configuration, by file, changed so that it means ``config``. Raises GuardError."""
    require_tomlkit(source.name)
    # tomlkit before 0.11 breaks lists when an item is added or removed: then the whole list is written anew.
    for in_place in (True, False):
        edited = _try(source, _Wanted(config, presets), in_place)
        if edited is not None:
            return edited
    raise GuardError(
        f"saving to {source.name}: the file can't be changed without losing its comments; move the file away"
    )


def _try(source: Source, wanted: _Wanted, in_place: bool) -> dict[str, str] | None:
    """The changed texts; None when they do not mean ``config``."""
    from tomlkit.exceptions import TOMLKitError  # noqa: PLC0415

    try:
        edited = _edited(source, wanted, in_place)
        again = [parse_source(edited[part.name], part.name) for part in source.parts]
        read = config_of(again[0]._replace(drop_ins=tuple(again[1:])), PresentNames(use_stored_ids=True))
        return edited if _same(read, wanted.config) else None
    except (TOMLKitError, BadPolicy):
        return None


def _edited(source: Source, wanted: _Wanted, in_place: bool) -> dict[str, str]:
    """Drop-ins come first: what is in none of them is new, and written to the file itself."""
    import tomlkit  # noqa: PLC0415

    unwritten = _Unwritten(
        {lock.name: lock for lock in wanted.config.policy.locks},
        {one.name: one for one in wanted.config.policy.filters},
    )
    texts: dict[str, str] = {}
    for part in reversed(source.parts):
        one = _Edit(tomlkit.parse(part.text), part.text, wanted, unwritten, in_place)
        texts[part.name] = one.run() if part is source else one.run_drop_in()
    return texts


class _Wanted(NamedTuple):
    """What the files should mean, and the presets by which new endpoints are written."""

    config: Config
    presets: Presets


class _Unwritten(NamedTuple):
    """What no file has yet, by name."""

    locks: dict[str, Lock]
    filters: dict[str, Filter]


def _same(one: Config, other: Config) -> bool:
    """True for the same configuration. The account of the filters is the machine's, not the file's."""
    return one == other._replace(policy=other.policy._replace(filter_uid=one.policy.filter_uid))


class _Edit:
    """The change of one file. ``in_place``: change lists item by item."""

    def __init__(self, document: Any, text: str, wanted: _Wanted, unwritten: _Unwritten, in_place: bool) -> None:
        self.document = document
        self.config = wanted.config
        self.presets = wanted.presets
        self.in_place = in_place
        self.tables = locks_by_table(text)
        self.unwritten = unwritten.locks
        self.filters = unwritten.filters
        self.insertions: list[Insertion] = []

    def run(self) -> str:
        """The text of the file itself, with all that is in no file yet."""
        self.edit_top()
        text = self.run_drop_in()
        new = dump_locks(self.unwritten, self.presets)
        new += [line for one in self.filters.values() for line in dump_filter(one)]
        return text.rstrip("\r\n") + "\n" + "".join(line + "\n" for line in new) if new else text

    def run_drop_in(self) -> str:
        """The text with its own locks and filters alone."""
        for name, locks in self.tables.items():
            self.edit_lock(name, locks)
        self.edit_filters()
        return _insert(self.document.as_string(), self.insertions)

    def edit_filters(self) -> None:
        """Filters change only in their locks, when a lock is split; all else in their tables stays as written."""
        tables = self.document.get("filter", {})
        for name in list(tables):
            wanted = self.filters.pop(name, None)
            if wanted is None:
                del tables[name]
            elif tuple(sorted(set(tables[name]["locks"]))) != wanted.locks:
                tables[name]["locks"] = _parse_value("\n".join(dump_filter_locks(wanted)), "locks")

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
            self.edit_endpoints(name, wanted)
        self.edit_lists(name, self.document["lock"][name], wanted, before)

    def edit_endpoints(self, name: str, wanted: Lock) -> None:
        table = self.document["lock"][name]
        written = spelling(wanted, self.unwritten, {**_presets_of(table), **self.presets})
        for one in written.locks:
            del self.unwritten[one]
        if "preset" in table and not written.presets:
            del table["preset"]  # pop() of tomlkit before 0.8 leaves the text in the file
        if written.presets:
            self.set_key(name, table, "preset", dump_preset(written))
        if written.endpoints or "endpoints" in table:
            self.set_key(name, table, "endpoints", dump_endpoints(written))

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


def _presets_of(table: Any) -> Presets:
    """Those that the table has, by all their names: they stay when endpoints join them."""
    names = table.get("preset", [])
    listed = [names] if isinstance(names, str) else list(names)
    return known_presets([str(name) for name in listed])


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
