# SPDX-License-Identifier: Apache-2.0
"""Where a process is: its container, and whether its packets are forwarded. For explain: no decision rests on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from imds_guard.kernel.namespaces import namespace_inode

if TYPE_CHECKING:
    from imds_guard.backends.forwarded import Forwarded, Forwarding
    from imds_guard.policy.model import Policy


class Place(NamedTuple):
    """What IDs don't tell about a caller."""

    container: str | None = None
    """RUNTIME:NAME, by its cgroup."""
    forwarded: Forwarding | None = None
    """What becomes of its packets to locked ports, as far as this machine forwards them; None for its own processes."""


def place_of(pid: int, policy: Policy, rules: Forwarded | None) -> Place:
    """The place of a running process. ``rules`` are those for forwarded packets; the guard of a cgroup has none."""
    from imds_guard.watch.cgroup_info import container_of_process  # noqa: PLC0415 -- start-up time

    forwarded = rules.describe(policy).forwarding if rules is not None and _is_elsewhere(pid) else None
    return Place(container_of_process(pid), forwarded)


def _is_elsewhere(pid: int) -> bool:
    """True for a process that lives in another network namespace than this command."""
    try:
        return namespace_inode("net", pid) != namespace_inode("net")
    except OSError:  # it has ended
        return False
