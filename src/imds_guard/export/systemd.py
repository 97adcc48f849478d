# SPDX-License-Identifier: Apache-2.0
"""A policy as a drop-in for a unit of systemd that must not reach the endpoints.

IPAddressDeny= denies the whole unit: it knows neither users nor ports. Source: systemd.resource-control(5).
"""

from __future__ import annotations

from imds_guard.export.exported import Exported
from imds_guard.export.rules import heading
from imds_guard.policy.model import Lock, Mode, Policy, Verdict


def systemd(policy: Policy) -> Exported:
    """Every lock that denies by default, for all users of the unit and on all ports."""
    exported = Exported()
    exported.remarks += [
        "everyone in the unit is denied, also those that the policy allows",
        "all ports and protocols of an address are denied, also DNS and NTP at 169.254.169.254",
        "an address that IPAddressAllow= names in the unit or in a slice above it stays open",
    ]
    lines: list[str] = []
    for lock in policy.locks:
        lines += _lock(lock, exported)
    if policy.mode is Mode.AUDIT:
        exported.remarks.append("systemd has no audit mode, so the settings are comments")
        lines = [f"# {line}" if not line.startswith("#") else line for line in lines]
    head = exported.comments(
        "Put into /etc/systemd/system/NAME.service.d/50-imds-guard.conf; then: systemctl daemon-reload"
    )
    exported.text = "\n".join([*head, "[Service]", *lines, ""])
    return exported


def _lock(lock: Lock, exported: Exported) -> list[str]:
    if lock.default is Verdict.ALLOW:
        exported.weakenings.append(f"lock {lock.name!r} allows by default, which systemd can't do: it is left out")
        return [f"{heading(lock)}: left out"]
    return [heading(lock), *(f"IPAddressDeny={endpoint.network}" for endpoint in lock.endpoints)]
