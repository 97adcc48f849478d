# SPDX-License-Identifier: Apache-2.0
"""Sandboxes and policies that rows of the table share: making and applying them costs more than the rows themselves."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Callable

import pytest

from imds_guard.errors import NotPermitted, Unsupported
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.filter_address import Listener
from imds_guard.policy.model import Policy
from imds_guard.text import host_port
from tests.conformance import witness
from tests.conformance.attempts import CONNECTED, FILTERED
from tests.conformance.enforcers import Enforcer
from tests.conformance.model import Case
from tests.conformance.perform import allow_fastopen, perform

EXPECTED_BACKENDS = frozenset(filter(None, os.environ.get("IMDS_GUARD_EXPECT", "").split(",")))
"""Backends that must be able to do every row here: for them, a skip is a failure."""


def by_policy(cases: Iterable[Case]) -> list[list[Case]]:
    """The cases in one list per policy, in the order in which the policies first appear."""
    lists: dict[Policy, list[Case]] = {}
    for case in cases:
        lists.setdefault(case.policy, []).append(case)
    return list(lists.values())


def sorted_by_policy(cases: Iterable[Case]) -> list[Case]:
    """The same cases, those with the same policy one after the other."""
    return [case for same_policy in by_policy(cases) for case in same_policy]


def serve_table(sandbox: Sandbox) -> Sandbox:
    """Starts listeners in the sandbox on every address and port of the table."""
    sandbox.call(allow_fastopen)
    sandbox.serve_with(witness.listen, witness.confirm_forever)
    return sandbox


def apply_or_skip(enforcer: Enforcer, sandbox: Sandbox, policy: Policy, backend_name: str) -> None:
    """Applies the policy. A backend that can't skips the test, unless IMDS_GUARD_EXPECT names it."""
    try:
        enforcer.apply(sandbox, policy)
    except (Unsupported, NotPermitted) as error:
        if backend_name in EXPECTED_BACKENDS:
            raise
        pytest.skip(str(error))


class SharedSandbox:
    """A sandbox with the table's listeners, kept from test to test. After a failed test the next one gets a new one."""

    def __init__(self, make: Callable[[], Sandbox]) -> None:
        self._make = make
        self._stack = ExitStack()
        self._sandbox: Sandbox | None = None

    @contextmanager
    def use(self) -> Iterator[Sandbox]:
        """The sandbox for one test. An exception in the block closes it."""
        try:
            if self._sandbox is None:
                self._sandbox = serve_table(self._stack.enter_context(self._make()))
            yield self._sandbox
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Removes the sandbox, if there is one."""
        self._sandbox = None
        self._stack.close()


class Bench:
    """One backend with a policy in force in a sandbox. Consecutive cases with the same policy share both.

    Another policy gets another sandbox, or the same one with ``one_sandbox``, which is faster.
    """

    def __init__(self, backend_name: str, enforcer: Enforcer, *, one_sandbox: bool = False) -> None:
        self.backend_name = backend_name
        self.enforcer = enforcer
        self._shared = SharedSandbox(enforcer.sandbox)
        self._one_sandbox = one_sandbox
        self._applied: tuple[Sandbox, Policy] | None = None
        self._listeners: dict[str, Listener] = {}
        """By address: the numbers in it depend on the policies before."""
        self._serving: tuple[Sandbox, int] | None = None
        """The process that is the filters of the policy in force."""

    @contextmanager
    def under(self, policy: Policy) -> Iterator[Sandbox]:
        """The sandbox with the policy in force. An exception in the block closes it.

        The policy is read back when it was applied. Without ``one_sandbox`` it is read back after the block, too, where
        judging a connect writes to maps.
        """
        if not self._one_sandbox and self._applied and self._applied[1] != policy:
            self._shared.close()
        with self._shared.use() as sandbox:
            if self._applied != (sandbox, policy):
                self._apply(sandbox, policy)
            yield sandbox
            if self.enforcer.connects_write and not self._one_sandbox:
                self._check_held(sandbox, policy)

    def _apply(self, sandbox: Sandbox, policy: Policy) -> None:
        self._applied = None
        apply_or_skip(self.enforcer, sandbox, policy, self.backend_name)
        self._check_held(sandbox, policy)
        if self._serving is not None and self._serving[0] is sandbox:
            sandbox.end(self._serving[1])
        self._serving = None
        self._listeners = {}
        if policy.filters:
            self._listeners = {str(one.address): one for one in self.enforcer.listeners()}
            self._serving = sandbox, self.enforcer.serve_filters(sandbox)
        self._applied = (sandbox, policy)

    def _check_held(self, sandbox: Sandbox, policy: Policy) -> None:
        held = self.enforcer.held(sandbox)
        if held != (policy, []):
            raise AssertionError(f"{policy} was applied, but the kernel holds {held}")

    def judged(self, sandbox: Sandbox, case: Case) -> str:
        """How the kernel judges the case: ``allowed``, ``denied``, ``filtered by NAME to ADDRESS:PORT``.

        An outcome that is none of these is returned as it is.
        """
        outcome = sandbox.call(lambda: perform(case))
        listener = self._listeners.get(outcome[len(FILTERED) :]) if outcome.startswith(FILTERED) else None
        if listener is not None:
            return f"filtered by {listener.filter} to {host_port(listener.target.address, listener.target.port)}"
        return judged(self.enforcer, outcome)

    def close(self) -> None:
        """Removes the sandbox, if there is one."""
        self._shared.close()


def judged(enforcer: Enforcer, outcome: str) -> str:
    """``allowed``, ``denied``, or the outcome as it is when it is neither."""
    if outcome == CONNECTED:
        return "allowed"
    return "denied" if outcome in enforcer.refusals else outcome


def skip_without(case: Case, lacking: dict[str, str | None]) -> None:
    """Skips the test when this kernel lacks what the case requires."""
    for need in case.requires:
        reason = lacking[need]
        if reason is not None:
            pytest.skip(reason)
