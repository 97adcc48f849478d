# SPDX-License-Identifier: Apache-2.0
"""What enforces a policy: the protocol that both backends implement."""

from __future__ import annotations

from typing import Protocol

from imds_guard.policy.model import Policy


class Backend(Protocol):
    """Holds a whole policy in the kernel, or refuses with the reason."""

    name: str

    def check(self, policy: Policy | None) -> None:
        """Raises Unsupported or NotPermitted with the reason unless all of ``policy`` can be enforced here.

        With None: whether the backend works here at all. Changes nothing.
        """

    def apply(self, policy: Policy) -> list[str]:
        """Puts ``policy`` in force, in place of what was in force. Returns lines that tell what was done.

        On any error the old policy stays in force, whole.
        """

    def read(self) -> Policy | None:
        """The policy that the kernel holds now, or None when this backend enforces nothing."""

    def unaltered(self) -> Policy | None:
        """As read(); None also when someone else changed what we had written."""

    def in_force(self) -> bool:
        """True when something of this backend is in the kernel, whole or not."""

    def remove(self) -> list[str]:
        """Takes everything of ours out of the kernel; harmless when there is nothing. Returns lines as apply()."""

    def faults(self) -> list[str]:
        """What is wrong with what should be in force, a sentence each; empty when it is whole or not active."""
