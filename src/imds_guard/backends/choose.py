# SPDX-License-Identifier: Apache-2.0
"""Which backends can enforce a policy on this machine, and which ones enforce one now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from imds_guard.backends import Backend
from imds_guard.errors import GuardError, NotPermitted, Unsupported, UsageError
from imds_guard.policy.model import Policy

AUTO = "auto"
NAMES = ("ebpf", "iptables")
"""In the order in which ``auto`` takes them."""


class BackendCheck(NamedTuple):
    """Whether a backend can enforce a policy here. ``refusal`` is None when it can."""

    backend: Backend
    refusal: GuardError | None


def make(name: str, cgroup: str | None = None, resolve_groups: bool = False) -> Backend:
    """The backend of that name. It is imported here because most commands need one backend only."""
    if name == "ebpf":
        from imds_guard.backends.ebpf import EbpfBackend  # noqa: PLC0415

        return EbpfBackend(cgroup)
    from imds_guard.backends.iptables import IptablesBackend  # noqa: PLC0415

    if cgroup is not None:
        raise UsageError("--cgroup goes with the eBPF backend alone: iptables rules know no cgroup of the caller")
    return IptablesBackend(resolve_groups=resolve_groups)


def candidates(wanted: str, cgroup: str | None) -> Sequence[str]:
    """The backends to try: the one that was asked for, or all that work for ``cgroup``."""
    if wanted != AUTO:
        return (wanted,)
    return ("ebpf",) if cgroup is not None else NAMES


def examine(policy: Policy | None, names: Sequence[str], cgroup: str | None, resolve: bool) -> list[BackendCheck]:
    """Asks each backend whether it can enforce the policy."""
    checks: list[BackendCheck] = []
    for name in names:
        backend = make(name, cgroup, resolve)
        try:
            backend.check(policy)
            checks.append(BackendCheck(backend, None))
        except (Unsupported, NotPermitted) as error:
            checks.append(BackendCheck(backend, error))
    return checks


def refused(checks: Sequence[BackendCheck]) -> GuardError:
    """One error for backends that all refused. NotPermitted only when each of them lacks a permission."""
    reasons = [f"{check.backend.name}: {check.refusal}" for check in checks]
    if all(isinstance(check.refusal, NotPermitted) for check in checks):
        return NotPermitted("; ".join(reasons))
    return Unsupported("no backend works here, so nothing was changed", reasons)


def running(cgroup: str | None, wanted: str = AUTO) -> dict[str, Backend]:
    """The backends that enforce something now, by name. One that is Unsupported here enforces nothing."""
    found: dict[str, Backend] = {}
    for name in candidates(wanted, cgroup):
        backend = make(name, cgroup)
        try:
            if backend.in_force():
                found[name] = backend
        except Unsupported:
            continue
    return found
