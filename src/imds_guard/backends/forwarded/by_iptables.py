# SPDX-License-Identifier: Apache-2.0
"""Rules for forwarded packets at the head of mangle FORWARD, by iptables: for machines without nft.

IMDS-FORWARD     what goes to a locked address
IMDS-FORWARD-E   fragments
IMDS-FORWARD-P   answers, then the lock: the most specific endpoint comes first
IMDS-FORWARD-F   IPv6: which fragments may hide the beginning of a connection
IMDS-FORWARD-U   IPv6: first fragments of UDP
IMDS-FORWARD-D   drops fragments, or counts them in audit mode
IMDS-FORWARD-L0  the first lock: drops, or counts in audit mode

An ACCEPT of Docker or firewalld is in filter, which comes later. Table mangle can't reject: the kernel takes REJECT in
filter alone (reject_tg_check() in Linux net/ipv4/netfilter/ipt_REJECT.c), so packets are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

from imds_guard.backends.forwarded.places import (
    UNLOCKED,
    Count,
    Counts,
    Look,
    Written,
    counts_of,
    digest,
    entries,
    locks_of,
    networks,
)
from imds_guard.backends.iptables.our_chains import OurChains
from imds_guard.backends.iptables.programs import Program, default_program
from imds_guard.backends.iptables.tables import Anchor, Table, is_first, is_reached, owned, read_counters, read_table
from imds_guard.policy.model import Endpoint, Mode, Policy, Protocol
from imds_guard.policy.ports import ALL_PORTS

HEAD = "IMDS-FORWARD"
ENDPOINTS, PORTS, SORTED, FIRST_UDP, FRAGMENT = (f"{HEAD}-{letter}" for letter in "EPFUD")
ANCHOR = Anchor("FORWARD", HEAD, "mangle")

_NOT_A_BEGINNING = "-m tcp ! --tcp-flags SYN,ACK SYN -j RETURN"


def lock_chain(number: int) -> str:
    """The name of the chain of a lock, by its position in the policy."""
    return f"{HEAD}-L{number}"


def render(policy: Policy, version: int, tracked: bool) -> Table:
    """Chain -> rules for IP ``version`` 4 or 6. Empty when no endpoint is of that version."""
    found = entries(policy, version)
    if not found:
        return {}
    endpoints = [endpoint for _, endpoint in found]
    with_tcp = [endpoint for endpoint in endpoints if endpoint.tcp]
    last = "-j DROP" if policy.mode is Mode.ENFORCE else "-j RETURN"
    chains = {HEAD: [f"{to}-g {ENDPOINTS}" for to in _to(endpoints)], FRAGMENT: [last]}
    chains[ENDPOINTS] = [*_fragments(with_tcp, version), f"-g {PORTS}"]
    chains[PORTS] = _answers(tracked)
    chains[PORTS] += [rule for number, endpoint in found for rule in _endpoint(number, endpoint)]
    if version == 6:
        chains[SORTED] = _sorted(with_tcp)
        chains[FIRST_UDP] = [f"-p udp -m udp --dport 1:65535 -g {PORTS}", f"-g {FRAGMENT}"]
    for number in locks_of(policy, version):
        chains[lock_chain(number)] = [f"-p tcp {last}", last]
    return {chain: tuple(rules) for chain, rules in chains.items()}


def _fragments(with_tcp: Sequence[Endpoint], version: int) -> list[str]:
    """IPv4: ``-f`` matches all fragments but the first one. Nobody can put that together without the others."""
    if version == 6:
        return [f"-m frag -g {SORTED}"]
    return [*(f"{to}-p tcp -f -g {FRAGMENT}" for to in _to(with_tcp)), "-f -j RETURN"]


def _sorted(with_tcp: Sequence[Endpoint]) -> list[str]:
    """What is not known to be harmless is dropped.

    A fragment that does not tell its protocol matches neither ``-p`` nor ``! -p``: ip6_packet_match() in Linux
    net/ipv6/netfilter/ip6_tables.c.
    """
    return [
        f"-p udp -m frag --fragfirst -g {FIRST_UDP}",
        "-p udp -j RETURN",
        "! -p tcp -j RETURN",
        *(f"{to}-p tcp -g {FRAGMENT}" for to in _to(with_tcp)),
        "-p tcp -j RETURN",
        f"-g {FRAGMENT}",
    ]


def _answers(tracked: bool) -> list[str]:
    """What belongs to a connection that the other side has begun. Conntrack does not know every packet."""
    if not tracked:
        return [f"-p tcp {_NOT_A_BEGINNING}"]
    return [
        f"-p tcp -m conntrack --ctdir REPLY {_NOT_A_BEGINNING}",
        f"-p tcp -m conntrack --ctstate INVALID,UNTRACKED {_NOT_A_BEGINNING}",
    ]


def _endpoint(number: int, endpoint: Endpoint) -> list[str]:
    rules = []
    for protocol in Protocol:
        for low, high in endpoint.ports(protocol):
            ports = "" if (low, high) == ALL_PORTS[0] else f"-m {protocol.value} --dport {low}:{high} "
            rules.append(f"{_to([endpoint])[0]}-p {protocol.value} {ports}-g {lock_chain(number)}")
    return rules


def _to(endpoints: Sequence[Endpoint]) -> list[str]:
    """The matches of their addresses, each with a space behind it. "" for every address of the IP version."""
    return [f"-d {network} " if network.prefixlen else "" for network in networks(endpoints)]


class ByIptables:
    """The Writer that uses iptables. ``versions`` are the IP versions of this kernel."""

    name = "iptables"

    def __init__(self, versions: Sequence[int], chains: OurChains) -> None:
        self._versions = versions
        self._chains = chains

    def _programs(self) -> list[Program]:
        return [default_program(version, self._chains.commands[version]) for version in self._versions]

    def require(self, policy: Policy) -> None:
        """Writer.require()."""
        for program in self._programs():
            if entries(policy, program.version):
                read_table(program, ANCHOR.table)

    def text_of(self, policy: Policy, tracked: Sequence[int]) -> str:
        """Writer.text_of()."""
        return digest(repr([render(policy, version, version in tracked) for version in self._versions]))

    def write(self, policy: Policy, tracked: Sequence[int]) -> Written:
        """Writer.write()."""
        programs = self._programs()
        self._chains.replace(programs, lambda version: render(policy, version, version in tracked))
        return Written(self.name, tuple(tracked), self.text_of(policy, tracked), _kernel(programs))

    def remove(self) -> list[str]:
        """Writer.remove()."""
        return [f"the chains {HEAD} of table mangle ({program.title})" for program in self._chains.remove()]

    def in_force(self) -> bool:
        """Writer.in_force()."""
        programs = self._chains.programs()
        return any(is_reached(read_table(program, ANCHOR.table), ANCHOR) for program in programs)

    def look(self, policy: Policy, written: Written) -> Look:
        """Writer.look()."""
        programs = self._programs()
        with_rules = [program for program in programs if entries(policy, program.version)]
        misplaced = tuple(line for program in with_rules for line in _faults_of_position(program))
        if misplaced:
            return Look(misplaced)
        if written.text != self.text_of(policy, written.tracked):
            return Look(("iptables: the rules for forwarded packets are not those of the policy; start again",))
        if written.kernel != _kernel(programs):
            return Look(
                (f"iptables: somebody changed the rules for forwarded packets in the chains {HEAD}; start again",)
            )
        return Look((), _counts(policy, with_rules))


def _kernel(programs: Sequence[Program]) -> str:
    found = [sorted(owned(read_table(program, ANCHOR.table), ANCHOR).items()) for program in programs]
    return digest(repr([programs, found]))


def _faults_of_position(program: Program) -> list[str]:
    table = read_table(program, ANCHOR.table)
    if not is_reached(table, ANCHOR):
        return [f"{program.title}: nothing in mangle FORWARD leads to {HEAD} any more: {UNLOCKED}; start again"]
    if not is_first(table, ANCHOR):
        return [f"{program.title}: other people's rules in mangle FORWARD stand before ours; start again"]
    return []


def _counts(policy: Policy, programs: Sequence[Program]) -> Counts:
    rejected: list[Count] = []
    fragments = 0
    for program in programs:
        counters = read_counters(program, ANCHOR)
        fragments += sum(counters.get(FRAGMENT, ()))
        for number in locks_of(policy, program.version):
            packets = counters.get(lock_chain(number), ())
            rejected += counts_of(policy.locks[number].name, program.version, packets)
    return Counts(tuple(rejected), fragments)
