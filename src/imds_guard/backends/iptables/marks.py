# SPDX-License-Identifier: Apache-2.0
"""The nft chain that rejects marked packets in front of NAT, and other people's rules that it can't hold against.

The order of the hooks in OUTPUT: mangle (-150), this chain (-101), NAT of the destination (-100), filter (0): enum
nf_ip_hook_priorities in Linux include/uapi/linux/netfilter_ipv4.h. A verdict "accept" of somebody else ends his own
chain alone, so nobody can let a marked packet past this one.

It knows no policy. So it is the same under every policy, and a change of policy need not touch it.
"""

from __future__ import annotations

from imds_guard.backends.iptables.rules import DENIED_MARK
from imds_guard.kernel import nft

TABLE = nft.Table("inet", "imds-guard-output")
PRIORITY = -101

CHAINS = {
    "output": (
        f"type filter hook output priority {PRIORITY}; policy accept;",
        f"meta mark {DENIED_MARK:#x} meta l4proto tcp counter reject with tcp reset",
        f"meta mark {DENIED_MARK:#x} counter reject with icmpx type port-unreachable",
    )
}


def put(unchanged: str) -> str:
    """Puts the chain in force, unless a table with the fingerprint ``unchanged`` is there. Returns its fingerprint."""
    there = nft.read(TABLE)
    if there is None or there.fingerprint != unchanged:
        nft.change([nft.replacement(TABLE, CHAINS)])
        there = nft.read(TABLE)
    return "" if there is None else there.fingerprint


def fault(fingerprint: str) -> str | None:
    """What is wrong with the chain. ``fingerprint`` is of the table that was written; "" where it is unknown."""
    there = nft.read(TABLE)
    if there is None:
        return f"nft: somebody removed the table {TABLE}: NAT and rules of others come before ours now; start again"
    if fingerprint and there.fingerprint != fingerprint:
        return f"nft: somebody changed the table {TABLE}, or nft was upgraded; start again"
    return None


def remove() -> bool:
    """Removes the table. False when there was none."""
    return bool(nft.remove([TABLE]))
