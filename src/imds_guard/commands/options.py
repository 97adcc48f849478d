# SPDX-License-Identifier: Apache-2.0
"""Options that every command that looks at or changes the guard shares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, NamedTuple

from imds_guard.backends import choose

if TYPE_CHECKING:
    from imds_guard.policy.difference import Difference

Progress = Callable[[str], None]
"""Takes a line about what is being done now, for someone who waits at a terminal."""


Agree = Callable[["Difference | None"], None]
"""Is called with what a change would change, before it is made. None: the policy before can't be read.

Raises GuardError where the change must not be made.
"""


def agree_to_all(_found: Difference | None) -> None:
    """For changes that nobody has to be warned of."""


class GuardOptions(NamedTuple):
    """Where and how to enforce a policy."""

    backend: str = choose.AUTO
    """``auto``, ``ebpf`` or ``iptables``."""
    cgroup: str | None = None
    """The path of a cgroup2 directory; None for the whole machine."""
    resolve_groups: bool = False
    """Under iptables without --suppl-groups: the user IDs of the groups' members, as they are now."""
    forwarded: str | None = None
    """``drop``, ``leave``, or None for what suits the policy: drop, unless containers are allowed."""
    keep_existing: bool = False
    """Connections that the policy does not allow stay open."""
    known_programs: tuple[str, ...] = ()
    """Names of other people's BPF programs that nobody is to be warned of."""
    command: str = "start"
    """For the line of a change in the journal."""
    agree: Agree = agree_to_all
    dry_run: bool = False
    """Find out what would change, and change nothing."""
    keep_temporary: bool = False
    """What allow --for has allowed still ends: the policy in force is only put back."""
    presets: tuple[str, ...] = ()
    """The names of presets that the command line has: --save writes them as such."""
