# SPDX-License-Identifier: Apache-2.0
"""Parses TOML, and finds the line of each key, which the parsers do not report."""

from __future__ import annotations

import re
import sys
from typing import Any

from imds_guard.errors import BadPolicy, Unsupported

Path = tuple[str, ...]

_KEY = re.compile(r"""\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")
_HEADER = re.compile(r"\s*(\[.*\])\s*(?:#.*)?")
_POSITION = re.compile(r"(.*) \(at line ([0-9]+), column ([0-9]+)\)", re.DOTALL)


def load_toml(text: str, name: str) -> dict[str, Any]:
    """The values of ``text``. Raises BadPolicy with ``name`` and line; Unsupported where there is no TOML parser."""
    try:
        return _parse(text)
    except ImportError as error:
        raise Unsupported(
            f"{name} can't be read: Python {sys.version_info[0]}.{sys.version_info[1]} has no TOML parser of its own; "
            "install the package python3-tomli"
        ) from error
    except ValueError as error:
        raise BadPolicy(_syntax_error(name, str(error))) from None
    except RecursionError:
        raise BadPolicy(f"{name}: this is nested too deeply for the TOML parser of Python") from None


def _parse(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib  # noqa: PLC0415 -- start-up time: most commands read no TOML
    else:
        import tomli as tomllib  # noqa: PLC0415
    return tomllib.loads(text)


def _syntax_error(name: str, message: str) -> str:
    match = _POSITION.fullmatch(message)
    if match is None:
        return f"{name}: this is not TOML: {message}"
    return f"{name}:{match[2]}: this is not TOML: {match[1]} (column {match[3]})"


class KeyLines:
    """The lines of the tables and keys of a TOML text. A key in an inline table has the line of that table."""

    def __init__(self, text: str) -> None:
        self._text = text.splitlines()
        self._lines: dict[Path, int] = {}
        table: Path = ()
        for number, line in enumerate(self._text, 1):
            header = _HEADER.fullmatch(line)
            if header is not None:
                table = _header_path(header[1]) or table
                self._lines.setdefault(table, number)
                continue
            key = _KEY.match(line)
            if key is not None:
                self._add(table, _header_path(f"[{key[1]}]"), number)

    def _add(self, table: Path, key: Path, number: int) -> None:
        for length in range(1, len(key) + 1):
            self._lines.setdefault(table + key[:length], number)

    def find(self, path: Path, text: str = "") -> int | None:
        """The line of ``path``, or of its nearest known parent; with ``text``, the line of that text in its value."""
        while path and path not in self._lines:
            path = path[:-1]
        start = self._lines.get(path)
        if start is None or not text:
            return start
        later = [line for line in self._lines.values() if line > start]
        for number in range(start, min(later, default=len(self._text) + 1)):
            if re.search(rf"(?<![\w.:/-]){re.escape(text)}(?![\w.:/-])", self._text[number - 1]):
                return number
        return start

    def last_at_top(self) -> int:
        """The line of the last key outside all tables; 0 when there is none."""
        first_table = min(
            (line for path, line in self._lines.items() if path[:1] in (("lock",), ("filter",))),
            default=len(self._text),
        )
        return max((line for path, line in self._lines.items() if len(path) == 1 and line < first_table), default=0)


def _header_path(header: str) -> Path:
    """``[lock."a b"]`` as ("lock", "a b"); empty when the line only looks like a header."""
    try:
        value: Any = _parse(header)
    except (ValueError, RecursionError):
        return ()
    found: list[str] = []
    while isinstance(value, (dict, list)) and value:
        if isinstance(value, list):
            value = value[0]
            continue
        name, value = next(iter(value.items()))
        found.append(name)
    return tuple(found)
