# SPDX-License-Identifier: Apache-2.0
"""A configuration file that somebody wrote, changed to say something else: comments, order and words stay.

tomlkit changes and removes what is there. What is new goes in as text, since tomlkit puts it behind the comment of
the next table. Whatever comes of that is read again before it is taken.
"""

from __future__ import annotations

from typing import Any

from imds_guard.config.read import Config, locks_by_table, parse_config
from imds_guard.config.toml_lines import KeyLines, Path
from imds_guard.config.write import (
    dump_endpoints,
    dump_id,
    dump_list,
    dump_lock,
    id_lists,
    quoted,
    scalar,
    top_values,
)
from imds_guard.errors import BadPolicy, GuardError, Unsupported
from imds_guard.policy.model import Lock, Verdict, make_policy
from imds_guard.policy.wireserver import split_off_wireserver

Added = list[tuple[Path, list[str]]]
"""Lines that belong behind the header of a table; at the top of the file for the empty path."""


def require_tomlkit(path: str) -> Any:
    """The module that edits TOML. Raises Unsupported where it is not installed."""
    try:
        import tomlkit  # noqa: PLC0415 -- start-up time, and a machine may be without it
    except ImportError as error:
        raise Unsupported(
            f"saving to {path}: the file is there, and changing it without losing its comments takes tomlkit; install "
            "the package python3-tomlkit, or move the file away"
        ) from error
    return tomlkit


def edit(text: str, path: str, config: Config) -> str:
    """``text``, which is a usable configuration, changed to say ``config``. Raises GuardError."""
    require_tomlkit(path)
    # tomlkit before 0.11 spoils a list that it takes a line out of or appends to: then the list is written anew.
    for in_place in (True, False):
        edited = _try(text, config, in_place)
        if edited is not None:
            return edited
    raise GuardError(f"saving to {path}: what stands there can't be changed with its comments kept; move the file away")


def _try(text: str, config: Config, in_place: bool) -> str | None:
    """None when what came out does not say ``config``."""
    import tomlkit  # noqa: PLC0415
    from tomlkit.exceptions import TOMLKitError  # noqa: PLC0415

    try:
        document = tomlkit.parse(text)
        edited = _Edit(document, text, config, in_place).run()
        return edited if parse_config(edited, use_stored_ids=True) == config else None
    except (TOMLKitError, BadPolicy):
        return None


class _Edit:
    """One file being changed."""

    def __init__(self, document: Any, text: str, config: Config, in_place: bool) -> None:
        self.document = document
        self.config = config
        self.in_place = in_place
        self.tables = locks_by_table(text, use_stored_ids=True)
        self.wanted: dict[str, Lock] = {lock.name: lock for lock in config.policy.locks}
        self.added: Added = []

    def run(self) -> str:
        self.edit_top()
        for name, locks in self.tables.items():
            self.edit_lock(name, locks)
        text = _insert(self.document.as_string(), self.added)
        new = [line for lock in self.wanted.values() for line in dump_lock(lock)]
        return text.rstrip("\r\n") + "\n" + "".join(line + "\n" for line in new) if new else text

    def edit_top(self) -> None:
        for key, value, usual in top_values(self.config):
            if key in self.document:
                if value is None:
                    del self.document[key]
                elif self.document[key] != value:
                    self.document[key] = value
            elif value is not None and value != usual:
                self.added.append(((), [f"{key} = {scalar(value)}"]))

    def edit_lock(self, name: str, locks: tuple[Lock, ...]) -> None:
        """Leaves a table alone that says what is wanted; else it comes to say the lock of its own name."""
        if self.take(locks):
            return
        wanted = self.wanted.get(name)
        if wanted is None:
            del self.document["lock"][name]
            return
        before = next(lock for lock in locks if lock.name == name)
        # The words for the endpoints can stay if they, with the new lists, stand for locks that are all wanted.
        endpoints = tuple(endpoint for lock in locks for endpoint in lock.endpoints)
        if not self.take(make_policy(split_off_wireserver(wanted._replace(endpoints=endpoints))).locks):
            del self.wanted[name]
            table = self.document["lock"][name]
            if "preset" in table:
                del table["preset"]  # pop() of tomlkit before 0.8 leaves the words where they are
            self.put(name, table, "endpoints", dump_endpoints(wanted))
        self.edit_lists(name, self.document["lock"][name], wanted, before)

    def take(self, locks: tuple[Lock, ...]) -> bool:
        """True when these locks are all wanted; they need not be written any more."""
        if any(self.wanted.get(lock.name) != lock for lock in locks):
            return False
        for lock in locks:
            del self.wanted[lock.name]
        return True

    def edit_lists(self, name: str, table: Any, lock: Lock, before: Lock) -> None:
        for (key, ids, name_of, id_of), (_, old, _, _) in zip(id_lists(lock), id_lists(before)):
            if ids == old:
                continue
            if self.in_place and key in table and ids:
                self.edit_list(table[key], ids, old, key, lock)
            else:
                self.put(name, table, key, dump_list(key, [dump_id(one, name_of(one), id_of) for one in sorted(ids)]))
        self.edit_default(name, table, lock)

    def edit_list(self, array: Any, ids: Any, old: Any, key: str, lock: Lock) -> None:
        """Takes out who is gone, adds who is new; the others stay as they are written."""
        name_of, id_of = next((name_of, id_of) for one, _, name_of, id_of in id_lists(lock) if one == key)
        for place in range(len(array) - 1, -1, -1):
            if _id_of_entry(array[place], id_of) not in ids:
                del array[place]
        for number in sorted(ids - old):
            array.append(_value(dump_id(number, name_of(number), id_of)))

    def edit_default(self, name: str, table: Any, lock: Lock) -> None:
        nobody = lock.allows_nobody
        if bool(table.get("nobody", False)) != nobody:
            self.put(name, table, "nobody", ["nobody = true"] if nobody else [])
        usual = Verdict.ALLOW if lock.deny and not lock.allow and not nobody else Verdict.DENY
        if table.get("default", usual.value) != lock.default.value:
            self.put(name, table, "default", [f"default = {quoted(lock.default.value)}"])

    def put(self, name: str, table: Any, key: str, lines: list[str]) -> None:
        """Gives a key of a table another value; without lines it is taken out."""
        if key not in table:
            self.added.append((("lock", name), lines))
        elif lines:
            table[key] = _parsed("\n".join(lines), key)
        else:
            del table[key]


def _id_of_entry(entry: Any, id_of: Any) -> int:
    if isinstance(entry, dict):
        return int(entry["id"])
    return int(id_of(str(entry)))


def _value(text: str) -> Any:
    return _parsed(f"x = {text}", "x")


def _parsed(text: str, key: str) -> Any:
    import tomlkit  # noqa: PLC0415

    return tomlkit.parse(text + "\n")[key]


def _insert(text: str, added: Added) -> str:
    """``text`` with the lines behind their headers; those of the top behind the last key there."""
    for path, new in added:
        lines = text.splitlines(keepends=True)
        places = KeyLines(text)
        at = places.find(path) if path else places.last_at_top()
        lines[at or 0 : at or 0] = [line + "\n" for line in new]
        text = "".join(lines)
    return text
