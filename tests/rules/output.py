# SPDX-License-Identifier: Apache-2.0
"""All hooks of OUTPUT, in their order: mangle, our chain of nft, NAT, filter. With rules of others in each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import NamedTuple

from imds_guard.backends.iptables import marks
from imds_guard.backends.iptables.form import FILTER, MANGLE, NAT, Form
from imds_guard.backends.iptables.render import Part, ResolvedPolicy, render
from imds_guard.backends.iptables.tables import Anchor, restore_text, rule_texts
from imds_guard.kernel import nft
from imds_guard.policy.decide import Reason
from imds_guard.policy.filter_address import listener_address
from imds_guard.policy.filters import FILTER_NETWORK, FILTER_PORT, Target
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
"""Address and port of a packet -> those that NAT of others puts in their place."""


class Translation(NamedTuple):
    """What conntrack knows of a connection; ``to`` is None where nothing was translated."""

    to: tuple[Address, int] | None


@dataclass
class Output:
    """The rules of both IP versions."""

    nat: Nat = field(default_factory=dict)
    accept_first: bool = False
    """Somebody's ACCEPT stands in front of filter."""
    nat_first: bool = False
    """``nat`` comes before our rules in table nat."""
    inherited: Translation | None = None
    """Of an earlier connection with the same addresses and ports: then table nat is not asked."""
    chain: Ruleset | None = None
    """Of nft."""
    tables: dict[tuple[int, Anchor], Filter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for version in (4, 6):
            self.tables[version, NAT] = Filter(version, NAT.table)
            for anchor, prefix in ((MANGLE, IN_MANGLE), (FILTER, OTHERS_PREFIX)):
                table = self.tables[version, anchor] = Filter(version, anchor.table)
                table.restore(f"*{anchor.table}\n-A OUTPUT {OTHERS.replace(OTHERS_PREFIX, prefix)}\nCOMMIT\n")

    def put(self, resolved: ResolvedPolicy, anchor: Anchor, part: Part | None, edit: Edit = unchanged) -> None:
        """One step of a change, for both IP versions."""
        for version in (4, 6):
            table = self.tables[version, anchor]
            chains = {} if part is None else rule_texts(render(resolved, version, part))
            assert version == 4 or anchor is not NAT or not chains
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
        to, port = self.translated(packet)
        led_to = None if (to, port) == (packet.destination, packet.port) else (to, port)
        if self.accept_first:
            return Outcome("ACCEPT", "", tuple(logged), led_to=led_to)
        outcome = self.tables[version, FILTER].judge("OUTPUT", replace(packet, destination=to, port=port))
        return outcome._replace(logged=(*logged, *outcome.logged), led_to=led_to)

    def translated(self, packet: Packet) -> tuple[Address, int]:
        """The address and port of a packet behind NAT. The first rule that translates decides."""
        before = (packet.destination, packet.port)
        if self.inherited is not None:
            return self.inherited.to or before
        if self.nat_first and before in self.nat:
            return self.nat[before]
        return self.tables[packet.destination.version, NAT].judge("OUTPUT", packet).led_to or self.nat.get(
            before, before
        )


def nat(random: Random, policy: Policy) -> Nat:
    """Some addresses of locks and some others, each with another one in its place, of the same IP version."""
    ends = [generate.destination(random, policy) for _ in range(40)]
    found = [(unmapped(one.address), one.port) for one in ends if int(unmapped(one.address))]
    found = [one for one in found if one[0] not in FILTER_NETWORK]
    translated = {
        (address, port): random.choice([other for other in found if other[0].version == address.version])
        for address, port in found
        if random.random() < 0.5
    }
    return {before: to for before, to in translated.items() if before != to}


def expected(rules: Output, resolved: ResolvedPolicy, form: Form, one: Attempt) -> Outcome:
    """What must become of the attempt: the address from before NAT and the new one must both be open to the caller."""
    policy = resolved.policy
    place = place_of(resolved, one)
    denied_before = one.begins and place is None and not passes(policy, one)
    others_translate = rules.nat_first or place is None
    moved_to = rules.nat.get((one.address, one.destination.port)) if others_translate else None
    to, port = moved_to or (one.address, one.destination.port)
    moved = one._replace(destination=one.destination._replace(address=to, port=port))
    denied_behind = one.begins and (place is not None or not passes(policy, moved))
    others = (IN_MANGLE,) if rules.accept_first else (IN_MANGLE, OTHERS_PREFIX)
    if policy.mode is Mode.AUDIT:
        denied = denied_behind and not rules.accept_first if form is Form.FILTER else denied_before
        return Outcome("ACCEPT", "", (DENIAL_PREFIX, *others) if denied else others, led_to=moved_to)
    if form is Form.NFT and denied_before:
        return Outcome("REJECT", rejection(one))
    if place is not None and moved_to is None:
        return Outcome("ACCEPT", "", others[1:], led_to=place)
    if form is not Form.FILTER and denied_before and not rules.accept_first:
        return Outcome("REJECT", rejection(moved))
    if denied_behind and not rules.accept_first:
        return Outcome("REJECT", rejection(moved), (IN_MANGLE,) if place is None else ())
    unseen = place is not None or (form is Form.MANGLE and denied_before)
    return Outcome("ACCEPT", "", others[1:] if unseen else others, led_to=moved_to)


def passes(policy: Policy, one: Attempt) -> bool:
    """Whether the caller may reach this address itself. In audit mode a filter is no denial, but for IPv6."""
    reason = decision(policy, one).reason
    if reason is Reason.FILTERED:
        return policy.mode is Mode.AUDIT and one.address.version == 4
    return reason.permits


def place_of(resolved: ResolvedPolicy, one: Attempt) -> tuple[Address, int] | None:
    """Where NAT must lead the attempt: to the caller's filter."""
    policy = resolved.policy
    if not one.begins or policy.mode is Mode.AUDIT or one.address.version == 6:
        return None
    found = decision(policy, one)
    if found.reason is not Reason.FILTERED or found.filter is None:
        return None
    target = Target(one.address, one.destination.port)
    numbers = resolved.numbers
    return listener_address(numbers.targets[target], numbers.filters[found.filter]), FILTER_PORT


def complaints(rules: Output, resolved: ResolvedPolicy, form: Form, attempts: Iterable[Attempt]) -> list[str]:
    """The attempts that end otherwise than they must."""
    pairs = ((one, rules.judge(one.packet()), expected(rules, resolved, form, one)) for one in attempts)
    return [
        f"{got} in place of {wanted}: {one} in {form} under {resolved}"
        for one, got, wanted in pairs
        if not same(got, wanted) or (got.verdict == "ACCEPT" and got.led_to != wanted.led_to)
    ]


def gains(
    random: Random, rules: Output, resolved: ResolvedPolicy, form: Form, attempts: Iterable[Attempt]
) -> list[str]:
    """The attempts that reach more by what conntrack remembers of an earlier connection than they would without."""
    wrong = []
    for one in attempts:
        row = resolved.numbers.targets.get(Target(one.address, one.destination.port))
        columns = resolved.numbers.filters.values()
        places = [(listener_address(row, column), FILTER_PORT) for column in columns if row]
        rules.inherited = Translation(random.choice([None, *places]))
        found, must = rules.judge(one.packet()), expected(rules, resolved, form, one)
        is_allowed = must.verdict == "ACCEPT" and must.led_to is None
        if found.verdict == "ACCEPT" and not is_allowed and _end(found) != _end(must):
            wrong.append(f"{found} in place of {must}: {one} under {resolved}")
    return wrong


def neither(rules: Output, each: Iterable[tuple[ResolvedPolicy, Form]], attempts: Iterable[Attempt]) -> list[str]:
    """The attempts, in the middle of a change, that get the verdict of none of these policies.

    A caller of a filter of one of them may also be denied: then mangle, NAT and filter are not of the same policy.
    """
    under = list(each)
    wrong = []
    for one in attempts:
        got = rules.judge(one.packet())
        ends = [_end(expected(rules, resolved, form, one)) for resolved, form in under]
        if any(place_of(resolved, one) is not None for resolved, _ in under):
            ends.append(("REJECT", None))
        if _end(got) not in ends:
            wrong.append(f"{got}: {one} under none of {under}")
    return wrong


def _end(outcome: Outcome) -> tuple[str, tuple[Address, int] | None]:
    return outcome.verdict, outcome.led_to if outcome.verdict == "ACCEPT" else None
