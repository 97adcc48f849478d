# SPDX-License-Identifier: Apache-2.0
"""The service: it listens for callers that the guard leads here, and counts their connections."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Iterable

from imds_guard.filter.connection import Connection, Rules, Services, finish_all
from imds_guard.filter.limits import Limits, Slots
from imds_guard.filter.place import Place
from imds_guard.filter.records import Records
from imds_guard.filter.request_head import MAX_HEAD_BYTES
from imds_guard.kernel.arrival import arrival_interface
from imds_guard.kernel.netns import LOOPBACK_INDEX
from imds_guard.kernel.sock_diag import SockDiag
from imds_guard.policy.filters import Target

_ACCEPTED_AT_ONCE = 64


class _Listening:
    def __init__(self, place: Place, listener: socket.socket) -> None:
        self.place = place
        self.socket = listener
        self.rules = Rules(place.filter, place.target, place.rules)


class Service:
    """Serves places, from serve() to close(). Make it in a running event loop."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.records = Records()
        self._services = Services(self.limits, self.records, Slots(self.limits))
        self._listening: dict[tuple[str, int], _Listening] = {}
        self._connections: dict[int, set[Connection]] = {}
        self._number: Counter[int] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sock_diag = SockDiag()

    @property
    def places(self) -> list[Place]:
        """Where it listens."""
        return [one.place for one in self._listening.values()]

    @property
    def connections(self) -> Counter[int]:
        """The number of open connections of each user."""
        return +self._number

    def serve(self, place: Place, listener: socket.socket) -> None:
        """Serves a place by a socket that listens there. Raises BadPolicy for rules that are none."""
        listener.setblocking(False)
        one = _Listening(place, listener)
        self._listening[(place.address, place.digest)] = one
        asyncio.get_running_loop().add_reader(listener.fileno(), self._accept, one)

    def keep_only(self, wanted: Iterable[tuple[str, int]]) -> None:
        """Closes the listeners whose address and digest are not among these; their connections end, each at rest."""
        for key in set(self._listening) - set(wanted):
            one = self._listening.pop(key)
            asyncio.get_running_loop().remove_reader(one.socket.fileno())
            one.socket.close()
            one.rules.is_closed = True
            finish_all([other for found in self._connections.values() for other in found], one.rules)
            one.rules.upstream.close()

    async def close(self) -> None:
        """Closes all listeners and connections."""
        self.keep_only(())
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- new connections ---

    def _accept(self, one: _Listening) -> None:
        """Accepts at once, also what is closed then: the queue of a listener is shared by all of its callers."""
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                accepted, _ = one.socket.accept()
            except OSError:  # nobody is left in the queue, or the caller has gone
                return
            uid = self._caller(accepted, one.place.target)
            if uid is None or not self._has_room(uid):
                self.records.count(one.place.filter, "closed")
                accepted.close()
                continue
            self._number[uid] += 1
            task = asyncio.get_running_loop().create_task(self._serve(accepted, uid, one.rules))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _caller(self, accepted: socket.socket, target: Target) -> int | None:
        """The user at the other end. None for a peer on the network (route_localnet), and for one that has closed.

        The hooks of eBPF change the address of the caller's socket, DNAT only that of its packets.
        """
        try:
            if arrival_interface(accepted) != LOOPBACK_INDEX:
                return None
            # A response is written in parts: none must wait until the one before it is acknowledged.
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer = accepted.getpeername()
            found = self._sock_diag.find_tcp(peer, accepted.getsockname())
            if found is None and target.address.version == 4:
                found = self._sock_diag.find_tcp(peer, (str(target.address), target.port))
        except OSError:
            return None
        return None if found is None else found.uid

    def _has_room(self, uid: int) -> bool:
        """False when the user has all that it may have. At the maximum of all, whoever has most loses a connection."""
        if self._number[uid] >= self.limits.connections_of_a_user:
            return False
        if len(self._tasks) < self.limits.connections:
            return True
        biggest, number = self._number.most_common(1)[0]
        others = [other for other in self._connections.get(biggest, ()) if not other.is_aborted]
        if biggest == uid or number <= self._number[uid] + 1 or not others:
            return False
        next((other for other in others if other.is_idle), others[0]).abort()
        return True

    async def _serve(self, accepted: socket.socket, uid: int, rules: Rules) -> None:
        try:
            await self._serve_one(accepted, uid, rules)
        finally:
            self._number[uid] -= 1
            if not self._number[uid]:
                del self._number[uid]

    async def _serve_one(self, accepted: socket.socket, uid: int, rules: Rules) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=MAX_HEAD_BYTES, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        try:
            transport, _ = await loop.connect_accepted_socket(lambda: protocol, accepted)
        except OSError:
            accepted.close()
            return
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        connection = Connection(uid, rules, (reader, writer), self._services)
        mine = self._connections.setdefault(uid, set())
        mine.add(connection)
        try:
            await connection.serve()
        finally:
            mine.discard(connection)
            if not mine:
                self._connections.pop(uid, None)
