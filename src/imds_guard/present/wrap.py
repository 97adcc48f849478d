# SPDX-License-Identifier: Apache-2.0
"""The layout that all answers share: the width of a line, and how many items of a list are shown."""

from __future__ import annotations

import textwrap

WIDTH = 78
"""Columns of a line. A terminal has 80."""

MAX_SHOWN = 12
"""Items of a longer list that the text shows. JSON has all of them."""


def wrapped(title: str, text: str, indent: str = "") -> list[str]:
    """``text`` after ``title``, in lines of at most WIDTH. A longer path or endpoint is not broken: people copy it."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=title,
        subsequent_indent=indent or " " * len(title),
        break_on_hyphens=False,
        break_long_words=False,
    )


def named(number: int, name: str) -> str:
    """``root (0)``; the number alone where there is no name."""
    return f"{name} ({number})" if name != str(number) else name
