# SPDX-License-Identifier: Apache-2.0
"""The parts that the formats share: the order of endpoints, the comment of a lock, ranges of IDs and ports as text."""

from __future__ import annotations

from collections.abc import Iterable

from imds_guard.backends.iptables.rules import id_ranges
from imds_guard.policy.model import Endpoint, Lock, Policy
from imds_guard.policy.ports import ALL_PORTS, Ports


def heading(lock: Lock) -> str:
    """The comment above the rules of a lock. It never ends with a backslash, as a name may.

    PF would join such a comment with the next line, a rule: lgetc() in OpenBSD sbin/pfctl/parse.y.
    """
    return f"# lock {lock.name!r}"


def by_specificity(policy: Policy) -> list[tuple[int, Lock, Endpoint]]:
    """(number of the lock, lock, endpoint), the most specific endpoint first: the first that matches decides."""
    entries = [(number, lock, endpoint) for number, lock in enumerate(policy.locks) for endpoint in lock.endpoints]
    return sorted(entries, key=lambda entry: (-entry[2].network.prefixlen, entry[2].sort_key(), entry[0]))


def format_ids(ids: Iterable[int], dash: str) -> list[str]:
    """``5`` or ``5-9`` for each range of the IDs."""
    return _format_ranges(id_ranges(ids), dash)


def format_ports(ports: Ports, dash: str) -> list[str]:
    """``80`` or ``80-90`` for each range; nothing for all ports."""
    return [] if ports == ALL_PORTS else _format_ranges(ports, dash)


def _format_ranges(ranges: Iterable[tuple[int, int]], dash: str) -> list[str]:
    return [str(low) if low == high else f"{low}{dash}{high}" for low, high in ranges]
