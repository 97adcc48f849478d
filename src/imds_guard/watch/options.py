# SPDX-License-Identifier: Apache-2.0
"""What ``watch`` is asked to do, and whether the backend in force can do it."""

from __future__ import annotations

from typing import NamedTuple

from imds_guard.backends import choose
from imds_guard.errors import NotPermitted, Unsupported


class WatchOptions(NamedTuple):
    """Options of the command."""

    cgroup: str | None = None
    """The path of the cgroup whose guard is watched; None for the whole machine's."""
    allowed: bool = False
    """Allowed connects, too."""
    once: bool = False
    """Only the records that are in the ring buffer now."""


def require_ebpf(cgroup: str | None, doing: str = "watching denials") -> None:
    """Raises Unsupported when the iptables backend is in force."""
    try:
        running = choose.running(cgroup)
    except NotPermitted:
        return  # a service with few privileges may not query iptables, but can read the ring buffer
    if "iptables" in running and "ebpf" not in running:
        raise Unsupported(
            f"{doing}: the iptables backend is in force, and its rules do not report whom they deny; if imds-guard "
            "check says that eBPF works here, run imds-guard start --backend ebpf"
        )
