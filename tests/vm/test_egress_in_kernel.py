# SPDX-License-Identifier: Apache-2.0
"""The egress hook of a real guard, run by the kernel on random packets, does what decide_packet() says.

BPF_PROG_TEST_RUN sends nothing. It gives the packet a socket without a mark, and the loopback interface. So this
reaches less than test_egress.py does in the machine; it shows that the machine and the kernel agree.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

from imds_guard.backends.ebpf import EbpfBackend
from imds_guard.kernel import bpf
from imds_guard.kernel.cgroup import open_cgroup
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.decide import Reason
from imds_guard.policy.decide_packet import Ends, PacketDecision, PacketReason, Socket, decide_packet
from imds_guard.policy.model import Mode, Policy
from imds_guard.policy.packet import ETHERTYPE_IPV4, ETHERTYPE_IPV6, read_packet
from tests.kernel import guards
from tests.packet_rows import IPV4, IPV6
from tests.vm.egress import egress_scene
from tests.vm.in_kernel import need_bpf, run_packet
from tests.vm.values import Packet

SEED = 17
POLICIES = 8
UNMARKED = Ends(sending=Socket(), by_loopback=True)


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    need_bpf()
    with Sandbox() as made:
        yield made


def egress_program(sandbox: Sandbox) -> int:
    """A descriptor of the egress hook that is attached to the sandbox."""
    with open_cgroup(sandbox.cgroup) as cgroup:
        links = bpf.links_of_cgroup(cgroup.id)
    for fd, _ in links:
        os.close(fd)
    (identity,) = [link.prog_id for _, link in links if link.attach_type == bpf.AttachType.CGROUP_INET_EGRESS]
    program = bpf.program_by_id(identity)
    assert program is not None
    return program


def decision(policy: Policy, packet: Packet) -> PacketDecision:
    """An unmarked socket has no policy's serial number."""
    return decide_packet(policy, 0, read_packet(packet.protocol, packet.data), UNMARKED)


def outcomes(sandbox: Sandbox, packets: Sequence[Packet]) -> list[int | None]:
    """What the hook returns for each packet, in the sandbox's own network namespace."""
    program = egress_program(sandbox)
    try:
        return sandbox.call(lambda: [run_packet(program, one.data, one.protocol) for one in packets])
    finally:
        os.close(program)


def compared(
    sandbox: Sandbox, backend: EbpfBackend, policy: Policy, packets: Sequence[Packet]
) -> Counter[PacketReason]:
    """Fails where the kernel's verdicts or counters are not those of the specification. Returns what was met."""
    before = unapproved(backend)
    pairs = zip(packets, outcomes(sandbox, packets))
    found = [(packet, returned, decision(policy, packet)) for packet, returned in pairs if returned is not None]
    assert [one for one in found if bool(one[1]) != one[2].allowed] == []
    met = Counter(wanted.reason for _, _, wanted in found)
    dropped = met[PacketReason.UNAPPROVED_SOCKET]
    enforced, audited = (now - then for now, then in zip(unapproved(backend), before))
    assert (enforced, audited) == ((0, dropped) if policy.mode is Mode.AUDIT else (dropped, 0))
    return met


def unapproved(backend: EbpfBackend) -> tuple[int, int]:
    """The counter of unapproved sockets: enforced and audited."""
    return dict(zip(Reason, backend.state().counters))[Reason.UNAPPROVED_SOCKET]


def test_the_kernel_does_what_the_specification_says(sandbox: Sandbox) -> None:
    rows = [Packet(data, ETHERTYPE_IPV4) for data, _ in IPV4.values()]
    rows += [Packet(data, ETHERTYPE_IPV6) for data, _ in IPV6.values()]
    backend, met = EbpfBackend(sandbox.cgroup, guards.FAST), Counter[PacketReason]()
    try:
        for number in range(POLICIES):
            scene = egress_scene(SEED, number)
            policy = scene.policy._replace(strict=True)
            backend.apply(policy)
            met += compared(sandbox, backend, policy, [*rows, *(case.packet for case in scene.cases)])
    finally:
        backend.remove()
    assert set(met) >= {PacketReason.UNAPPROVED_SOCKET, PacketReason.LATER_FRAGMENT, PacketReason.RESET}
    assert sum(met.values()) > POLICIES * 300
