# SPDX-License-Identifier: Apache-2.0
"""What a packet must leave behind, from decide_packet(), and many packets compared with it."""

from __future__ import annotations

import ctypes
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from random import Random
from socket import SOCK_STREAM
from typing import NamedTuple

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.image import Image
from imds_guard.policy.decide import Reason
from imds_guard.policy.decide_packet import (
    Ends,
    Mark,
    MarkKind,
    PacketDecision,
    PacketReason,
    Socket,
    State,
    decide_packet,
)
from imds_guard.policy.model import Mode, Policy, Protocol
from imds_guard.policy.packet import ETHERTYPE_IPV4, Packet, read_packet
from tests.vm import generate, values
from tests.vm.generate import chance
from tests.vm.machine import ANY_TIME_NS, Controls, Machine
from tests.vm.model import OUTCOME
from tests.vm.packets import LOOPBACK, Maker, PacketCase
from tests.vm.structs import CASE_SOCKETS, EARLIER_BYTES, MARK_BYTES, OutcomeC, PacketC, PacketCaseC, SocketC
from tests.vm.values import Outcome, outcome_of, port_be

CASES = 400
"""For each policy."""

_PACKET, _NUMBERS = struct.Struct("=IIIiI"), struct.Struct("=II4x")
_SOCKET = struct.Struct(f"=II16s16sHH5IQ3IQ4x{MARK_BYTES}s{EARLIER_BYTES}s")
assert [one.size for one in (_PACKET, _SOCKET)] == list(map(ctypes.sizeof, (PacketC, SocketC)))
_CASE_BYTES = ctypes.sizeof(PacketCaseC)
assert _PACKET.size + _NUMBERS.size + CASE_SOCKETS * _SOCKET.size == _CASE_BYTES

_AF_INET, _AF_INET6 = 2, 10
_PROTOCOLS = {Protocol.TCP: abi.TCP, Protocol.UDP: abi.UDP, None: 0}
_STATES = frozenset(State)


def _counted(audited: bool) -> bytes:
    return bytes(2 * Reason.UNAPPROVED_SOCKET + audited) + b"\1"


class EgressModel:
    """A policy as it is in the maps. The image tells which number a lock and its lists have."""

    def __init__(self, policy: Policy, image: Image, serial: int) -> None:
        self._policy, self._serial, self._generation = policy, serial, image.generation
        self._numbers: dict[str | None, int] = {None: abi.NO_LOCK}
        self._lock_of_list: dict[int, str] = {}
        for key, value in image.items[Map.LOCKS]:
            number, (lists, _, raw) = abi.SMALL_KEY.unpack(key)[1], abi.LOCK.unpack(value)
            name = raw.rstrip(b"\0").decode()
            self._numbers[name] = number
            self._lock_of_list[lists] = name

    def decision(self, case: PacketCase) -> tuple[Packet | None, PacketDecision]:
        """What counts of the packet, and what decide_packet() says."""
        packet = read_packet(case.packet.protocol, case.packet.data)
        return packet, decide_packet(self._policy, self._serial, packet, self._ends(case, packet))

    def expected(self, case: PacketCase, packet: Packet | None, decision: PacketDecision) -> bytes:
        """The struct outcome. Before it the counters and the report are empty."""
        mark, earlier = case.sockets[0].mark, case.sockets[0].earlier
        if decision.mark is not None:
            mark = abi.MARK.pack(0, 0, decision.mark.gid, 0, decision.mark.kind, 0)
        stored, as_before = (mark is not None, earlier is not None), (mark or b"", earlier or b"")
        if packet is None or decision.reason is not PacketReason.UNAPPROVED_SOCKET:
            return OUTCOME.pack(1, 0, 0, 0, *stored, 0, b"", b"", b"", b"", *as_before, b"")
        audited = self._policy.mode is Mode.AUDIT
        lock, where = self._numbers[decision.lock], abi.address_bytes(packet.destination)
        port, protocol, uid, now = packet.destination_port, _PROTOCOLS[packet.protocol], case.packet.uid, ANY_TIME_NS
        verdict = abi.VERDICT_AUDITED if audited else abi.VERDICT_DENIED
        # Nothing is known of the task: zeros.
        hook, reason, generation = abi.HOOK_EGRESS, Reason.UNAPPROVED_SOCKET, self._generation
        event = abi.EVENT.pack(
            *(now, 0, 0, 0, 0, uid, 0, 0, port, lock, where, b"", generation, hook, reason, verdict, protocol)
        )
        key = abi.REPORT_KEY.pack(generation, reason, lock, abi.WHO_USER, uid)
        row = abi.REPORT.pack(1, now, now, where, port, protocol, b"")
        told = _counted(audited), event, key, row
        return OUTCOME.pack(int(decision.allowed), 0, 1, 1, *stored, 0, *told, *as_before, b"")

    # --- the sockets ------------------------------------------------------------------------------------------------

    def _ends(self, case: PacketCase, packet: Packet | None) -> Ends:
        sending = None if case.packet.socket is None else self._socket(case.sockets[0])
        by_loopback = case.packet.interface == LOOPBACK
        if packet is None or packet.protocol is not Protocol.TCP or not packet.readable:
            return Ends(sending, by_loopback=by_loopback)
        first, middle, last = (12, 16, 20) if case.packet.protocol == ETHERTYPE_IPV4 else (8, 24, 40)
        source = case.packet.data[first:middle], packet.source_port
        destination = case.packet.data[middle:last], packet.destination_port
        at_source = _found(case.sockets, *source, *destination)
        at_destination = _found(case.sockets, *destination, *source)
        return Ends(
            sending,
            at_source and self._socket(at_source),
            at_destination and self._socket(at_destination),
            by_loopback,
        )

    def _socket(self, one: values.Socket) -> Socket:
        state = State(one.state) if one.state in _STATES else State.ESTABLISHED
        earlier = [self._mark(raw) for raw in _marks(one.earlier or b"")]
        mark = None if one.mark is None else self._mark(one.mark)
        kept = tuple(known for known in earlier if known is not None)
        is_tcp = (one.type, one.protocol) == (SOCK_STREAM, values.IPPROTO_TCP)
        return Socket(state, mark, kept, is_tcp, one.acked, (one.snd_una - one.acked) & 0xFFFFFFFF)

    def _mark(self, raw: bytes) -> Mark | None:
        serial, fsuid, gid, lists, kind, unchecked = abi.MARK.unpack(raw)
        if kind == 0:
            return None  # the socket could not be marked
        known = MarkKind(kind) if kind <= MarkKind.FILTER else MarkKind.OPEN  # of a later version: good for no lock
        return Mark(known, serial, self._lock_of_list.get(lists), fsuid, gid, bool(unchecked))


def _marks(raw: bytes) -> list[bytes]:
    """The places of a struct ig_earlier."""
    return [raw[at : at + abi.MARK.size] for at in range(0, len(raw), abi.MARK.size)]


def _found(
    sockets: Sequence[values.Socket], local: bytes, local_port: int, remote: bytes, remote_port: int
) -> values.Socket | None:
    """The socket that receives a packet from remote to local, as the kernel finds it: connections before listeners."""
    here = [one for one in sockets if one.local_port == local_port and len(one.local) == len(local)]
    for one in here:
        if one.state != State.LISTEN and (one.local, one.remote, one.remote_port) == (local, remote, remote_port):
            return one
    listening = [one for one in here if one.state == State.LISTEN]
    for address in (local, bytes(len(local))):
        for one in listening:
            if one.local == address:
                return one
    return None


# --- many at once ---------------------------------------------------------------------------------------------------


class EgressScene(NamedTuple):
    """A policy as it is in force, and the packets that leave under it."""

    policy: Policy
    generation: int
    serial: int
    cases: tuple[PacketCase, ...]
    other: Policy | None = None
    """The policy of the other generation. It must not matter."""


@dataclass(frozen=True)
class EgressDifference:
    """One packet that was not treated as the model says."""

    scene: EgressScene
    """With the one case."""
    packet: Packet | None
    decision: PacketDecision
    expected: Outcome
    got: Outcome

    def __str__(self) -> str:
        scene, case = self.scene, self.scene.cases[0]
        lines = [f"packet {case.packet.data.hex()}", f"{case.packet}", f"read as {self.packet}", f"{self.decision}"]
        lines += [f"socket {one}" for one in case.sockets]
        lines += [f"generation {scene.generation}, serial {scene.serial}", f"under {scene.policy}"]
        for one in fields(Outcome):
            wanted, got = getattr(self.expected, one.name), getattr(self.got, one.name)
            if one.compare and wanted != got:
                lines.append(f"  {one.name}: expected {wanted}, got {got}")
        if self.expected.record != self.got.record:
            lines.append(f"  record: expected {self.expected.record}, got {self.got.record}")
        return "\n".join(lines)


def egress_scene(seed: int, number: int) -> EgressScene:
    """The scene with this number; the same seed gives the same scenes."""
    r = Random(f"egress {seed} {number}")
    policy = generate.policy(r, strict=chance(r, 0.95))
    serial = r.getrandbits(62) | 1
    maker = Maker(r, policy, serial)
    return EgressScene(
        policy,
        generation=r.choice((1, 2)),
        serial=serial,
        cases=tuple(maker.case() for _ in range(CASES)),
        other=generate.policy(r) if chance(r, 0.3) else None,
    )


def put_in_force(scene: EgressScene, machine: Machine) -> EgressModel:
    """Loads the policies."""
    image = machine.load(scene.policy, scene.generation, scene.serial)
    if scene.other is not None:
        machine.fill_generation(scene.other, 3 - scene.generation, scene.serial + 1)
    return EgressModel(scene.policy, image, scene.serial)


def egress_forms(machine: Machine) -> list[str]:
    """One form for each different program: they need not differ at egress."""
    return list({machine.instructions(form, abi.EGRESS): form for form in machine.forms}.values())


def run(machine: Machine, form: str, cases: Sequence[PacketCase]) -> bytes:
    """A struct outcome for each case."""
    data = b"".join(case.packet.data for case in cases)
    packed, at = [], 0
    for case in cases:
        packed.append(packed_case(case, at))
        at += len(case.packet.data)
    return machine.packets(form, b"".join(packed), data, Controls(time_ns=ANY_TIME_NS))


def packed_case(case: PacketCase, at: int) -> bytes:
    """struct packet_case."""
    packet, sockets = case.packet, case.sockets
    number = -1 if packet.socket is None else packet.socket
    head = _PACKET.pack(port_be(packet.protocol), packet.interface, packet.uid, number, len(packet.data))
    whole = head + _NUMBERS.pack(at, len(sockets)) + b"".join(map(_packed_socket, sockets))
    return whole.ljust(_CASE_BYTES, b"\0")


def _packed_socket(one: values.Socket) -> bytes:
    family = _AF_INET if len(one.local) == 4 else _AF_INET6
    ports = port_be(one.local_port), port_be(one.remote_port)
    stored = one.mark is not None, one.earlier is not None
    kept = one.mark or b"", one.earlier or b""
    tcp = one.type, one.protocol, one.snd_una, one.acked
    filter_mark = one.filter_mark is not None, one.filter_mark or 0
    head = family, one.state, one.local, one.remote, *ports, one.device, one.full
    return _SOCKET.pack(*head, *tcp, *stored, *filter_mark, *kept)


def differences(
    scene: EgressScene, machine: Machine, reasons: Counter[PacketReason] | None = None
) -> Iterator[EgressDifference]:
    """Every packet of the scene that the model does not expect. ``reasons`` counts what was met."""
    model = put_in_force(scene, machine)
    decided = [model.decision(case) for case in scene.cases]
    if reasons is not None:
        reasons.update(decision.reason for _, decision in decided)
    wanted = [model.expected(case, *one) for case, one in zip(scene.cases, decided)]
    for form in egress_forms(machine):
        got = run(machine, form, scene.cases)
        if got == b"".join(wanted):
            continue
        for number, (case, one, expected) in enumerate(zip(scene.cases, decided, wanted)):
            raw = got[number * OUTCOME.size : (number + 1) * OUTCOME.size]
            if raw != expected:
                yield EgressDifference(scene._replace(cases=(case,)), *one, _named(expected), _named(raw))


def _named(raw: bytes) -> Outcome:
    return outcome_of(OutcomeC.from_buffer_copy(raw))
