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


class WhyOpen(Enum):
    """Why a connection that the policy does not allow is still open. The values stand in the JSON."""

    KEPT = "kept"
    """--keep-existing asked for it."""
    AUDIT = "audit"
    UNSUPPORTED = "unable"
    """The kernel is built without CONFIG_INET_DIAG_DESTROY."""
    REFUSED = "refused"
    """The kernel returned another error."""
    HELD = "held"
    """A system call that does not end has locked the socket."""
    NO_PROCESS = "no-process"
    """Root made it and no process holds it: it is probably the kernel's own, for a disk or a mount."""
    NO_TIME = "no-time"
    """The time was over, or another command has changed the policy."""
    REOPENED = "come-back"
    """Each search found new ones."""


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
    why_open: WhyOpen | None = None
    """None for one that was cut, and when nobody asked to cut any."""


class SweepEnd(Enum):
    """How a search ended. The values stand in the JSON."""

    COMPLETE = "complete"
    DEADLINE = "deadline"
    """The time was over before everything was searched and cut."""
    INTERRUPTED = "interrupted"
    """Another command has changed the policy meanwhile."""


class CutResult(NamedTuple):
    """The connections that the policy does not allow, and where they were searched for."""

    searched: tuple[Namespace, ...]
    errors: tuple[str, ...] = ()
    """What could not be searched or cut, and why."""
    cut: tuple[Connection, ...] = ()
    still_open: tuple[Connection, ...] = ()
    end: SweepEnd = SweepEnd.COMPLETE

    @property
    def why_open(self) -> WhyOpen | None:
        """Why the first one is open. None when all were cut, and when nobody asked to cut any."""
        return self.still_open[0].why_open if self.still_open else None
