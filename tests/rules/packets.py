# SPDX-License-Identifier: Apache-2.0
"""A packet as rules see it, and what became of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from imds_guard.policy.model import Address

SYN = frozenset({"SYN"})
TCP_FLAGS = ("FIN", "SYN", "RST", "PSH", "ACK", "URG")


class BadRules(ValueError):
    """Text that the interpreters don't know, or that iptables or nft would refuse."""


class Owner(NamedTuple):
    """The credentials with which the packet's socket was opened."""

    fsuid: int
    fsgid: int
    groups: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Packet:
    """An outgoing or forwarded packet. ``owner`` is None when its socket has no open file, or it has no socket.

    ``port`` is the destination port of TCP and UDP. ``protocol`` is "" where a fragment of IPv6 does not tell it.
    """

    destination: Address
    protocol: str
    port: int = 0
    flags: frozenset[str] = SYN
    owner: Owner | None = None
    fragment: str = ""
    """``first``, ``later``, or nothing for a whole packet."""
    is_cut_short: bool = False
    """The fragment ends before the port."""
    direction: str = ""
    """``original`` or ``reply``; nothing where conntrack has no entry for it, or found it invalid."""
    mark: int = 0
    """The firewall mark (SO_MARK in socket(7))."""

    def read_port(self) -> int | None:
        """The port, None where the fragment ends before it. Raises BadRules for one that has another part there."""
        if self.fragment == "later":
            raise BadRules("a rule takes what is in a later fragment for a port")
        return None if self.is_cut_short else self.port


class Outcome(NamedTuple):
    """What the rules did with a packet. ``verdict`` is ACCEPT, DROP or REJECT.

    ``reject_with`` is the type as iptables calls it, ``logged`` has the prefix of each line in the kernel log.
    """

    verdict: str
    reject_with: str = ""
    logged: tuple[str, ...] = ()
    met: int = 0
    """How many rules the packet was compared with."""
    depth: int = 0
    """How many chains led to the deepest one, as nft counts: a goto is a level, too."""
    mark: int = 0
    """The firewall mark that the packet has now."""
    led_to: tuple[Address, int] | None = None
    """The address and port that DNAT has put in."""


def number_range(text: str, separator: str, highest: int) -> range:
    """``5`` or ``5-9`` as the numbers that it stands for. Raises BadRules."""
    parts = re.fullmatch(rf"(\d+)(?:{separator}(\d+))?", text)
    if parts is None:
        raise BadRules(f"not a range: {text!r}")
    low, high = int(parts[1]), int(parts[2] or parts[1])
    if not low <= high <= highest:
        raise BadRules(f"not an ascending range up to {highest}: {text!r}")
    return range(low, high + 1)
