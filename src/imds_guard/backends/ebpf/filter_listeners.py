# SPDX-License-Identifier: Apache-2.0
"""What the service of the filters needs of a guard: where it has to listen, and the marks of its listening sockets.

The hooks redirect a caller to 127.169.T.F:169 when the socket that listens there has the right mark (bpf/redirect.h).
"""

from __future__ import annotations

import os
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.filter_records import parse_numbers
from imds_guard.backends.ebpf.pins import PinLocation
from imds_guard.backends.ebpf.reader import MapReader, open_map
from imds_guard.backends.ebpf.state import policy_of, snapshot_in_force
from imds_guard.errors import GuardError, trying
from imds_guard.kernel import bpf
from imds_guard.policy.filter_address import Listener
from imds_guard.policy.filter_numbers import NOTHING, assigned, listeners_of
from imds_guard.policy.model import Policy

_ATTEMPTS = 20


class Wanted(NamedTuple):
    """The policy in force, and what has to listen for it."""

    serial: int
    """Another one after each change of policy."""
    policy: Policy
    listeners: tuple[Listener, ...]
    """In the order of the policy's filters."""


def wanted_listeners(location: PinLocation) -> Wanted | None:
    """What has to listen now. None when no policy is in force. Raises GuardError when the policy can't be read."""
    with trying("reading which filters the policy has", "run imds-guard status"):
        for _ in range(_ATTEMPTS):
            pins = location.pins()
            if pins is None:
                return None
            try:
                with MapReader.open(pins) as maps:
                    before = maps.in_force()
                    found = _wanted(maps, before[1]) if before != (0, 0) else None
                    if maps.in_force() == before:
                        return found
            except FileNotFoundError:
                continue
    raise GuardError("reading which filters the policy has: the policy kept changing; try again")


def listeners_under(policy: Policy, cgroup: str | None) -> list[Listener]:
    """What has to listen for a policy that is in force, or that would be put in force now."""
    if not policy.filters:
        return []
    before = NOTHING
    with trying("reading which filters the policy has", "run imds-guard status"):
        pins = PinLocation.of(cgroup).pins()
        with suppress(FileNotFoundError):  # the guard was removed meanwhile
            if pins is not None:
                with MapReader.open(pins) as maps:
                    before = maps.numbered(maps.generation()) if maps.are_current() else NOTHING
    return listeners_of(policy, assigned(policy, before))


def _wanted(maps: MapReader, serial: int) -> Wanted:
    if not maps.are_current():
        raise GuardError("reading which filters the policy has: its maps are of another version; run imds-guard start")
    snapshot = snapshot_in_force(maps)
    policy, faults = policy_of(snapshot)
    if policy is None or snapshot is None:
        raise GuardError(f"reading which filters the policy has: {'; '.join(faults)}")
    return Wanted(serial, policy, tuple(listeners_of(policy, parse_numbers(snapshot.image, policy.filters))))


class ListenerMarks:
    """Marks listening sockets of this process. It takes CAP_BPF and CAP_NET_ADMIN. Close it."""

    def __init__(self, location: PinLocation) -> None:
        pins = location.pins()
        if pins is None:
            raise GuardError("marking a listener of a filter: no policy is in force; run imds-guard start first")
        with trying("opening the map of the listeners of filters", "run imds-guard status"):
            self._fd = open_map(pins, Map.FILTER_MARKS)

    def mark(self, socket_fd: int, digest: int) -> None:
        """Marks a socket: it serves what ``Listener.digest`` stands for. Call it before listen(2)."""
        with trying("marking a listener of a filter", "callers of this filter stay denied"):
            bpf.map_update(self._fd, abi.ARRAY_KEY.pack(socket_fd), abi.FILTER_MARK.pack(digest))

    def mark_of(self, socket_fd: int) -> int | None:
        """The digest that a socket is marked with. None for one without a mark."""
        record = bpf.map_lookup(self._fd, abi.ARRAY_KEY.pack(socket_fd), abi.FILTER_MARK.size)
        return None if record is None else int(abi.FILTER_MARK.unpack(record)[0])

    def close(self) -> None:
        """Closes the map. The marks stay as long as their sockets."""
        os.close(self._fd)

    def __enter__(self) -> ListenerMarks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
