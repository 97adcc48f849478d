# SPDX-License-Identifier: Apache-2.0
"""Rules for forwarded packets in tables and base chains of our own, by nft.

forward   a base chain before filter, where nobody else can ACCEPT: picks out what goes to a locked address
find      fragments first, then answers, then the lock: the most specific endpoint comes first
fragment  IPv6: which fragments may hide the beginning of a connection
lock-0    the first lock: rejects, or counts in audit mode

A table for each IP version: "ct" in one of family inet would switch conntrack on for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
from imds_guard.kernel import nft
from imds_guard.policy.model import Endpoint, Mode, Policy, Protocol
from imds_guard.policy.ports import ALL_PORTS

NAME = "imds-guard-forward"
TABLES = {4: nft.Table("ip", NAME), 6: nft.Table("ip6", NAME)}

PRIORITY = -5
"""Before filter (0), and so before the chains of iptables, Docker and firewalld; behind NAT of the destination (-100).

Source: enum nf_ip_hook_priorities in Linux include/uapi/linux/netfilter_ipv4.h.
"""

FIND, FRAGMENT = "find", "fragment"

_NOT_A_BEGINNING = "tcp flags & (syn | ack) != syn"
_UNREACHABLE = {4: "icmp type port-unreachable", 6: "icmpv6 type port-unreachable"}

Chains = dict[str, list[str]]


def lock_chain(number: int) -> str:
    """The name of the chain of a lock, by its position in the policy."""
    return f"lock-{number}"


def render(policy: Policy, version: int, tracked: bool) -> Chains:
    """Chain -> lines for IP ``version`` 4 or 6. Empty when no endpoint is of that version."""
    found = entries(policy, version)
    if not found:
        return {}
    endpoints = [endpoint for _, endpoint in found]
    with_tcp = [endpoint for endpoint in endpoints if endpoint.tcp]
    chains = {FRAGMENT: _harmless(with_tcp) if version == 6 else []}
    chains[FRAGMENT].append(f"counter {'drop' if policy.mode is Mode.ENFORCE else 'accept'}")
    for number in locks_of(policy, version):
        chains[lock_chain(number)] = _lock(policy.mode, version)
    chains[FIND] = _fragments(with_tcp, version) + _answers(tracked)
    chains[FIND] += [rule for number, endpoint in found for rule in _endpoint(number, endpoint)]
    base = f"type filter hook forward priority {PRIORITY}; policy accept;"
    chains["forward"] = [base, f"{_to(endpoints)}goto {FIND}"]
    return chains


def _harmless(with_tcp: Sequence[Endpoint]) -> list[str]:
    """Fragments of IPv6 that can't begin a connection. One that does not tell its protocol or port is not among them.

    A match that can't be evaluated ends its rule (NFT_BREAK): where a fragment ends before its TCP or UDP header, a
    rule that asks for the protocol or the port does not match.
    """
    elsewhere = _to(with_tcp).replace("daddr", "daddr !=")
    return [
        "meta l4proto != { tcp, udp } accept",
        *([f"meta l4proto tcp {elsewhere}accept"] if elsewhere or not with_tcp else []),
        "meta l4proto udp frag frag-off != 0 accept",
        "udp dport 1-65535 return",
    ]


def _fragments(with_tcp: Sequence[Endpoint], version: int) -> list[str]:
    """Fragments of TCP to an address with a locked TCP port; those of IPv6 are sorted in a chain of their own.

    A later fragment of UDP has no port, but the kernel may take what is in its place for one (tried on 6.18).
    """
    if version == 6:
        return [f"exthdr frag exists jump {FRAGMENT}"]
    dropped = [f"{_to(with_tcp)}meta l4proto tcp ip frag-off & 0x3fff != 0 goto {FRAGMENT}"] if with_tcp else []
    return [*dropped, "ip frag-off & 0x1fff != 0 accept"]


def _lock(mode: Mode, version: int) -> list[str]:
    if mode is Mode.AUDIT:
        return ["meta l4proto tcp counter accept", "counter accept"]
    return ["meta l4proto tcp counter reject with tcp reset", f"counter reject with {_UNREACHABLE[version]}"]


def _answers(tracked: bool) -> list[str]:
    """What belongs to a connection that the other side has begun. Conntrack does not know every packet."""
    if not tracked:
        return [f"{_NOT_A_BEGINNING} accept"]
    return [
        f"ct direction reply {_NOT_A_BEGINNING} accept",
        f"ct state {{ invalid, untracked }} {_NOT_A_BEGINNING} accept",
    ]


def _endpoint(number: int, endpoint: Endpoint) -> list[str]:
    rules = []
    for protocol in Protocol:
        ports = endpoint.ports(protocol)
        if ports == ALL_PORTS:
            rules.append(f"{_to([endpoint])}meta l4proto {protocol.value} goto {lock_chain(number)}")
        elif ports:
            text = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in ports)
            rules.append(f"{_to([endpoint])}{protocol.value} dport {{ {text} }} goto {lock_chain(number)}")
    return rules


def _to(endpoints: Sequence[Endpoint]) -> str:
    """The match of their addresses, with a space behind it. "" for every address of the IP version, and for none."""
    found = networks(endpoints)
    if not found or any(network.prefixlen == 0 for network in found):
        return ""
    family = "ip" if found[0].version == 4 else "ip6"
    return f"{family} daddr {{ {', '.join(map(str, found))} }} "


class ByNft:
    """The Writer that uses nft. ``versions`` are the IP versions of this kernel."""

    name = "nft"

    def __init__(self, versions: Sequence[int]) -> None:
        self._versions = versions

    def require(self, policy: Policy) -> None:
        """Writer.require()."""
        for version in self._versions:
            if entries(policy, version):
                nft.require(TABLES[version].family)

    def text_of(self, policy: Policy, tracked: Sequence[int]) -> str:
        """Writer.text_of()."""
        return digest("".join(self._texts(policy, tracked)))

    def _texts(self, policy: Policy, tracked: Sequence[int]) -> list[str]:
        texts = []
        for version in self._versions:
            chains = render(policy, version, version in tracked)
            table = TABLES[version]
            texts.append(nft.replacement(table, chains) if chains else nft.removal(table))
        return texts

    def write(self, policy: Policy, tracked: Sequence[int]) -> Written:
        """Writer.write()."""
        nft.change(self._texts(policy, tracked))
        return Written(self.name, tuple(tracked), self.text_of(policy, tracked), _kernel(self._read()))

    def _read(self) -> dict[int, nft.Listing | None]:
        return {version: nft.read(TABLES[version]) for version in self._versions}

    def remove(self) -> list[str]:
        """Writer.remove()."""
        return [f"the nft table {table}" for table in nft.remove([TABLES[version] for version in self._versions])]

    def in_force(self) -> bool:
        """Writer.in_force()."""
        return any(listing is not None for listing in self._read().values())

    def look(self, policy: Policy, written: Written) -> Look:
        """Writer.look()."""
        tables = self._read()
        missing = [str(TABLES[v]) for v, listing in tables.items() if listing is None and entries(policy, v)]
        if missing:
            return Look((f"nft: somebody removed the table {' and '.join(missing)}: {UNLOCKED}; start again",))
        if written.text != self.text_of(policy, written.tracked):
            return Look(("nft: the rules for forwarded packets are not those of the policy; start again",))
        if written.kernel != _kernel(tables):
            return Look((f"nft: somebody changed the rules for forwarded packets in the tables {NAME}; start again",))
        return Look((), _counts(policy, tables))


def _kernel(tables: Mapping[int, nft.Listing | None]) -> str:
    return digest(" ".join("-" if listing is None else listing.fingerprint for listing in tables.values()))


def _counts(policy: Policy, tables: Mapping[int, nft.Listing | None]) -> Counts:
    rejected: list[Count] = []
    fragments = 0
    for version, listing in tables.items():
        if listing is not None:
            fragments += sum(listing.packets(FRAGMENT))
            for number in locks_of(policy, version):
                rejected += counts_of(policy.locks[number].name, version, listing.packets(lock_chain(number)))
    return Counts(tuple(rejected), fragments)
