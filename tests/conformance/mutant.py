# SPDX-License-Identifier: Apache-2.0
"""Helpers to write mutants: versions of ``decide()`` with one fault that somebody has made or could make.

A mutant gets the whole row, because some faults read the wrong input: the real ID, or the process of a thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Callable

from imds_guard.policy.decide import Caller, Decision, Destination, Source, decide
from imds_guard.policy.model import Endpoint, Identities, Lock, Policy
from tests.conformance.model import (
    Case,
    model_caller,
    model_destination,
    model_filter_listens,
    model_source,
)

Mutant = Callable[[Case], Decision]
REGISTERED: dict[str, Mutant] = {}


def mutant(function: Mutant) -> Mutant:
    """Registers a broken decide() under its name."""
    REGISTERED[function.__name__.replace("_", "-")] = function
    return function


def judge(
    case: Case,
    *,
    policy: Policy | None = None,
    caller: Caller | None = None,
    destination: Destination | None = None,
    source: Source | None = None,
    filter_listens: bool | None = None,
) -> Decision:
    """decide() for the row. Each argument that is given replaces the right one."""
    return decide(
        policy or case.policy,
        caller or model_caller(case),
        destination or model_destination(case),
        source or model_source(case),
        filter_listens=model_filter_listens(case) if filter_listens is None else filter_listens,
    )


def with_locks(policy: Policy, change: Callable[[Lock], Lock]) -> Policy:
    """The policy with each lock changed."""
    return policy._replace(locks=tuple(change(lock) for lock in policy.locks))


def with_ids(policy: Policy, change: Callable[[Identities], Identities]) -> Policy:
    """The policy with each list of IDs changed."""
    return with_locks(policy, lambda lock: lock._replace(allow=change(lock.allow), deny=change(lock.deny)))


def with_endpoints(policy: Policy, change: Callable[[Endpoint], Endpoint]) -> Policy:
    """The policy with each endpoint changed."""
    return with_locks(policy, lambda lock: lock._replace(endpoints=tuple(change(one) for one in lock.endpoints)))


def with_groups(case: Case, groups: Iterable[int]) -> Caller:
    """The caller with other supplementary groups."""
    return model_caller(case)._replace(groups=frozenset(groups))
