# SPDX-License-Identifier: Apache-2.0
"""How much of the service one user may take."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from typing import NamedTuple


class Limits(NamedTuple):
    """Times in seconds, and numbers."""

    idle_s: float = 60.0
    """Between two requests of a connection."""
    head_s: float = 10.0
    """From the first byte of a request to the end of its head."""
    body_s: float = 10.0
    stalled_s: float = 30.0
    """Without progress while a response is written."""
    connections: int = 8192
    connections_of_a_user: int = 6144
    requests: int = 256
    """That the metadata services answer at the same time."""
    requests_of_a_user: int = 32
    slot_s: float = 10.0
    """How long a request waits for others."""


def limits_for(descriptors: int) -> Limits:
    """The limits where a process may have this many descriptors: accept(2) must not run out of them.

    A quarter is left for listeners and for connections to the metadata services. A user may have three quarters of the
    rest.
    """
    usual = Limits()
    connections = min(usual.connections, descriptors * 3 // 4)
    return usual._replace(
        connections=connections, connections_of_a_user=min(usual.connections_of_a_user, connections * 3 // 4)
    )


class Slots:
    """The requests that are under way. A request waits for a slot; a user's many wait for each other alone."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._all = asyncio.Semaphore(limits.requests)
        self._users: defaultdict[int, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(limits.requests_of_a_user)
        )
        self._waiting: Counter[int] = Counter()

    async def take(self, uid: int) -> bool:
        """Waits for a slot. False when there was none in time."""
        self._waiting[uid] += 1
        own = self._users[uid]
        if not own.locked() and not self._all.locked():  # then acquire() returns at once
            await own.acquire()
            await self._all.acquire()
            return True
        if await _acquired(own, self._limits.slot_s):
            if await _acquired(self._all, self._limits.slot_s):
                return True
            own.release()
        self._leave(uid)
        return False

    def give(self, uid: int) -> None:
        """Frees a slot."""
        self._all.release()
        self._users[uid].release()
        self._leave(uid)

    def _leave(self, uid: int) -> None:
        self._waiting[uid] -= 1
        if not self._waiting[uid]:
            del self._waiting[uid], self._users[uid]


async def _acquired(semaphore: asyncio.Semaphore, within_s: float) -> bool:
    try:
        return await asyncio.wait_for(semaphore.acquire(), within_s)
    except asyncio.TimeoutError:
        return False
