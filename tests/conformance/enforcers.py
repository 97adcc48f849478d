# SPDX-License-Identifier: Apache-2.0
"""One interface to all backends, which enforce in one sandbox after the other."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Callable, Protocol, TypeVar

from imds_guard.backends.ebpf import EbpfBackend
from imds_guard.backends.ebpf.filter_listeners import ListenerMarks, wanted_listeners
from imds_guard.backends.ebpf.pins import PinLocation
from imds_guard.backends.ebpf.program import Defines
from imds_guard.backends.iptables import IptablesBackend
from imds_guard.backends.iptables.tables import reading_once
from imds_guard.errors import GuardError
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.decide import Reason
from imds_guard.policy.filter_address import Listener
from imds_guard.policy.model import Policy
from tests.conformance import witness
from tests.conformance.families import ADDRESSES

T = TypeVar("T")

TIMEOUT_S = 300.0
"""With a long policy iptables takes seconds on an emulated processor, and minutes when its host is busy."""


class Enforcer(Protocol):
    """A backend and the place where it enforces. A context manager."""

    refusals: frozenset[str]
    """The errnos that a denied connect may get."""

    connects_write: bool
    """Whether judging a connect writes to maps beside those that hold the policy."""

    def __enter__(self) -> Enforcer: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def sandbox(self) -> Sandbox:
        """A new network namespace and cgroup in which the backend will enforce."""

    def apply(self, sandbox: Sandbox, policy: Policy) -> None:
        """Checks the policy and puts it in force. Raises Unsupported or NotPermitted."""

    def held(self, sandbox: Sandbox) -> tuple[Policy | None, list[str]]:
        """The policy that the kernel holds, and the faults that the backend reports."""

    def reasons(self) -> set[Reason] | None:
        """Why connects were judged as they were since the last call or apply(). None where nothing counts reasons."""

    def listeners(self) -> Sequence[Listener]:
        """What has to listen for the filters of the policy in force."""

    def serve_filters(self, sandbox: Sandbox) -> int:
        """Forks a child that is the filters of the policy in force; returns its process ID."""

    def remove(self, sandbox: Sandbox) -> None:
        """Removes the guard. Nothing happens if there is none."""


class Ebpf:
    """The programs stay attached to a cgroup above all sandboxes. Only the policy changes, as in real use."""

    refusals = frozenset({"EPERM"})
    connects_write = True
    defines: Defines = ()
    guarded: str | None = None
    """The cgroup that the programs are attached to. None: the root."""

    def __init__(self, folder: Path) -> None:
        self._above = Sandbox()
        self._before: dict[Reason, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Ebpf:
        self._stack.enter_context(self._above)
        self.guarded = self._above.cgroup
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
        """Enforcer.reasons(): from the counters of the hooks."""
        before, self._before = self._before, self._counts()
        return {reason for reason, count in self._before.items() if count != before.get(reason, 0)}

    def listeners(self) -> Sequence[Listener]:
        """Enforcer.listeners()."""
        found = wanted_listeners(PinLocation.of(self.guarded))
        return () if found is None else found.listeners

    def serve_filters(self, sandbox: Sandbox) -> int:
        """Enforcer.serve_filters()."""
        location, wanted = PinLocation.of(self.guarded), self.listeners()

        def listen() -> list[socket.socket]:
            with ListenerMarks(location) as marks:
                return witness.listen_as_filters(wanted, marks.mark)

        return sandbox.serve_with(listen, witness.greet_forever)

    def remove(self, sandbox: Sandbox) -> None:
        """Enforcer.remove()."""
        self._backend.remove()

    def _counts(self) -> dict[Reason, int]:
        return {Reason(number): sum(counts) for number, counts in enumerate(self._backend.state().counters)}


class Iptables:
    """Rules belong to a network namespace, so every method runs in a child of the sandbox."""

    # TCP is rejected with a reset. The sender of a datagram that OUTPUT rejects gets EPERM (NF_DROP in nf_hook_slow(),
    # Linux net/netfilter/core.c).
    refusals = frozenset({"ECONNREFUSED", "EPERM"})
    connects_write = False

    def __init__(self, folder: Path) -> None:
        self._backend = IptablesBackend(state_folder=str(folder))
        self._listeners: Sequence[Listener] = ()

    def __enter__(self) -> Iptables:
        # The backend keeps the answer. Asked only in children, which end, it would be asked again for every method.
        with suppress(GuardError):  # apply() will raise the same
            self._backend._probe(self._backend.default_programs(), audit=False)
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

        def check_and_apply() -> Sequence[Listener]:
            with reading_once():
                self._backend.check(policy)
                self._backend.apply(policy)
                found = self._backend.wanted()
                return () if found is None else found[1]

        self._listeners = sandbox.call(check_and_apply, timeout_s=TIMEOUT_S)

    def held(self, sandbox: Sandbox) -> tuple[Policy | None, list[str]]:
        """Enforcer.held()."""

        def look() -> tuple[Policy | None, list[str]]:
            with reading_once():
                return self._backend.read(), self._backend.faults()

        return sandbox.call(look, timeout_s=TIMEOUT_S)

    def reasons(self) -> set[Reason] | None:
        """Enforcer.reasons(): rules don't count reasons."""
        return None

    def listeners(self) -> Sequence[Listener]:
        """Enforcer.listeners()."""
        return self._listeners

    def serve_filters(self, sandbox: Sandbox) -> int:
        """Enforcer.serve_filters(). No mark tells one listener from another."""
        wanted = self._listeners
        return sandbox.serve_with(lambda: witness.listen_as_filters(wanted, None), witness.greet_forever)

    def remove(self, sandbox: Sandbox) -> None:
        """Enforcer.remove()."""
        sandbox.call(self._backend.remove, timeout_s=TIMEOUT_S)


ENFORCERS: dict[str, Callable[[Path], Enforcer]] = {"ebpf": Ebpf, "iptables": Iptables}
