# SPDX-License-Identifier: Apache-2.0
"""Text that somebody else chose, made safe for a terminal and a line of key=value."""

from __future__ import annotations

import re
import unicodedata

_PLAIN = re.compile(r"[A-Za-z0-9_./:@%+,\[\]~^*?!-]+", re.ASCII)
_UNSAFE = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
"""Unicode's control, format (bidirectional ones among them), surrogate, private and unassigned letters, line ends."""


def visible(text: str) -> str:
    """Every letter that moves a cursor, reorders or ends a line stands there as its number: ``\\x1b``, ``\\u202e``."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_numbered(letter) if unicodedata.category(letter) in _UNSAFE else letter for letter in text)


def _numbered(letter: str) -> str:
    number = ord(letter)
    if number <= 0xFF:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number <= 0xFFFF else f"\\U{number:08x}"


def value(text: str) -> str:
    """The right side of key=value: bare where that is plain, else in double quotes."""
    if _PLAIN.fullmatch(text):
        return text
    return '"' + visible(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'
