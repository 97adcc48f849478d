# SPDX-License-Identifier: Apache-2.0
"""Options that every command that looks at or changes the guard shares."""

from __future__ import annotations

from typing import Callable, NamedTuple

from imds_guard.backends import choose

Progress = Callable[[str], None]
"""Takes a line about what is being done now, for someone who waits at a terminal."""


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
