# SPDX-License-Identifier: Apache-2.0
"""A table of a TOML file whose values are checked one by one; an error names the file and the line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable, NoReturn, TypeVar

from imds_guard.config.toml_lines import KeyLines, Path
from imds_guard.errors import BadPolicy
from imds_guard.text import did_you_mean

T = TypeVar("T")


class Table:
    """The table at ``path`` of the file ``file``. Every method raises BadPolicy for a value of another type."""

    def __init__(self, file: str, lines: KeyLines, path: Path, values: dict[str, Any], kind: str = "lock") -> None:
        self.file = file
        self.lines = lines
        self.path = path
        self.values = values
        self.kind = kind

    @property
    def name(self) -> str:
        """The last part of the path; empty at the top of the file."""
        return self.path[-1] if self.path else ""

    @property
    def place(self) -> str:
        """The file and the line of the table."""
        line = self.lines.find(self.path)
        return f"{self.file}:{line}" if line else self.file

    def place_of(self, key: str, text: str) -> str:
        """The file and the line of ``text`` in the value of ``key``."""
        line = self.lines.find((*self.path, key), text)
        return f"{self.file}:{line}" if line else self.file

    def fail(self, key: str | None, sentence: str, text: str = "") -> NoReturn:
        """Raises BadPolicy with the line of ``text`` in the value of ``key``. None is the table itself."""
        raise BadPolicy(f"{self.place if key is None else self.place_of(key, text)}: {sentence}")

    def check_keys(self, known: Sequence[str]) -> None:
        """No other keys are allowed."""
        for key in self.values:
            if key not in known:
                where = f"in {self.kind} {self.name!r}" if self.path else "at the top"
                more = did_you_mean(key, known) or f"; known are {', '.join(known)}"
                self.fail(key, f"unknown key {key!r} {where}{more}")

    def flag(self, key: str) -> bool:
        """True or false; false where the key is absent."""
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            self.fail(key, f"{key} = {value!r} must be true or false")
        return value

    def choice(self, key: str, choices: Sequence[str], default: str | None = None) -> str:
        """One of ``choices``; ``default``, or else the first choice, where the key is absent."""
        value = self.values.get(key, choices[0] if default is None else default)
        if value not in choices:
            more = did_you_mean(str(value), choices)
            self.fail(key, f"{key} = {value!r} must be {' or '.join(repr(choice) for choice in choices)}{more}")
        return str(value)

    def entries(self, key: str) -> list[Any]:
        """A list of anything; empty where the key is absent."""
        value = self.values.get(key, [])
        if not isinstance(value, list):
            self.fail(key, f"{key} = {value!r} must be a list")
        return value

    def strings(self, key: str, single: bool = False) -> list[str]:
        """A list of strings; with ``single``, a string alone is a list of one."""
        value = self.values.get(key, [])
        listed = [value] if single and isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
            self.fail(key, f"{key} = {value!r} must be a list of strings")
        return listed

    def convert(self, key: str, entry: Any, convert: Callable[[Any], T]) -> T:
        """``convert(entry)``; its BadPolicy gets the line of ``entry``."""
        try:
            return convert(entry)
        except BadPolicy as error:
            self.fail(key, str(error), str(entry))


def named_tables(tops: Sequence[Table], kind: str) -> list[Table]:
    """The tables [lock.NAME] or [filter.NAME] of all files, in their order. Raises BadPolicy for two of one name."""
    found: dict[str, Table] = {}
    for top in tops:
        tables = top.values.get(kind, {})
        if not isinstance(tables, dict):
            top.fail(kind, f"{kind}s are tables with a name: write [{kind}.NAME]")
        for name, values in tables.items():
            table = Table(top.file, top.lines, (kind, name), values, kind)
            if not isinstance(values, dict):
                table.fail(None, f"{kind}.{name} must be a table: write [{kind}.{name}]")
            if name in found:
                table.fail(None, f"{kind} {name!r} is defined in {found[name].place}, too")
            found[name] = table
    return list(found.values())
