# SPDX-License-Identifier: Apache-2.0
"""The table in docs/clients.md is that of the recorded results, which have each client on both backends."""

from __future__ import annotations

import json

from tests.clients import results

RECORDED = json.loads(results.RESULTS.read_text(encoding="utf-8"))


def test_the_table_is_the_recorded_one() -> None:
    assert results.table_of_page() == results.table(RECORDED)


def test_both_backends_gave_the_same() -> None:
    """Apart from the words and the seconds."""
    seen: dict[str, set[tuple[object, ...]]] = {}
    for row in RECORDED["rows"]:
        what = tuple(row[name] for name in ("client", "flavour", "account", "asked", "got"))
        seen.setdefault(row["backend"], set()).add(what)
    assert seen["ebpf"] == seen["iptables"]


def test_a_message_is_one_line_without_what_differs_each_time() -> None:
    assert results._short("a\n <b object at 0x7fd1600aee10>  c") == "a <b object at 0x...> c"
    assert len(results._short("x" * 500)) <= 150
