# SPDX-License-Identifier: Apache-2.0
"""What was in force before a change, and what the change changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from imds_guard.errors import GuardError

if TYPE_CHECKING:
    from imds_guard.backends import Backend
    from imds_guard.policy.difference import Difference
    from imds_guard.policy.model import Policy


class Held(NamedTuple):
    """What is in force."""

    policy: Policy | None = None
    readable: bool = True
    """False where something is in force, and nobody can tell what."""
    forwarded: str | None = None
    """``drop`` or ``leave``; None for the guard of a cgroup, and where nothing is in force."""
    only_ipv4: bool = False
    """True where the backend left out the endpoints of IPv6, which the kernel does not have."""


def held(running: Mapping[str, Backend], cgroup: str | None) -> Held:
    """What the backends that run enforce. A change does not fail because the policy before can't be read."""
    if not running:
        return Held()
    for name, backend in running.items():
        try:
            policy = backend.read()
            if policy is not None:
                return held_by(name, policy, cgroup)
        except GuardError:
            continue
    return Held(readable=False)


def held_by(backend: str, policy: Policy, cgroup: str | None) -> Held:
    """A policy that is in force."""
    versions = {one.network.version for lock in policy.locks for one in lock.endpoints}
    forwarded = forwarded_of(policy, option_in_force(cgroup), cgroup)
    return Held(policy, True, forwarded, backend == "iptables" and 6 not in versions)


def forwarded_of(policy: Policy, option: str | None, cgroup: str | None) -> str | None:
    """``drop`` or ``leave``: what is to become of forwarded packets. ``option`` is that of --forwarded."""
    if cgroup is not None:
        return None
    from imds_guard.backends.forwarded.forwarded import choose  # noqa: PLC0415 -- start-up time

    return "drop" if choose(policy, option) else "leave"


def option_in_force(cgroup: str | None) -> str | None:
    """The option --forwarded of the last start."""
    if cgroup is not None:
        return None
    from imds_guard.backends.forwarded import Forwarded  # noqa: PLC0415 -- start-up time

    return Forwarded().option()


def compare(before: Held, policy: Policy | None, forwarded: str | None = None) -> Difference | None:
    """What changes when ``policy`` takes the place of what is in force. None where that can't be read."""
    if not before.readable:
        return None
    from imds_guard.policy.difference import difference  # noqa: PLC0415 -- start-up time
    from imds_guard.policy.edit import without_ipv6  # noqa: PLC0415

    if before.only_ipv4 and policy is not None:
        policy = without_ipv6(policy)
    return difference(before.policy, policy, (before.forwarded, forwarded))
