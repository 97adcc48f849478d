# SPDX-License-Identifier: Apache-2.0
"""In which tables the rules are: what works on this machine decides, and the state file tells it afterwards."""

from __future__ import annotations

import enum
from typing import NamedTuple

from imds_guard.backends.iptables.render import HEAD, Part
from imds_guard.backends.iptables.tables import Anchor

FILTER, MANGLE = Anchor("OUTPUT", HEAD), Anchor("OUTPUT", HEAD, "mangle")
NAT = Anchor("OUTPUT", HEAD, "nat")
ANCHORS = (MANGLE, NAT, FILTER)
"""In the order in which packets meet them. Where mangle and filter both hold a policy, mangle is the one that sees the
address that the caller has asked for. NAT has rules where the policy has filters."""


class Form(enum.Enum):
    """Where denied packets are marked and rejected, the best one first. The values are words of the state file."""

    NFT = "nft"
    """Marked in mangle, rejected by a chain of nft in front of NAT, and once more in filter."""
    MANGLE = "mangle"
    """Marked in mangle, rejected in filter: a rule that somebody puts before ours there lets packets pass."""
    FILTER = "filter"
    """Judged and rejected in filter alone: NAT in OUTPUT comes before it."""

    @property
    def parts(self) -> dict[Anchor, Part]:
        """What each table holds."""
        if self is Form.FILTER:
            return {FILTER: Part.ALONE}
        return {MANGLE: Part.MANGLE, NAT: Part.NAT, FILTER: Part.FILTER}


class Applied(NamedTuple):
    """What the state file says: the form of the rules, and the fingerprint of the nft table, "" where it is unknown."""

    form: Form
    fingerprint: str = ""

    def text(self) -> str:
        """For the state file."""
        return f"{_APPLIED} {self.form.value} {self.fingerprint}".rstrip()


_APPLIED = "applied"


def parse_applied(text: str) -> Applied | None:
    """None where nothing should be in force. A version before the forms wrote "applied" alone, for rules in filter."""
    words = text.split()
    if words[:1] != [_APPLIED]:
        return None
    try:
        return Applied(Form(words[1]), *words[2:3]) if len(words) > 1 else Applied(Form.FILTER)
    except ValueError:  # of a later version
        return Applied(Form.NFT)
