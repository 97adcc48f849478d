# SPDX-License-Identifier: Apache-2.0
"""Text of strangers on a terminal and in a line."""

from __future__ import annotations

import shlex
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imds_guard import text as words

TEXTS = st.text(st.characters(exclude_categories=()))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("curl", "curl"),
        ("größe", "größe"),
        ("a\nb", "a\\x0ab"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\x7f", "\\x7f"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("\u2028", "\\u2028"),
        ("\udcff", "\\udcff"),
        ("\U000e0001", "\\U000e0001"),
    ],
)
def test_letters_that_move_reorder_or_end_are_numbers(text: str, shown: str) -> None:
    assert words.visible(text) == shown


@given(TEXTS)
def test_no_such_letter_is_left(text: str) -> None:
    shown = words.visible(text)
    assert all(unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for letter in shown)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("curl", "curl"),
        ("[fd00:ec2::254]:80/tcp", "[fd00:ec2::254]:80/tcp"),
        ("two words", '"two words"'),
        ("", '""'),
        ('a"b', '"a\\"b"'),
        ("a\\b", '"a\\\\b"'),
        ("x=1", '"x=1"'),
        ("a verdict=allowed", '"a verdict=allowed"'),
    ],
)
def test_a_value_can_not_pass_for_another_pair(text: str, shown: str) -> None:
    assert words.value(text) == shown


@given(TEXTS)
def test_a_value_is_one_word(text: str) -> None:
    """As a shell would read it: no letter in it ends the quotes."""
    assert len(shlex.split(f"a={words.value(text)}")) == 1
