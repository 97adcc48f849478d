# SPDX-License-Identifier: Apache-2.0
"""A policy as a drop-in for a unit of systemd: IPAddressDeny=, which knows neither identities nor ports.

Source: systemd.resource-control(5). It denies the whole unit, so it goes to units that must not reach the endpoints.
"""

from __future__ import annotations

from imds_guard.export.words import Exported
from imds_guard.policy.model import Lock, Mode, Policy, Verdict


def systemd(policy: Policy) -> Exported:
    """Every lock that denies by default, for all users of the unit and on all ports."""
    exported = Exported()
    exported.remarks += [
        "everyone in the unit is denied, also those whom the policy allows",
        "all ports and protocols of an address are denied, DNS and NTP at 169.254.169.254 too",
        "an address that IPAddressAllow= names in the unit or in a slice above it stays open",
    ]
    lines: list[str] = []
    for lock in policy.locks:
        lines += _lock(lock, exported)
    if policy.mode is Mode.AUDIT:
        exported.remarks.append("audit mode can't be said: the settings are there as comments")
        lines = [f"# {line}" if not line.startswith("#") else line for line in lines]
    head = exported.comments(
        "Put into /etc/systemd/system/NAME.service.d/50-imds-guard.conf; then: systemctl daemon-reload"
    )
    exported.text = "\n".join([*head, "[Service]", *lines, ""])
    return exported


def _lock(lock: Lock, exported: Exported) -> list[str]:
    if lock.default is Verdict.ALLOW:
        exported.weakenings.append(f"lock {lock.name!r} denies some users alone, which can't be said: it is left out")
        return [f"# {lock.name}: left out"]
    return [f"# {lock.name}", *(f"IPAddressDeny={endpoint.network}" for endpoint in lock.endpoints)]
