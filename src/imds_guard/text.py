# SPDX-License-Identifier: Apache-2.0
"""Text for people: escapes for what somebody else chose, and phrases that several commands print."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv6Address

JSON_SCHEMA = 1
"""The number in every JSON output. It grows when a key is removed, is renamed or means something else."""

_PLAIN = re.compile(r"[A-Za-z0-9_./:@%+,\[\]~^*?!-]+", re.ASCII)
_UNSAFE = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
"""Unicode categories: control, format (with the bidirectional ones), surrogate, private, unassigned, line ends."""


def escaped(text: str) -> str:
    """Control and bidirectional characters are replaced by escapes: ``\\x1b``, ``\\u202e``."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(one) if unicodedata.category(one) in _UNSAFE else one for one in text)


def columns(text: str) -> int:
    """The columns of a text on a terminal: characters of East Asia take two, and marks that join others none.

    Source: https://www.unicode.org/reports/tr11/, "Wide" and "Fullwidth".
    """
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(one) else 1 + (unicodedata.east_asian_width(one) in "WF") for one in text)


def _escape(character: str) -> str:
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def key_value(text: str) -> str:
    """The right side of ``key=value``: bare where the text is plain, else escaped and in double quotes."""
    if _PLAIN.fullmatch(text):
        return text
    return '"' + escaped(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def host_port(address: IPv4Address | IPv6Address, port: int) -> str:
    """``192.0.2.1:80``, ``[2001:db8::1]:80``."""
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def count_of(number: int, noun: str) -> str:
    """``1 connection``, ``2 connections``; for nouns whose plural ends with s."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def some_of(items: Sequence[str], maximum: int, separator: str = ", ") -> str:
    """The first ``maximum`` items, then how many more there are: ``a, b, and 3 more``."""
    shown = separator.join(items[:maximum])
    return shown + and_more(len(items), maximum, separator)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean NAME?`` with a name in ``known`` that begins with ``word`` or is like it, if there is one."""
    import difflib  # noqa: PLC0415 -- start-up time: only errors need it

    names, asked = {name.lower(): name for name in known}, word.lower()
    longer = sorted(name for name in names if len(asked) > 2 and name.startswith(asked))
    nearest = longer or difflib.get_close_matches(asked, names, n=1, cutoff=0.7)
    return f"; did you mean {escaped(names[nearest[0]])}?" if nearest else ""


def and_more(number: int, maximum: int, separator: str = ", ") -> str:
    """``, and 3 more`` where ``number`` is above ``maximum``; else nothing."""
    return f"{separator}and {number - maximum} more" if number > maximum else ""
