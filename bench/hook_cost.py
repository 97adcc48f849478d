# SPDX-License-Identifier: Apache-2.0
"""Measures the cost of a connect in the hook, and of a packet under a strict policy, relative to an empty program.

Run as root from the top of the tree: /usr/bin/python3 -m bench.hook_cost. The kernel counts runs and run time of each
program while BPF_ENABLE_STATS is on (bpf(2)). Rounds alternate between the empty program and the guard, and the median
round counts, since single rounds are unreliable on a busy machine.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import statistics
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "src")]

from imds_guard.backends.ebpf import EbpfBackend, abi
from imds_guard.kernel import bpf
from imds_guard.kernel.cgroup import open_cgroup
from imds_guard.kernel.credentials import become
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.model import Endpoint, Identities, Lock, Policy, make_policy
from imds_guard.policy.ports import normal_ports

LOCKED, OPEN = "169.254.169.254", "169.254.169.253"
USER, OTHER_USER, GID, GROUP = 61_001, 61_002, 62_001, 62_099
ROUNDS, CONNECTS, WARM_UP = 9, 3000, 1000


@dataclass(frozen=True)
class Case:
    """A caller and an address under a policy. ``maximum`` is the budget, in multiples of an empty program's cost."""

    name: str
    policy: Policy
    address: str
    uid: int
    groups: tuple[int, ...]
    maximum: float
    hook: str = "connect4"


def _policy(addresses: Sequence[str], users: Sequence[int] = (), groups: Sequence[int] = ()) -> Policy:
    web = normal_ports([(80, 80)])
    endpoints = tuple(Endpoint(ipaddress.ip_network(address), web, web) for address in addresses)
    return make_policy([Lock("bench", endpoints, Identities(frozenset(users), frozenset(groups)))])


def _many(count: int) -> list[str]:
    first = int(ipaddress.IPv4Address("10.0.0.0"))
    return [str(ipaddress.IPv4Address(first + 7 * n)) for n in range(count)]


def cases() -> list[Case]:
    """All cases, with their budgets."""
    many = range(10**6, 10**6 + 99_999)
    strict = _policy([LOCKED], [USER])._replace(strict=True)
    sixteen = (*range(62_100, 62_115), GROUP)
    return [
        Case("not locked, 1 lock", _policy([LOCKED], [USER]), OPEN, OTHER_USER, (), 1.5),
        Case("not locked, 10,000 locked addresses", _policy([LOCKED, *_many(9999)], [USER]), OPEN, OTHER_USER, (), 1.5),
        Case("allowed user, 1 allowed", _policy([LOCKED], [USER]), LOCKED, USER, (), 5),
        Case("allowed user, 100,000 allowed", _policy([LOCKED], [USER, *many]), LOCKED, USER, (), 5),
        Case("member, one of 16 groups", _policy([LOCKED], groups=[GROUP]), LOCKED, USER, sixteen, 7),
        Case("denied and recorded, 16 groups", _policy([LOCKED], groups=[GROUP]), LOCKED, USER, sixteen[:-1], 16),
        Case("strict: connect of an allowed user", strict, LOCKED, USER, (), 16),
        Case("strict: packet, not locked", strict, OPEN, USER, (), 2, abi.EGRESS),
        Case("strict: packet of an approved socket", strict, LOCKED, USER, (), 8, abi.EGRESS),
    ]


def _connects(address: str, uid: int, groups: tuple[int, ...]) -> Callable[[], None]:
    """A function that connects without waiting for an answer. Nobody listens; only the hook is measured."""

    def run() -> None:
        become(uids=(uid,) * 3, gids=(GID,) * 3, groups=groups)
        reset = struct.pack("ii", 1, 0)
        for _ in range(WARM_UP + CONNECTS):
            with socket.socket() as one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                one.setblocking(False)
                one.connect_ex((address, 80))

    return run


def _packets(address: str, uid: int, groups: tuple[int, ...]) -> Callable[[], None]:
    """A function that sends datagrams from a connected socket to one that never reads."""

    def run() -> None:
        with socket.socket(type=socket.SOCK_DGRAM) as receiver, socket.socket(type=socket.SOCK_DGRAM) as sender:
            receiver.bind((address, 80))
            become(uids=(uid,) * 3, gids=(GID,) * 3, groups=groups)
            sender.connect((address, 80))
            for _ in range(WARM_UP + CONNECTS):
                sender.send(b"x")

    return run


def _count(prog_id: int) -> tuple[int, int]:
    fd = bpf.program_by_id(prog_id)
    assert fd is not None
    try:
        found = bpf.describe_program(fd)
    finally:
        os.close(fd)
    return found.run_time_ns, found.run_count


def _cost(sandbox: Sandbox, prog_id: int, connects: Callable[[], None]) -> float:
    """Nanoseconds per run of the program."""
    before = _count(prog_id)
    sandbox.call(connects, timeout_s=120)
    after = _count(prog_id)
    return (after[0] - before[0]) / (after[1] - before[1])


def measure(case: Case) -> tuple[float, float]:
    """Median nanoseconds per run of the guard's program at a hook, and of an empty program at the same hook."""
    with Sandbox((LOCKED, OPEN)) as guarded, Sandbox((LOCKED, OPEN)) as bare:
        backend = EbpfBackend(guarded.cgroup)
        backend.apply(case.policy)
        ours = next(hook.ours for hook in backend.state().hooks if hook.name == case.hook)
        assert ours is not None
        empty, link = _attach_empty(bare, case.hook)
        try:
            work = _packets if case.hook == abi.EGRESS else _connects
            connects = work(case.address, case.uid, case.groups)
            rounds = [(_cost(guarded, ours.id, connects), _cost(bare, empty, connects)) for _ in range(ROUNDS)]
        finally:
            os.close(link)
            backend.remove()
    return statistics.median(r[0] for r in rounds), statistics.median(r[1] for r in rounds)


def _attach_empty(sandbox: Sandbox, hook: str) -> tuple[int, int]:
    """Attaches a program that does nothing. Returns its ID and the descriptor of its link."""
    kind = abi.HOOKS[hook].attach_type
    nothing = struct.pack("=BBhi", 0xB7, 0, 0, 1) + struct.pack("=BBhi", 0x95, 0, 0, 0)  # r0 = 1; exit
    program = bpf.prog_load(nothing, "ig_bench_empty", kind)
    with open_cgroup(sandbox.cgroup) as cgroup:
        link = bpf.link_create(program, cgroup.fd, kind)
    identity = bpf.describe_program(program).id
    os.close(program)
    return identity, link


def main() -> int:
    """Prints one line per case. Returns 1 when one is above its budget."""
    if os.geteuid() != 0:
        print("bench: run this as root", file=sys.stderr)
        return 77
    over = False
    statistics_fd = bpf.enable_run_statistics()
    try:
        print(f"{'case':40} {'guard':>8} {'empty':>8} {'ratio':>6}  budget")
        for case in cases():
            guard, empty = measure(case)
            ratio = guard / empty
            over = over or ratio > case.maximum
            print(f"{case.name:40} {guard:5.0f} ns {empty:5.0f} ns {ratio:6.2f}  {case.maximum:g}", flush=True)
    finally:
        os.close(statistics_fd)
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
