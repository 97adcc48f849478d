# SPDX-License-Identifier: Apache-2.0
"""What other people's rules do that ours can't stand before, a sentence each: start, status and explain name it.

A rule before ours in mangle or filter is in faults.py. Here are the chain of nft, chains of others by nft that act
between mangle and it, or before mangle, and NAT where our rules come after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from imds_guard.backends.iptables import marks
from imds_guard.backends.iptables.form import Applied, Form
from imds_guard.backends.iptables.programs import NFT, Program, has_legacy_table
from imds_guard.backends.iptables.tables import read_table
from imds_guard.errors import GuardError
from imds_guard.kernel import nft
from imds_guard.kernel.run import find_program
from imds_guard.policy.model import Mode

_MANGLE = -150
"""The priority of iptables' table mangle: NF_IP_PRI_MANGLE in Linux include/uapi/linux/netfilter_ipv4.h."""
_OF_IPTABLES = ("raw", "mangle", "nat", "filter", "security")
"""Tables of iptables-nft. It shows them itself."""


def faults(applied: Applied, mode: Mode, programs: Sequence[Program]) -> list[str]:
    """Faults of the chain of nft, and rules of others that ours can't hold against."""
    lines: list[str] = []
    try:
        if applied.form is Form.NFT and mode is Mode.ENFORCE:
            lines += filter(None, [marks.fault(applied.fingerprint)])
        if applied.form is not Form.FILTER and find_program(nft.NFT) is not None:
            lines += _of_nft()
    except GuardError as error:
        lines.append(f"what nft does with our marks can't be seen: {error}")
    return [*lines, *(_of_nat(programs) if applied.form is Form.FILTER else ())]


def _of_nft() -> Iterator[str]:
    """Chains that packets meet before they are rejected. The verdict "accept" ends such a chain alone: no fault."""
    for chain in _early_chains(nft.objects("chains")):
        family, table, name, priority = (chain[key] for key in ("family", "table", "name", "prio"))
        done = set(_done(nft.objects("table", family, table)))
        what = f"nft: the chain {name!r} at output, priority {priority}, in somebody's table {family} {table}"
        if priority >= _MANGLE and "mark" in done:
            yield f"{what} may change the mark of what is denied, which NAT then lets past our rules; remove that"
        if priority <= _MANGLE and "destination" in done:
            yield f"{what} may change the address before our rules see it; remove that"


def _early_chains(objects: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for one in objects:
        chain = one.get("chain", {})
        of_iptables = chain.get("family") in ("ip", "ip6") and chain.get("table") in _OF_IPTABLES
        is_ours = (chain.get("family"), chain.get("table")) == marks.TABLE
        if chain.get("hook") == "output" and chain["prio"] <= marks.PRIORITY and not of_iptables and not is_ours:
            yield chain


def _done(objects: Iterable[dict[str, Any]]) -> Iterator[str]:
    """What the rules of a table change: "mark", "destination". A chain can lead to any other chain of its table."""
    for statement in (one for each in objects for one in each.get("rule", {}).get("expr", ())):
        if "dnat" in statement or "redirect" in statement:
            yield "destination"
        changed = statement.get("mangle", {}).get("key", {})
        if changed.get("meta", {}).get("key") == "mark":
            yield "mark"
        if changed.get("payload", {}).get("field") in ("daddr", "dport"):
            yield "destination"


def _of_nat(programs: Iterable[Program]) -> Iterator[str]:
    for program in sorted(set(programs)):
        if program.kind == NFT or has_legacy_table(program.version, "nat"):
            rules = read_table(program, "nat").get("OUTPUT", ())
            if rules:
                yield (
                    f"{program.title}: rules in nat OUTPUT act before ours, first {rules[0]!r}: what they translate to "
                    "another address is not denied"
                )
