# SPDX-License-Identifier: Apache-2.0
"""The protocol that both backends implement: what enforces a policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from imds_guard.policy.model import Policy

if TYPE_CHECKING:
    from imds_guard.backends.ebpf import State


class Change(NamedTuple):
    """The result of a change in the kernel: what was done, and what to warn of, a sentence each."""

    done: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.done or self.warnings)

    def then(self, later: Change) -> Change:
        """This change and a later one."""
        return Change(self.done + later.done, self.warnings + later.warnings)


class Description(NamedTuple):
    """What a backend holds in the kernel, read at one moment."""

    policy: Policy | None
    """None when nothing is in force, and when it can't be read as a policy; then ``faults`` says why."""
    faults: tuple[str, ...]
    ebpf: State | None = None
    """Hooks and counters, under eBPF."""
    neighbours: tuple[Neighbour, ...] = ()
    """Backend.neighbours(). They are not in ``faults``."""


class Neighbour(NamedTuple):
    """Something of another program that may change what is enforced."""

    name: str
    """Its name to the kernel; the key ``known_programs`` of the configuration can have it."""
    fault: str
    """The sentence for start, status and explain."""


class Backend(Protocol):
    """Enforces a whole policy in the kernel, or refuses with the reason."""

    name: str

    def check(self, policy: Policy | None) -> None:
        """Raises Unsupported or NotPermitted with the reason unless all of ``policy`` can be enforced here.

        With None: whether the backend works here at all. Changes nothing.
        """

    def apply(self, policy: Policy) -> Change:
        """Puts ``policy`` in force, in place of what was in force.

        On any error the old policy stays in force, whole.
        """

    def change(self, policy: Policy) -> Change:
        """Puts ``policy`` in force where this backend enforces already; programs that are whole are not replaced."""

    def remove(self) -> Change:
        """Takes everything of ours out of the kernel. Harmless when there is nothing."""

    def read(self) -> Policy | None:
        """The policy that the kernel holds now, or None when this backend enforces nothing."""

    def unaltered(self) -> Policy | None:
        """The policy that the kernel holds now; None also when someone else changed what imds-guard had written."""

    def in_force(self) -> bool:
        """True when something of this backend is in the kernel, whole or not."""

    def faults(self) -> list[str]:
        """What is wrong with what should be in force, a sentence each; empty when it is whole or not active.

        Without neighbours().
        """

    def neighbours(self) -> list[Neighbour]:
        """What others have beside ours in the kernel, that may change what is enforced; empty where nothing is."""

    def notes(self, policy: Policy) -> list[str]:
        """Where this backend enforces ``policy`` otherwise than the policy says, a sentence each."""

    def describe(self) -> Description:
        """The policy, the faults and the details, all of one moment."""
