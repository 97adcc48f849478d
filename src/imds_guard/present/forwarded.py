# SPDX-License-Identifier: Apache-2.0
"""What becomes of forwarded packets, as text and as JSON: status and report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from imds_guard.present.wrap import wrapped
from imds_guard.text import count_of

if TYPE_CHECKING:
    from imds_guard.backends.forwarded import Counts, ForwardingState

_WITH = {
    "nft": "rules in force, nft tables imds-guard-forward",
    "iptables": "rules in force, iptables, mangle FORWARD",
}


def forwarding_lines(state: ForwardingState) -> list[str]:
    """The line of status, and the counters in more of them."""
    return wrapped("forwarded packets to locked endpoints: ", "; ".join(_parts(state)))


def _parts(state: ForwardingState) -> list[str]:
    if state.why:
        return [f"left alone, since {state.why}"]
    if state.is_open:
        return ["not rejected"] if state.faults else ["not rejected, and this machine forwards nothing now"]
    answers = "answers pass" + (" (conntrack)" if state.tracked else "")
    return [f"{state.forwarding.value} ({_WITH[str(state.by)]})", answers, *(count_texts(state.counts) or ["none yet"])]


def count_texts(counts: Counts) -> list[str]:
    """``12 to lock imds (IPv4 tcp)``, and the fragments. Empty where there were none."""
    texts = [f"{one.packets:,} to lock {one.lock} (IPv{one.version} {one.protocol.value})" for one in counts.rejected]
    return texts + ([count_of(counts.fragments, "fragment")] if counts.fragments else [])


def forwarding_values(state: ForwardingState) -> dict[str, Any]:
    """The state as plain values for JSON."""
    return {
        "state": state.forwarding.value,
        "by": state.by,
        "conntrack": [f"IPv{version}" for version in state.tracked],
        "why": state.why or None,
        **count_values(state.counts),
    }


def count_values(counts: Counts) -> dict[str, Any]:
    """The counters as plain values."""
    rows = [
        {"lock": one.lock, "ip": one.version, "protocol": one.protocol.value, "packets": one.packets}
        for one in counts.rejected
    ]
    return {"rejected": rows, "fragments": counts.fragments}
