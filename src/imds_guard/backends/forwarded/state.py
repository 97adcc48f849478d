# SPDX-License-Identifier: Apache-2.0
"""What becomes of forwarded packets to locked endpoints, read at one moment."""

from __future__ import annotations

import contextlib
import enum
import glob
from typing import NamedTuple

from imds_guard.backends.forwarded.places import Counts

_SWITCHES = "/proc/sys/net/ipv[46]/conf/*/forwarding"


class Forwarding(enum.Enum):
    """What becomes of them."""

    REJECTED = "rejected"
    DROPPED = "dropped"
    """iptables can't reject them in table mangle."""
    COUNTED = "counted"
    """Audit mode."""
    LEFT = "left"
    """They pass, as the option or the policy says."""
    OPEN = "open"
    """They pass, and should not: see ``faults``. Or no rules can be written, and the machine forwards nothing."""


class ForwardingState(NamedTuple):
    """``by`` is "nft" or "iptables", and None without rules. ``why`` says why packets are left alone."""

    forwarding: Forwarding
    faults: tuple[str, ...] = ()
    by: str | None = None
    tracked: tuple[int, ...] = ()
    """The IP versions for which conntrack says which packets are answers."""
    counts: Counts = Counts()
    why: str = ""

    @property
    def is_open(self) -> bool:
        """True where they pass although nobody has asked for that."""
        return self.forwarding is Forwarding.OPEN


def forwarding_is_on() -> bool:
    """True when this network namespace routes on some interface, IPv4 or IPv6."""
    for path in glob.glob(_SWITCHES):
        if "/conf/default/" in path:
            continue
        # An interface may be removed meanwhile.
        with contextlib.suppress(FileNotFoundError), open(path, encoding="ascii") as switch:
            if switch.read().strip() != "0":
                return True
    return False
