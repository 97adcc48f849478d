# SPDX-License-Identifier: Apache-2.0
"""A machine that routes does not forward packets to a locked address.

Three namespaces: a client, a router with our rules, and a server that has the locked addresses.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, TypeVar

import pytest

from imds_guard.backends import Change
from imds_guard.backends.forwarded import Forwarded, forwarding_is_on
from imds_guard.errors import GuardError, Unsupported, UsageError
from imds_guard.kernel.netns import enter
from imds_guard.kernel.run import run
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.model import Mode, Policy, Verdict, make_policy
from tests.kernel.rules_in_a_sandbox import FOO, KINDS, STRANGER, V4, V6, connect, one_legacy_at_a_time, policy_for
from tests.tools import need

T = TypeVar("T")

REFUSED = "ECONNREFUSED"
NOT_DNS = ((0, 52), (54, 65535))


class Routed:
    """The three namespaces. ``router`` has forwarding switched on."""

    def __init__(self, boxes: dict[str, Sandbox], kind: str, folder: str) -> None:
        self.boxes = boxes
        self.kind = kind
        self._folder = folder

    def rules(self) -> Forwarded:
        """The rules for forwarded packets, for use in the router."""
        return Forwarded(KINDS[self.kind], state_folder=self._folder)

    def on_router(self, fn: Callable[[], T]) -> T:
        """What ``fn`` returns in the router."""
        return self.boxes["router"].call(fn, timeout_s=60)

    def enforce(self, policy: Policy, option: str | None = None) -> Change:
        """Forwarded.enforce() in the router."""
        return self.on_router(lambda: self.rules().enforce(policy, option))

    def faults(self, policy: Policy | None) -> list[str]:
        """Forwarded.faults() in the router."""
        return self.on_router(lambda: self.rules().faults(policy))

    def reach(self, to: str, port: int = 80, *, of: str = "client") -> str:
        """The outcome of a connect by a root process of a machine."""
        return self.boxes[of].call(lambda: connect(0, to, port, gid=1))


def _ip(command: str) -> None:
    done = run(["ip", *command.split()])
    assert done.status == 0, f"ip {command}: {done.complaint}"


def _wire(boxes: dict[str, Sandbox]) -> None:
    """client 10.0.1.2 - 10.0.1.1 router 10.0.2.1 - 10.0.2.2 server, and fd00:1:: and fd00:2:: beside them."""
    pids = {name: box.spawn(signal.pause) for name, box in boxes.items()}
    router = boxes["router"]
    for number, peer in ((1, "client"), (2, "server")):
        namespace = boxes[peer].netns_fd
        router.call(lambda: _ip(f"link add to-{peer} type veth peer name eth0"))  # noqa: B023 - called at once
        router.call(lambda: _ip(f"link set eth0 netns {pids[peer]}"))  # noqa: B023
        router.call(lambda: _address(f"to-{peer}", number, 1))  # noqa: B023

        def inside() -> None:
            enter(namespace)  # noqa: B023
            _address("eth0", number, 2)  # noqa: B023
            _ip(f"route add default via 10.0.{number}.1")  # noqa: B023
            _ip(f"-6 route add default via fd00:{number}::1")  # noqa: B023

        boxes[peer].call(inside)

    def forward() -> None:
        for switch in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            Path("/proc/sys/net", switch).write_text("1")
        for address in (V4, V6):
            _ip(f"{'-6 ' if ':' in address else ''}route add {address} via {_server(address)}")

    router.call(forward)


def _server(address: str) -> str:
    return "fd00:2::2" if ":" in address else "10.0.2.2"


def _address(interface: str, number: int, host: int) -> None:
    _ip(f"address add 10.0.{number}.{host}/24 dev {interface}")
    _ip(f"address add fd00:{number}::{host}/64 dev {interface} nodad")
    _ip(f"link set {interface} up")


@pytest.fixture(params=sorted(KINDS))
def routed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Routed]:
    """The three machines, once for each kind of iptables."""
    kind: str = request.param
    if os.geteuid() != 0:
        pytest.skip("making network namespaces needs root")
    need("ip", KINDS[kind][0])
    with one_legacy_at_a_time(kind), Sandbox() as client, Sandbox() as router, Sandbox((V4, V6)) as server:
        boxes = {"client": client, "router": router, "server": server}
        _wire(boxes)
        server.serve((V4, V6), (53, 80))
        yield Routed(boxes, kind, str(tmp_path))


def test_forwarded_packets_are_rejected(routed: Routed) -> None:
    """After enforce() no packets are forwarded to a locked port. DNS at the same address works."""
    policy = policy_for([FOO], tcp=NOT_DNS)
    assert [routed.reach(to) for to in (V4, V6)] == ["connected"] * 2
    routed.enforce(policy)
    assert [routed.reach(to) for to in (V4, V6)] == [REFUSED] * 2
    assert [routed.reach(to, 53) for to in (V4, V6)] == ["connected"] * 2
    assert routed.faults(policy) == []


def test_the_routers_own_packets_are_left_alone(routed: Routed) -> None:
    """The rules are in FORWARD: a process of the router itself is judged by the backend only."""
    routed.enforce(policy_for([FOO]))
    assert [routed.reach(to, of="router") for to in (V4, V6)] == ["connected"] * 2


def test_remove_leaves_nothing(routed: Routed) -> None:
    """remove() removes the rules of both IP versions, and is harmless when there are none."""
    policy = policy_for([FOO])
    routed.enforce(policy)
    routed.on_router(lambda: routed.rules().remove())
    assert [routed.reach(to) for to in (V4, V6)] == ["connected"] * 2
    assert routed.on_router(lambda: routed.rules().in_force()) is False
    assert routed.on_router(lambda: routed.rules().remove()) == Change()
    assert routed.faults(None) == []


def test_rules_without_a_policy_are_a_fault(routed: Routed) -> None:
    """Rules in FORWARD are a fault when no policy is in force."""
    routed.enforce(policy_for([FOO]))
    assert len(routed.faults(None)) == 1


def test_other_peoples_accept_does_not_win(routed: Routed) -> None:
    """An ACCEPT in FORWARD that was there first forwards nothing. One that is inserted before ours later is a fault."""
    policy = policy_for([FOO])
    command = KINDS[routed.kind][0]
    routed.on_router(lambda: run([command, "-A", "FORWARD", "-d", V4, "-j", "ACCEPT"]))
    routed.enforce(policy)
    assert routed.reach(V4) == REFUSED
    routed.on_router(lambda: run([command, "-I", "FORWARD", "-d", V4, "-j", "ACCEPT"]))
    assert any("stand before ours" in line for line in routed.faults(policy))
    routed.enforce(policy)
    assert routed.reach(V4) == REFUSED
    assert routed.faults(policy) == []


def test_a_flush_is_a_fault(routed: Routed) -> None:
    """A flush of FORWARD by someone else is a fault, and change() repairs it."""
    policy = policy_for([FOO])
    routed.enforce(policy)
    routed.on_router(lambda: run([KINDS[routed.kind][1], "-F", "FORWARD"]))
    assert any("reach the locked endpoints" in line for line in routed.faults(policy))
    routed.on_router(lambda: routed.rules().change(policy))
    assert routed.faults(policy) == []
    assert routed.reach(V6) == REFUSED


def test_leave_is_remembered(routed: Routed) -> None:
    """With "leave" packets are forwarded, also after a change of the policy, and that is no fault."""
    policy = policy_for([FOO])
    routed.enforce(policy, "leave")
    routed.on_router(lambda: routed.rules().change(policy_for([STRANGER])))
    assert [routed.reach(to) for to in (V4, V6)] == ["connected"] * 2
    assert routed.faults(policy) == []


def test_audit_forwards_everything(routed: Routed) -> None:
    """In audit mode packets are forwarded."""
    policy = policy_for([FOO], mode=Mode.AUDIT)
    routed.enforce(policy, "drop")
    assert [routed.reach(to) for to in (V4, V6)] == ["connected"] * 2
    assert routed.faults(policy) == []


def test_containers_that_may_connect_are_not_undone(routed: Routed) -> None:
    """With containers = "allow", "drop" is refused, and without an option nothing is dropped."""
    policy = make_policy(policy_for([FOO]).locks, containers=Verdict.ALLOW)

    def refused() -> bool:
        try:
            routed.rules().check(policy, "drop")
        except UsageError:
            return True
        return False

    assert routed.on_router(refused)
    change = routed.enforce(policy)
    assert any("left alone" in line for line in change.done)
    assert routed.reach(V4) == "connected"
    assert routed.faults(policy) == []


def test_without_iptables_a_warning_and_a_fault(routed: Routed, tmp_path: Path) -> None:
    """Where iptables is missing enforce() warns and faults() reports it. An explicit "drop" is refused."""
    rules = Forwarded(("iptables-of-nobody", "ip6tables-of-nobody"), state_folder=str(tmp_path / "none"))
    policy = policy_for([FOO])
    change = routed.on_router(lambda: rules.enforce(policy, None))
    assert any("install the package iptables" in line for line in change.warnings)
    assert any("install the package iptables" in line for line in routed.on_router(lambda: rules.faults(policy)))

    def refused() -> bool:
        try:
            rules.check(policy, "drop")
        except Unsupported:
            return True
        return False

    assert routed.on_router(refused)


def test_forwarding_is_on(routed: Routed) -> None:
    """The router routes. The client does not, and enforce() does nothing there."""
    assert routed.on_router(forwarding_is_on) is True
    assert routed.boxes["client"].call(forwarding_is_on) is False

    def quiet() -> bool:
        rules = routed.rules()
        try:
            return rules.enforce(policy_for([FOO]), None) == Change() and not rules.in_force()
        except GuardError:
            return False

    assert routed.boxes["client"].call(quiet)
