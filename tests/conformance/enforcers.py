# SPDX-License-Identifier: Apache-2.0
"""Every backend under the same few verbs, put to work for one sandbox after the other."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Callable, Protocol, TypeVar

from imds_guard.backends.ebpf import EbpfBackend
from imds_guard.backends.ebpf.program import Defines
from imds_guard.backends.iptables import IptablesBackend
from imds_guard.backends.iptables.tables import reading_once
from imds_guard.errors import GuardError
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.model import Policy, Reason
from tests.conformance.families import ADDRESSES

T = TypeVar("T")

PATIENCE_S = 300.0
"""iptables takes seconds for a long policy where the processor is emulated, and minutes while the host is busy."""


class Enforcer(Protocol):
    """A backend, where it enforces, and how a denial looks there. Closed by the ``with`` block."""

    refusals: frozenset[str]
    """The errnos that a denied connect may end with."""

    def __enter__(self) -> Enforcer: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def sandbox(self) -> Sandbox:
        """A fresh namespace and cgroup that the backend will enforce in."""

    def apply(self, sandbox: Sandbox, policy: Policy) -> None:
        """Checks the policy and puts it in force. Raises Unsupported or NotPermitted."""

    def held(self, sandbox: Sandbox) -> tuple[Policy | None, list[str]]:
        """The policy that the kernel holds, and what the backend says is wrong."""

    def reasons(self) -> set[Reason] | None:
        """Why connects were judged as they were since the last call or apply(). None where nothing counts reasons."""

    def remove(self, sandbox: Sandbox) -> None:
        """Takes it all away."""


class Ebpf:
    """Programs stay attached to a cgroup above all sandboxes; from row to row only the policy changes, as in use."""

    refusals = frozenset({"EPERM"})
    defines: Defines = ()

    def __init__(self, folder: Path) -> None:
        self._above = Sandbox()
        self._before: dict[Reason, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Ebpf:
        self._stack.enter_context(self._above)
        self._backend = EbpfBackend(self._above.cgroup, self.defines)
        self._stack.callback(self._backend.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def sandbox(self) -> Sandbox:
        """Enforcer.sandbox(): below the cgroup that the programs are attached to."""
        return Sandbox(ADDRESSES, below=self._above.cgroup)

    def apply(self, sandbox: Sandbox, policy: Policy) -> None:
        """Enforcer.apply()."""
        self._backend.check(policy)
        self._backend.apply(policy)
        self._before = self._counts()

    def held(self, sandbox: Sandbox) -> tuple[Policy | None, list[str]]:
        """Enforcer.held()."""
        return self._backend.read(), self._backend.faults()

    def reasons(self) -> set[Reason] | None:
        """Enforcer.reasons(): by the hooks' own counters."""
        before, self._before = self._before, self._counts()
        return {reason for reason, count in self._before.items() if count != before.get(reason, 0)}

    def remove(self, sandbox: Sandbox) -> None:
        """Enforcer.remove()."""
        self._backend.remove()

    def _counts(self) -> dict[Reason, int]:
        return {Reason(number): sum(counts) for number, counts in enumerate(self._backend.state().counters)}


class Iptables:
    """Rules live in a network namespace, so every verb runs in a child that lives in the sandbox."""

    # TCP is rejected with a reset; a datagram that OUTPUT rejects is EPERM for the sender (NF_DROP in
    # nf_hook_slow(), Linux net/netfilter/core.c).
    refusals = frozenset({"ECONNREFUSED", "EPERM"})

    def __init__(self, folder: Path) -> None:
        self._backend = IptablesBackend(state_folder=str(folder))

    def __enter__(self) -> Iptables:
        # What a child finds out ends with it. Asked here it is asked once, and not again for each verb.
        with suppress(GuardError):  # apply() says it
            self._backend._probe(self._backend._programs(), audit=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def sandbox(self) -> Sandbox:
        """Enforcer.sandbox()."""
        return Sandbox(ADDRESSES)

    def apply(self, sandbox: Sandbox, policy: Policy) -> None:
        """Enforcer.apply()."""

        def checked() -> None:
            with reading_once():
                self._backend.check(policy)
                self._backend.apply(policy)

        sandbox.call(checked, timeout_s=PATIENCE_S)

    def held(self, sandbox: Sandbox) -> tuple[Policy | None, list[str]]:
        """Enforcer.held()."""

        def looked() -> tuple[Policy | None, list[str]]:
            with reading_once():
                return self._backend.read(), self._backend.faults()

        return sandbox.call(looked, timeout_s=PATIENCE_S)

    def reasons(self) -> set[Reason] | None:
        """Enforcer.reasons(): a rule has no reason."""
        return None

    def remove(self, sandbox: Sandbox) -> None:
        """Enforcer.remove()."""
        sandbox.call(self._backend.remove, timeout_s=PATIENCE_S)


ENFORCERS: dict[str, Callable[[Path], Enforcer]] = {"ebpf": Ebpf, "iptables": Iptables}
