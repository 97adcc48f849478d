# SPDX-License-Identifier: Apache-2.0
"""What hooks must leave behind while a policy changes: the verdicts under each policy, and when they hold."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

from imds_guard.backends.ebpf.abi import Map
from imds_guard.policy.model import Policy
from tests.vm.map_calls import Operation, Steps
from tests.vm.model import Expected
from tests.vm.structs import OutcomeC
from tests.vm.values import ETH_P_IP, ETH_P_IPV6, IPPROTO_TCP, Attempt, Outcome, Packet, Socket, Task

_SIZE = ctypes.sizeof(OutcomeC)


class Subjects(NamedTuple):
    """Who tries what, and which packets sockets send, in every state of a change."""

    tasks: tuple[Task, ...]
    attempts: tuple[Attempt, ...]
    packets: tuple[tuple[Packet, Socket], ...]
    """Each with the socket that sends it."""


class Verdicts:
    """What each run leaves behind under ``policy``; None: while nothing is in force."""

    def __init__(
        self,
        expected: Sequence[Expected],
        packets: Sequence[Outcome] | None,
        tasks: int,
        policy: Policy | None = None,
        serial: int = 0,
    ) -> None:
        self._expected, self._packets, self._tasks = expected, packets, tasks
        self.policy, self.serial = policy, serial
        self.whole = b"".join(one.raw for one in expected)
        """All attempts by all tasks, as Machine.cross() returns them."""

    def accepts_all(self, raw: bytes) -> bool:
        """Whether Machine.cross() returned what it should."""
        if raw == self.whole:
            return True
        pieces = (raw[at : at + _SIZE] for at in range(0, len(raw), _SIZE))
        return all(one.accepts(piece) for one, piece in zip(self._expected, pieces))

    def accepts(self, attempt: int, task: int, raw: bytes) -> bool:
        """Whether one attempt by one task left behind what it should."""
        return self._expected[attempt * self._tasks + task].accepts(raw)

    def accepts_packet(self, number: int, outcome: Outcome) -> bool:
        """Whether a packet fared as it should. Without any outcomes nobody can say."""
        return self._packets is None or outcome == self._packets[number]


Window = tuple[int, int, Verdicts]
"""From how many operations on, and up to how many, some verdicts may come out."""

EVER = 1 << 31


class Timeline:
    """Which verdicts may come out when: from one change to the next, or in windows that overlap."""

    def __init__(self, begin: Verdicts, *later: tuple[int, Verdicts]) -> None:
        starts = [0, *(start for start, _ in later), EVER]
        verdicts = [begin, *(one for _, one in later)]
        self.windows: list[Window] = list(zip(starts, starts[1:], verdicts))

    @classmethod
    def of(cls, windows: Sequence[Window]) -> Timeline:
        """Windows that may overlap."""
        made = cls(windows[0][2])
        made.windows = list(windows)
        return made

    def between(self, first: int, last: int) -> list[Verdicts]:
        """The verdicts that may come out of what began after ``first`` operations and ended after ``last``."""
        return [one for start, end, one in self.windows if start <= last and end > first]


def flip_of(steps: Steps) -> int:
    """After how many operations another generation is in force. There is one such operation in each change."""
    (flip,) = (
        number
        for number, one in enumerate(steps.operations, 1)
        if isinstance(one, Operation) and one.number is Map.CONFIG
    )
    return flip


def tcp_packet(to: bytes, port: int, sender: bytes) -> Packet:
    """A TCP packet with ACK set. Addresses are packed."""
    ports = (40000).to_bytes(2, "big") + port.to_bytes(2, "big")
    tcp = ports + bytes(8) + bytes((0x50, 0x10)) + bytes(6)
    if len(to) == 4:
        ip = bytes((0x45, 0, 0, 40)) + bytes(4) + bytes((64, IPPROTO_TCP, 0, 0)) + sender + to
        return Packet(ip + tcp, ETH_P_IP)
    return Packet(b"\x60\0\0\0\0\x14" + bytes((IPPROTO_TCP, 64)) + sender + to + tcp, ETH_P_IPV6)
