# SPDX-License-Identifier: Apache-2.0
"""What status makes of the descriptions of the backends, and how the results of two changes are joined."""

from __future__ import annotations

import ipaddress
from typing import cast

import pytest

from imds_guard.backends import Backend, Change, Description, choose
from imds_guard.commands import look
from imds_guard.policy.model import Endpoint, Identities, Lock, Policy, make_policy
from imds_guard.policy.ports import ALL_PORTS


class Holder:
    """A backend that holds a policy and has a fault."""

    def __init__(self, name: str, policy: Policy) -> None:
        self.name = name
        self._policy = policy

    def describe(self) -> Description:
        """Backend.describe()."""
        return Description(self._policy, (f"a fault of {self.name}",))


def policy_for(user: int) -> Policy:
    endpoint = Endpoint(ipaddress.ip_network("192.0.2.1"), ALL_PORTS)
    return make_policy([Lock("web", (endpoint,), Identities(frozenset({user})))])


@pytest.mark.parametrize("names", [("ebpf",), ("ebpf", "iptables")])
def test_two_backends_in_force_are_a_fault(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is shown, with the faults of both. A command that was killed can leave two."""
    active = {name: cast(Backend, Holder(name, policy_for(number))) for number, name in enumerate(names)}
    monkeypatch.setattr(choose, "running", lambda cgroup: active)
    found = look.status("/sys/fs/cgroup/x")
    both = ["ebpf and iptables are both in force: a change was interrupted, run imds-guard start"]
    assert (found.backend, found.policy) == ("ebpf", policy_for(0))
    assert found.faults == [f"a fault of {name}" for name in names] + (both if len(names) == 2 else [])


def test_a_change_and_a_later_one_have_the_sentences_of_both() -> None:
    one, later = Change(("a",), ("warning a",)), Change(("b",), ("warning b",))
    assert one.then(later) == Change(("a", "b"), ("warning a", "warning b"))
    assert [bool(change) for change in (Change(), Change(("a",)), Change(warnings=("a",)))] == [False, True, True]
