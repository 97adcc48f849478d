# SPDX-License-Identifier: Apache-2.0
"""What the formats share: the text with its weaknesses, and the locks in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from imds_guard.backends.iptables.render import id_ranges
from imds_guard.policy.model import Endpoint, Lock, Policy, Verdict
from imds_guard.policy.ports import ALL_PORTS, Ports


class Exported:
    """A policy in another tool's words.

    ``weakenings`` are sentences on what a process of this host may do under the text and not under the policy;
    ``remarks`` on what is stricter, or can be told by no tool but ours. Both stand in the text as comments.
    """

    def __init__(self) -> None:
        self.text = ""
        self.weakenings: list[str] = []
        self.remarks: list[str] = []

    def comments(self, title: str, sign: str = "#") -> list[str]:
        """The head of the text."""
        lines = [title, *(f"Note: {one}" for one in self.remarks), *(f"WEAKER: {one}" for one in self.weakenings)]
        return [f"{sign} {line}" for line in lines]


def entries(policy: Policy) -> list[tuple[int, Lock, Endpoint]]:
    """(number of the lock, lock, endpoint), the most specific first: the first that matches is the one that counts."""
    every = [(number, lock, endpoint) for number, lock in enumerate(policy.locks) for endpoint in lock.endpoints]
    return sorted(every, key=lambda entry: (-entry[2].network.prefixlen, entry[2].sort_key(), entry[0]))


def ranges_words(ranges: Iterable[tuple[int, int]], dash: str) -> list[str]:
    """``5`` or ``5-9`` for each range."""
    return [str(low) if low == high else f"{low}{dash}{high}" for low, high in ranges]


def id_words(ids: Iterable[int], dash: str) -> list[str]:
    """The ids as few ranges."""
    return ranges_words(id_ranges(ids), dash)


def port_words(ports: Ports, dash: str) -> list[str]:
    """The ports as ranges; nothing where all are meant."""
    return [] if ports == ALL_PORTS else ranges_words(ports, dash)


def note_containers(policy: Policy, exported: Exported) -> None:
    """Says what no other tool can tell."""
    if policy.containers is Verdict.DENY:
        exported.remarks.append("callers in containers are judged as the host's own; the policy denies them")


def note_strict(policy: Policy, exported: Exported) -> None:
    """Says that no other tool knows which sockets were let through."""
    if policy.strict:
        exported.weakenings.append("the policy is strict: raw sockets and connections from before could get through")


def note_user_namespaces(policy: Policy, exported: Exported) -> None:
    """Says what a lock that allows by default loses on Linux."""
    for lock in policy.locks:
        if lock.default is Verdict.ALLOW:
            exported.weakenings.append(
                f"lock {lock.name!r} allows by default: a listed user can take another ID in a user namespace"
            )


def note_primary_groups(locks: Sequence[Lock], exported: Exported, tool: str) -> None:
    """Says what a tool loses that sees nothing but primary groups."""
    for lock in locks:
        if lock.allow.groups:
            exported.remarks.append(
                f"{tool} sees primary groups alone: members of lock {lock.name!r} by a supplementary group are denied"
            )
        if lock.deny.groups:
            exported.weakenings.append(
                f"{tool} sees primary groups alone: lock {lock.name!r} does not deny who has a denied group as a "
                "supplementary one"
            )
