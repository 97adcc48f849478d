# SPDX-License-Identifier: Apache-2.0
"""Our rules in one table, read from one iptables program and parsed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from imds_guard.backends.iptables.form import NAT, Form
from imds_guard.backends.iptables.parse import FamilyPolicy, parse_chains, parse_family
from imds_guard.backends.iptables.programs import Program
from imds_guard.backends.iptables.render import Chains, ResolvedPolicy, render
from imds_guard.backends.iptables.tables import Anchor, Table, is_first, is_reached, owned, read_table
from imds_guard.errors import GuardError


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
        return bool(self.chains) or self.is_reached

    @property
    def policy(self) -> FamilyPolicy | None:
        """The policy of our chains, if a packet can reach them. NAT has none: it denies nothing."""
        if self.anchor is NAT or not self.is_reached:
            return None
        return parse_family(self.chains, self.program.version)

    @property
    def is_reached(self) -> bool:
        """True when packets can reach our chains."""
        return is_reached(self.table, self.anchor)


def read_rules(program: Program, anchor: Anchor) -> OurRules:
    """Reads the anchor's table. Raises NoTable where the kernel has none of that kind."""
    table = read_table(program, anchor.table)
    chains, foreign = parse_chains(owned(table, anchor))
    return OurRules(program, anchor, table, chains, tuple(foreign))


def verify(programs: Sequence[Program], form: Form, wanted: ResolvedPolicy) -> None:
    """Raises GuardError unless the kernel shows the rules that it was given."""
    for anchor, part in form.parts.items():
        for program in programs:
            expected = render(wanted, program.version, part)
            if anchor is NAT and not expected:
                continue  # somebody else may have what can't be read there
            rules = read_rules(program, anchor)
            if rules.foreign or rules.chains != expected or (expected and not is_first(rules.table, anchor)):
                raise GuardError(
                    f"{program.title} took the rules, but iptables-save shows others in table {anchor.table}; "
                    "nothing was changed"
                )
