# SPDX-License-Identifier: Apache-2.0
"""Our rules in one table, read from one iptables program and parsed."""

from __future__ import annotations

from typing import NamedTuple

from imds_guard.backends.iptables.parse import FamilyPolicy, parse_chains, parse_family
from imds_guard.backends.iptables.programs import Program
from imds_guard.backends.iptables.render import Chains
from imds_guard.backends.iptables.tables import Anchor, Table, is_reached, owned, read_table


class OurRules(NamedTuple):
    """A table of one program, the rules in our chains, and the lines in them that can't be ours."""

    program: Program
    anchor: Anchor
    table: Table
    chains: Chains
    foreign: tuple[str, ...]

    @property
    def title(self) -> str:
        """The program and the chain that leads to ours."""
        return f"{self.program.title}, {self.anchor.table} {self.anchor.builtin}"

    @property
    def present(self) -> bool:
        """True when there is a chain of ours or a jump to one."""
        return bool(self.chains) or is_reached(self.table, self.anchor)

    @property
    def policy(self) -> FamilyPolicy | None:
        """The policy of our chains, if a packet can reach them."""
        return parse_family(self.chains, self.program.version) if is_reached(self.table, self.anchor) else None


def read_rules(program: Program, anchor: Anchor) -> OurRules:
    """Reads the anchor's table. Raises NoTable where the kernel has none of that kind."""
    table = read_table(program, anchor.table)
    chains, foreign = parse_chains(owned(table, anchor))
    return OurRules(program, anchor, table, chains, tuple(foreign))
