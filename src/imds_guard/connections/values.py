# SPDX-License-Identifier: Apache-2.0
"""The result of a search for open connections, as plain values."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from imds_guard.kernel.namespaces import Namespace
    from imds_guard.policy.model import Address, Protocol


class Holder(NamedTuple):
    """A process that has a descriptor of a socket. The name is safe to print."""

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
    """The user who made the socket."""
    namespace: int
    """The inode of its network namespace."""
    why: str
    """The reason and the lock."""


class WhyOpen(Enum):
    """Why connections that the policy does not allow are still open. The values stand in the JSON."""

    KEPT = "kept"
    """--keep-existing asked for it."""
    AUDIT = "audit"
    UNSUPPORTED = "unable"
    """The kernel is built without CONFIG_INET_DIAG_DESTROY."""
    REFUSED = "refused"
    """The kernel returned another error."""
    REOPENED = "come-back"
    """Each search found new ones."""


class CutResult(NamedTuple):
    """The connections that the policy does not allow, and where they were searched for."""

    searched: tuple[Namespace, ...]
    errors: tuple[str, ...] = ()
    """What could not be searched or cut, and why."""
    cut: tuple[Connection, ...] = ()
    still_open: tuple[Connection, ...] = ()
    why_open: WhyOpen | None = None
    """None when all were cut, and when nobody asked to cut any."""
