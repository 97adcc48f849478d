# SPDX-License-Identifier: Apache-2.0
"""All hooks of OUTPUT, in their order: mangle, our chain of nft, NAT, filter. With rules of others in each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from random import Random

from imds_guard.backends.iptables import marks
from imds_guard.backends.iptables.form import FILTER, MANGLE, Form
from imds_guard.backends.iptables.render import Part, ResolvedPolicy, render
from imds_guard.backends.iptables.tables import Anchor, restore_text, rule_texts
from imds_guard.kernel import nft
from imds_guard.policy.model import Address, Mode, Policy, unmapped
from tests import generate
from tests.rules.compare import DENIAL_PREFIX, OTHERS, OTHERS_PREFIX, Attempt, decision, rejection, same
from tests.rules.edits import Edit, unchanged
from tests.rules.iptables import Filter
from tests.rules.nft import Ruleset
from tests.rules.packets import Outcome, Packet

IN_MANGLE = "others in mangle: "
_NAT_OF_DESTINATION = -100
"""NF_IP_PRI_NAT_DST in Linux include/uapi/linux/netfilter_ipv4.h."""

Nat = Mapping[tuple[Address, int], tuple[Address, int]]
"""Address and port of a packet -> those that NAT puts in their place."""


@dataclass
class Output:
    """The rules of both IP versions."""

    nat: Nat = field(default_factory=dict)
    accept_first: bool = False
    """Somebody's ACCEPT stands in front of filter."""
    chain: Ruleset | None = None
    """Of nft."""
    tables: dict[tuple[int, Anchor], Filter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for version in (4, 6):
            for anchor, prefix in ((MANGLE, IN_MANGLE), (FILTER, OTHERS_PREFIX)):
                table = self.tables[version, anchor] = Filter(version, anchor.table)
                table.restore(f"*{anchor.table}\n-A OUTPUT {OTHERS.replace(OTHERS_PREFIX, prefix)}\nCOMMIT\n")

    def put(self, resolved: ResolvedPolicy, anchor: Anchor, part: Part | None, edit: Edit = unchanged) -> None:
        """One step of a change, for both IP versions."""
        for version in (4, 6):
            table = self.tables[version, anchor]
            chains = {} if part is None else rule_texts(render(resolved, version, part))
            text = restore_text(table.texts(), anchor, chains)
            if text:
                table.restore(edit(text))

    def put_chain(self, edit: Edit = unchanged) -> None:
        """The chain of nft."""
        self.chain = Ruleset(edit(nft.replacement(marks.TABLE, marks.CHAINS)))

    def judge(self, packet: Packet) -> Outcome:
        """What becomes of a packet, with all that was logged."""
        version = packet.destination.version
        logged: list[str] = []
        outcome = self.tables[version, MANGLE].judge("OUTPUT", packet)
        packet = replace(packet, mark=outcome.mark)
        logged += outcome.logged
        if self.chain is not None and self.chain.priorities["output"] < _NAT_OF_DESTINATION:
            outcome = self.chain.judge("output", packet)
            if outcome.verdict != "ACCEPT":
                return outcome._replace(logged=tuple(logged))
        to, port = self.nat.get((packet.destination, packet.port), (packet.destination, packet.port))
        if self.accept_first:
            return Outcome("ACCEPT", "", tuple(logged))
        outcome = self.tables[version, FILTER].judge("OUTPUT", replace(packet, destination=to, port=port))
        return outcome._replace(logged=(*logged, *outcome.logged))


def nat(random: Random, policy: Policy) -> Nat:
    """Some addresses of locks and some others, each with another one in its place, of the same IP version."""
    ends = [generate.destination(random, policy) for _ in range(40)]
    found = [(unmapped(one.address), one.port) for one in ends if int(unmapped(one.address))]
    return {
        (address, port): random.choice([other for other in found if other[0].version == address.version])
        for address, port in found
        if random.random() < 0.5
    }


def expected(rules: Output, resolved: ResolvedPolicy, form: Form, one: Attempt) -> Outcome:
    """What must become of the attempt: the address from before NAT and the new one must both be open to the caller."""
    policy = resolved.policy
    denied_before = one.begins and not decision(policy, one).reason.permits
    to, port = rules.nat.get((one.address, one.destination.port), (one.address, one.destination.port))
    moved = one._replace(destination=one.destination._replace(address=to, port=port))
    denied_behind = one.begins and not decision(policy, moved).reason.permits
    others = (IN_MANGLE,) if rules.accept_first else (IN_MANGLE, OTHERS_PREFIX)
    if policy.mode is Mode.AUDIT:
        denied = denied_behind and not rules.accept_first if form is Form.FILTER else denied_before
        return Outcome("ACCEPT", "", (DENIAL_PREFIX, *others) if denied else others)
    if form is Form.NFT and denied_before:
        return Outcome("REJECT", rejection(one))
    if form is not Form.FILTER and denied_before and not rules.accept_first:
        return Outcome("REJECT", rejection(moved))
    if denied_behind and not rules.accept_first:
        return Outcome("REJECT", rejection(moved), (IN_MANGLE,))
    return Outcome("ACCEPT", "", others if not (form is Form.MANGLE and denied_before) else others[1:])


def complaints(rules: Output, resolved: ResolvedPolicy, form: Form, attempts: Iterable[Attempt]) -> list[str]:
    """The attempts that end otherwise than they must."""
    pairs = ((one, rules.judge(one.packet()), expected(rules, resolved, form, one)) for one in attempts)
    return [
        f"{got} in place of {wanted}: {one} in {form} under {resolved}"
        for one, got, wanted in pairs
        if not same(got, wanted)
    ]


def neither(rules: Output, each: Iterable[tuple[ResolvedPolicy, Form]], attempts: Iterable[Attempt]) -> list[str]:
    """The attempts, in the middle of a change, that get the verdict of none of these policies."""
    under = list(each)
    wrong = []
    for one in attempts:
        verdict = rules.judge(one.packet()).verdict
        if all(verdict != expected(rules, resolved, form, one).verdict for resolved, form in under):
            wrong.append(f"{verdict}: {one} under none of {under}")
    return wrong
