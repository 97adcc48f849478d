# SPDX-License-Identifier: Apache-2.0
"""Text that somebody else chose, on a terminal and in a line of key=value; phrases that commands share."""

from __future__ import annotations

import ipaddress
import shlex
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imds_guard import text as imds_text

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
def test_characters_that_move_the_cursor_reorder_or_end_a_line_are_escaped(text: str, shown: str) -> None:
    assert imds_text.escaped(text) == shown


@given(TEXTS)
def test_no_unsafe_character_is_left(text: str) -> None:
    shown = imds_text.escaped(text)
    assert all(unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in shown)


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
    assert imds_text.key_value(text) == shown


@given(TEXTS)
def test_a_value_is_one_argument(text: str) -> None:
    """A shell reads it as one argument: no character in it ends the quotes."""
    assert len(shlex.split(f"a={imds_text.key_value(text)}")) == 1


@pytest.mark.parametrize(
    ("address", "shown"), [("192.0.2.1", "192.0.2.1:80"), ("2001:db8::1", "[2001:db8::1]:80")], ids=str
)
def test_only_ipv6_addresses_take_brackets(address: str, shown: str) -> None:
    assert imds_text.host_port(ipaddress.ip_address(address), 80) == shown


def test_one_is_singular() -> None:
    assert [imds_text.count_of(number, "hook") for number in (0, 1, 2)] == ["0 hooks", "1 hook", "2 hooks"]


@pytest.mark.parametrize(
    ("count", "shown"), [(0, ""), (1, "a"), (2, "a, a"), (3, "a, a, and 1 more"), (5, "a, a, and 3 more")]
)
def test_a_long_list_ends_with_the_number_of_what_is_left_out(count: int, shown: str) -> None:
    assert imds_text.some_of(["a"] * count, 2) == shown
