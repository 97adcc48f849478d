# SPDX-License-Identifier: Apache-2.0
"""Where a process is: its container, and whether its packets are forwarded. For explain: no decision rests on it."""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

from imds_guard.errors import GuardError
from imds_guard.kernel.namespaces import namespace_inode

REJECTED = "rejected"


class Place(NamedTuple):
    """What IDs don't tell about a caller."""

    container: str | None = None
    """RUNTIME:NAME, by its cgroup."""
    forwarded: str | None = None
    """REJECTED where rules of this machine reject what it forwards of the caller to locked ports."""


def place_of(pid: int, *, rejecting: bool) -> Place:
    """The place of a running process.

    ``rejecting``: the guard is that of the whole machine, in enforce mode. Others reject no forwarded packets.
    """
    from imds_guard.watch.cgroup_info import container_of_process  # noqa: PLC0415 -- start-up time

    forwarded = REJECTED if rejecting and _is_elsewhere(pid) and _are_rejected() else None
    return Place(container_of_process(pid), forwarded)


def _is_elsewhere(pid: int) -> bool:
    with suppress(OSError):  # it has ended
        return namespace_inode("net", pid) != namespace_inode("net")
    return False


def _are_rejected() -> bool:
    from imds_guard.backends.forwarded import Forwarded  # noqa: PLC0415 -- start-up time

    with suppress(GuardError):
        return Forwarded().in_force()
    return False
