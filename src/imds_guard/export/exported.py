# SPDX-License-Identifier: Apache-2.0
"""An exported policy: its text, and notes on what the other tool can't do."""

from __future__ import annotations

from collections.abc import Sequence

from imds_guard.policy.model import Lock, Policy, Verdict


class Exported:
    """A policy in the syntax of another tool.

    ``weakenings``: sentences on what the exported rules allow to a process of this host and the policy denies.
    ``remarks``: sentences on what the rules deny and the policy allows, or on what only our tool can see.
    Both are comments in the text.
    """

    def __init__(self) -> None:
        self.text = ""
        self.weakenings: list[str] = []
        self.remarks: list[str] = []

    def comments(self, title: str) -> list[str]:
        """The comments at the head of the text."""
        lines = [title, *(f"Note: {one}" for one in self.remarks), *(f"WEAKER: {one}" for one in self.weakenings)]
        return [f"# {line}" for line in lines]


def note_containers(policy: Policy, exported: Exported) -> None:
    """No other tool recognises callers in containers."""
    if policy.containers is Verdict.DENY:
        exported.remarks.append("callers in containers are treated as the host's own; the policy denies them")


def note_strict(policy: Policy, exported: Exported) -> None:
    """No other tool knows which sockets were approved."""
    if policy.strict:
        exported.weakenings.append("the policy is strict: raw sockets and earlier connections could get through")


def note_user_namespaces(policy: Policy, exported: Exported) -> None:
    """On Linux, a lock that allows by default can be passed with an ID of a user namespace."""
    for lock in policy.locks:
        if lock.default is Verdict.ALLOW:
            exported.weakenings.append(
                f"lock {lock.name!r} allows by default: a listed user can take another ID in a user namespace"
            )


def note_default_allow(policy: Policy, exported: Exported) -> None:
    """PF and IPFW apply a lock's default to sockets without an owner, too."""
    if any(lock.default is Verdict.ALLOW for lock in policy.locks):
        exported.remarks.append("a lock that allows by default also allows sockets of the kernel itself")


def note_primary_groups(locks: Sequence[Lock], exported: Exported, tool: str) -> None:
    """``tool`` sees the primary group only."""
    for lock in locks:
        if lock.allow.groups:
            exported.remarks.append(
                f"{tool} sees primary groups only: lock {lock.name!r} denies who has an allowed group as a "
                "supplementary group"
            )
        if lock.deny.groups:
            exported.weakenings.append(
                f"{tool} sees primary groups only: lock {lock.name!r} does not deny who has a denied group as a "
                "supplementary group"
            )
