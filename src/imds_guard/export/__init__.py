# SPDX-License-Identifier: Apache-2.0
"""Exports a policy in the syntax of another tool, with a comment for everything that the tool can't do."""

from __future__ import annotations

from typing import Callable

from imds_guard.errors import UsageError
from imds_guard.export.bsd import ipfw, pf
from imds_guard.export.exported import Exported, note_strict
from imds_guard.export.netfilter import iptables, nftables
from imds_guard.export.systemd import systemd
from imds_guard.export.windows import windows
from imds_guard.policy.model import Policy

_WRITERS: dict[str, Callable[[Policy], Exported]] = {
    "iptables": iptables,
    "nftables": nftables,
    "pf": pf,
    "ipfw": ipfw,
    "windows": windows,
    "systemd": systemd,
}

FORMATS: tuple[str, ...] = tuple(_WRITERS)


def export(policy: Policy, format: str) -> Exported:
    """``policy`` in one of FORMATS. Raises UsageError for an unknown format, and for filters."""
    if format not in _WRITERS:
        raise UsageError(f"{format!r} is not a format: choose one of {', '.join(FORMATS)}")
    if policy.filters:
        raise UsageError(
            f"exporting the policy: filter {policy.filters[0].name!r} is a service of imds-guard, which no rules of "
            "another tool replace; export a policy without filters"
        )
    exported = _WRITERS[format](policy)
    note_strict(policy, exported)
    return exported


__all__ = ["FORMATS", "Exported", "export"]
