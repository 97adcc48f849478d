# SPDX-License-Identifier: Apache-2.0
"""The rules as iptables would walk through them, for tests that need no kernel. Source: ipt_do_table() in Linux."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from imds_guard.backends.iptables.render import HEAD, Chains
from imds_guard.backends.iptables.rules import LOG, REJECT, RETURN, Rule
from imds_guard.policy.model import Address, Protocol


@dataclass(frozen=True)
class Packet:
    """The first packet of a connect, or a datagram. ``uid`` is None for a socket of the kernel."""

    address: Address
    port: int
    protocol: Protocol
    uid: int | None
    gid: int = 0
    groups: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Walk:
    """What became of a packet: REJECT, LOG or RETURN; how many rules it met; how deep the chains were nested."""

    verdict: str
    met: int
    depth: int


def walk(chains: Chains, packet: Packet) -> Walk:
    """Sends a packet through our chains. A goto keeps the place to return to; nft counts both as a level."""
    stack: list[tuple[str, int]] = []
    chain, place, met, depth, logged = HEAD, 0, 0, 1, False
    while True:
        if place >= len(chains[chain]):
            if not stack:
                return Walk(LOG if logged else RETURN, met, depth)
            chain, place = stack.pop()
            continue
        rule = chains[chain][place]
        met, place = met + 1, place + 1
        if not _matches(rule, packet):
            continue
        if rule.target == REJECT:
            return Walk(REJECT, met, depth)
        if rule.target == LOG:
            logged = True
        elif rule.target == RETURN:
            place = len(chains[chain])
        else:
            stack += [] if rule.goto else [(chain, place)]
            chain, place, depth = rule.target, 0, depth + 1


def _matches(rule: Rule, packet: Packet) -> bool:
    if rule.protocol and rule.protocol != packet.protocol.value:
        return False
    if rule.destination is not None and packet.address not in ipaddress.ip_network(rule.destination):
        return False
    if rule.ports and not rule.ports[0] <= packet.port <= rule.ports[1]:
        return False
    return _owner_matches(rule, packet)


def _owner_matches(rule: Rule, packet: Packet) -> bool:
    """Source: owner_mt() in Linux net/netfilter/xt_owner.c."""
    if packet.uid is None:
        return rule.uids is None and rule.gids is None
    if rule.ownerless:
        return False
    if rule.uids and not rule.uids[0] <= packet.uid <= rule.uids[1]:
        return False
    gids = {packet.gid, *(packet.groups if rule.supplementary else ())}
    return rule.gids is None or any(rule.gids[0] <= gid <= rule.gids[1] for gid in gids)
