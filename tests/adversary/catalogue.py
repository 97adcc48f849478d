# SPDX-License-Identifier: Apache-2.0
"""The catalogue of attacks, and the table of it in docs/security.md.

``python3 -m tests.adversary.catalogue --write`` writes the table. test_catalogue.py checks that it is up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.adversary import (
    attacks_address,
    attacks_before,
    attacks_connect,
    attacks_filter,
    attacks_handover,
    attacks_identity,
    attacks_packets,
    attacks_place,
    attacks_service,
)
from tests.adversary.model import Attack

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "security.md"
BEGIN, END = "<!-- catalogue -->", "<!-- /catalogue -->"

CHAPTERS: tuple[tuple[str, tuple[Attack, ...]], ...] = (
    ("The address", attacks_address.ATTACKS),
    ("The connect", attacks_connect.ATTACKS),
    ("The identity", attacks_identity.ATTACKS),
    ("The place", attacks_place.ATTACKS),
    ("Older sockets", attacks_before.ATTACKS),
    ("Other people's sockets", attacks_handover.ATTACKS),
    ("Packets", attacks_packets.ATTACKS),
    ("Filters", attacks_filter.ATTACKS),
    ("The guard itself", attacks_service.ATTACKS),
)
CATALOGUE: tuple[Attack, ...] = tuple(attack for _, attacks in CHAPTERS for attack in attacks)


def table() -> str:
    """The tables in Markdown, one per chapter."""
    return "\n".join(line for title, attacks in CHAPTERS for line in _chapter(title, attacks))


def _chapter(title: str, attacks: tuple[Attack, ...]) -> tuple[str, ...]:
    head = ("", f"### {title}", "", "| id | attack | what happens | why | test |", "| --- | --- | --- | --- | --- |")
    return (*head, *(_row(attack) for attack in attacks))


def _row(attack: Attack) -> str:
    test = f"`{attack.test}`"
    if attack.ways:
        test = f"`{Path(attack.test).name}`, {len(attack.ways)} way{'s' * (len(attack.ways) > 1)}"
    return f"| `{attack.id}` | {attack.title} | **{attack.verdict.value}** | {attack.why} | {test} |"


def replaced(text: str) -> str:
    """The document with the current table."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python3 -m tests.adversary.catalogue --write")
    DOCUMENT.write_text(replaced(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
