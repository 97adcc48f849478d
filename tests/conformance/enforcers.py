# SPDX-License-Identifier: Apache-2.0
"""Every backend under the same few verbs, put to work for one sandbox."""

from __future__ import annotations

from typing import Callable, Dict, FrozenSet, List, Optional, TypeVar

from imds_guard.backends import Backend
from imds_guard.errors import NotPermitted, Unsupported
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy import Policy

T = TypeVar("T")


class Enforcer:
    """One backend at work for one sandbox: in this process, or in children that live in the sandbox."""

    def __init__(self, backend: Backend, sandbox: Sandbox, *, inside: bool, refusals: FrozenSet[str]) -> None:
        self._backend = backend
        self._sandbox = sandbox
        self._inside = inside
        self.refusals = refusals
        """The errnos that a denied connect may end with."""

    def apply(self, policy: Policy) -> None:
        """Checks and puts the policy in force. Raises Unsupported."""

        def checked() -> None:
            self._backend.check(policy)
            self._backend.apply(policy)

        self._run(checked)

    def read(self) -> Optional[Policy]:
        """The policy that the kernel holds."""
        return self._run(self._backend.read)

    def faults(self) -> List[str]:
        """What the backend says is wrong."""
        return self._run(self._backend.faults)

    def remove(self) -> None:
        """Takes it all away."""
        self._run(self._backend.remove)

    def _run(self, verb: Callable[[], T]) -> T:
        if not self._inside:
            return verb()
        result, refusal = self._sandbox.call(lambda: _caught(verb), timeout_s=60)
        if refusal is not None:
            raise Unsupported(refusal)
        return result  # type: ignore[return-value]


def _caught(verb: Callable[[], T]) -> "tuple[Optional[T], Optional[str]]":
    """A child hands back text alone, so what is told apart by its kind is caught in there."""
    try:
        return verb(), None
    except (Unsupported, NotPermitted) as error:
        return None, str(error)


def _ebpf(sandbox: Sandbox, folder: str) -> Enforcer:
    from imds_guard.backends.ebpf import EbpfBackend

    return Enforcer(EbpfBackend(sandbox.cgroup), sandbox, inside=False, refusals=frozenset({"EPERM"}))


def _iptables(sandbox: Sandbox, folder: str) -> Enforcer:
    from imds_guard.backends.iptables import IptablesBackend

    # TCP is rejected with a reset; a datagram that OUTPUT rejects is EPERM for the sender (NF_DROP in
    # nf_hook_slow(), Linux net/netfilter/core.c).
    backend = IptablesBackend(state_folder=folder)
    return Enforcer(backend, sandbox, inside=True, refusals=frozenset({"ECONNREFUSED", "EPERM"}))


ENFORCERS: Dict[str, Callable[[Sandbox, str], Enforcer]] = {"ebpf": _ebpf, "iptables": _iptables}
