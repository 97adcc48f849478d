# SPDX-License-Identifier: Apache-2.0
"""What connections.py finds, as values."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from imds_guard.kernel.namespaces import Namespace
    from imds_guard.policy.model import Address, Protocol


class Holder(NamedTuple):
    """A process with a descriptor of a socket. The name is safe to print."""

    pid: int
    name: str
    user: str


class Connection(NamedTuple):
    """A connection to a locked endpoint that the policy does not allow."""

    protocol: Protocol
    local: tuple[Address, int]
    remote: tuple[Address, int]
    holders: tuple[Holder, ...]
    user: str
    """Who made it."""
    namespace: int
    """The inode of its network namespace."""
    why: str


class Sweep(NamedTuple):
    """What was found, and what came of it."""

    looked_into: tuple[Namespace, ...]
    unseen: tuple[str, ...] = ()
    """What could not be looked into, and why."""
    cut: tuple[Connection, ...] = ()
    left: tuple[Connection, ...] = ()
    why_left: str = ""


KEPT, AUDIT, UNABLE, REFUSED, COME_BACK = "kept", "audit", "unable", "refused", "come-back"
"""Why connections were left: as asked; audit mode; the kernel can't; it did not do it; there are always new ones."""
