# SPDX-License-Identifier: Apache-2.0
"""What the rules of nft and of iptables have in common: where packets are rejected, and how many were."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from imds_guard.errors import GuardError
from imds_guard.policy import model
from imds_guard.policy.model import Endpoint, Network, Policy

UNLOCKED = "forwarded packets reach the locked endpoints"


class Written(NamedTuple):
    """Rules that were written: what they depend on, and what they look like in the kernel."""

    by: str
    """"nft" or "iptables"."""
    tracked: tuple[int, ...]
    """The IP versions whose rules ask conntrack."""
    text: str
    """Differs for rules of different texts."""
    kernel: str
    """Differs for rules that the kernel shows differently."""


class Count(NamedTuple):
    """The packets to the endpoints of a lock that were rejected, or counted in audit mode."""

    lock: str
    version: int
    protocol: model.Protocol
    packets: int


class Counts(NamedTuple):
    """What the rules have counted since they were written."""

    rejected: tuple[Count, ...] = ()
    fragments: int = 0
    """Fragments to a locked address, which were dropped."""


class Look(NamedTuple):
    """What is wrong with the rules, a sentence each, and their counters. Where something is wrong none are read."""

    faults: tuple[str, ...]
    counts: Counts = Counts()


class Writer(Protocol):
    """Writes the rules with one program."""

    name: str

    def require(self, policy: Policy) -> None:
        """Raises Unsupported or NotPermitted with the reason unless the rules can be written here. Changes nothing."""

    def text_of(self, policy: Policy, tracked: Sequence[int]) -> str:
        """Written.text of the rules for a policy."""

    def write(self, policy: Policy, tracked: Sequence[int]) -> Written:
        """Puts the rules for ``policy`` in place of ours, all of them or none."""

    def remove(self) -> list[str]:
        """Removes our rules. What was removed, as the end of a sentence."""

    def in_force(self) -> bool:
        """True when packets meet rules of ours."""

    def look(self, policy: Policy, written: Written) -> Look:
        """The rules for ``policy`` that were ``written``, as they are now."""


def entries(policy: Policy, version: int) -> list[tuple[int, Endpoint]]:
    """(number of the lock, endpoint), the most specific endpoint first: the first that matches names the lock."""
    found = [
        (number, endpoint)
        for number, lock in enumerate(policy.locks)
        for endpoint in lock.endpoints
        if endpoint.network.version == version
    ]
    return sorted(found, key=lambda entry: (-entry[1].network.prefixlen, entry[1].sort_key(), entry[0]))


def locks_of(policy: Policy, version: int) -> list[int]:
    """The numbers of the locks that have an endpoint of an IP version."""
    return sorted({number for number, _ in entries(policy, version)})


def networks(endpoints: Iterable[Endpoint]) -> list[Network]:
    """The addresses of endpoints of one IP version, in as few prefixes as can be."""
    found: list[Network] = [endpoint.network for endpoint in endpoints]
    return list(ipaddress.collapse_addresses(found))  # type: ignore[type-var]


def digest(text: str) -> str:
    """16 hexadecimal digits that differ for different texts."""
    import hashlib  # noqa: PLC0415

    return hashlib.sha256(text.encode()).hexdigest()[:16]


def counts_of(lock: str, version: int, packets: Sequence[int]) -> list[Count]:
    """The counters of a lock's chain: of TCP, then of UDP. Those at 0 are left out."""
    if len(packets) != len(model.Protocol):
        raise GuardError(f"the chain of lock {lock!r} for forwarded packets was changed by somebody: start again")
    return [Count(lock, version, protocol, count) for protocol, count in zip(model.Protocol, packets) if count]
