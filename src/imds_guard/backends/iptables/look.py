# SPDX-License-Identifier: Apache-2.0
"""What one iptables program shows of us, taken apart."""

from __future__ import annotations

from typing import NamedTuple

from imds_guard.backends.iptables.parse import Found, find, parse_chains
from imds_guard.backends.iptables.render import HEAD, Chains
from imds_guard.backends.iptables.tables import Anchor, Program, Table, is_reached, owned, read_table

ANCHOR = Anchor("OUTPUT", HEAD)


class FamilyRules(NamedTuple):
    """Table filter of one program; the rules in our chains; and the lines in them that can't be ours."""

    program: Program
    table: Table
    chains: Chains
    foreign: tuple[str, ...]

    @property
    def present(self) -> bool:
        """True when there is a chain of ours or a jump to one."""
        return bool(self.chains) or is_reached(self.table, ANCHOR)

    @property
    def found(self) -> Found | None:
        """What our chains say, if a packet can reach them."""
        return find(self.chains, self.program.version) if is_reached(self.table, ANCHOR) else None


def look(program: Program) -> FamilyRules:
    """Reads table filter."""
    table = read_table(program)
    chains, foreign = parse_chains(owned(table, ANCHOR))
    return FamilyRules(program, table, chains, tuple(foreign))
