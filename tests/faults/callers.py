# SPDX-License-Identifier: Apache-2.0
"""Processes that wait in a sandbox and connect on request, to see which users are allowed at one moment."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Sequence
from types import TracebackType

from imds_guard.kernel.credentials import become
from imds_guard.kernel.sandbox import Sandbox

_GROUP = 62_001
_TIMEOUT_S = 60.0

Place = tuple[str, int]


class Callers:
    """One process per user ID. A context manager. The processes end with it, or with their sandbox."""

    def __init__(self, sandbox: Sandbox, users: Sequence[int], places: Sequence[Place]) -> None:
        self._sandbox = sandbox
        self._users = tuple(users)
        self._places = tuple(places)
        self._pipes: dict[int, tuple[int, int]] = {}

    def __enter__(self) -> Callers:
        for user in self._users:
            question, asks = os.pipe()
            answers, answer = os.pipe()
            self._sandbox.spawn(lambda u=user, q=question, a=answer: _wait_and_connect(u, self._places, q, a))  # type: ignore[misc]
            os.close(question)
            os.close(answer)
            self._pipes[user] = (asks, answers)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes.values():
            for fd in pipe:
                os.close(fd)

    def passing(self) -> tuple[frozenset[int], ...]:
        """For each place, the users whose connect succeeds."""
        for asks, _ in self._pipes.values():
            os.write(asks, b"?")
        outcomes = {user: self._answer(answers) for user, (_, answers) in self._pipes.items()}
        assert all("?" not in seen for seen in outcomes.values()), outcomes
        return tuple(
            frozenset(user for user, seen in outcomes.items() if seen[at] == "+") for at in range(len(self._places))
        )

    def _answer(self, answers: int) -> str:
        seen = b""
        while len(seen) < len(self._places):
            assert select.select([answers], [], [], _TIMEOUT_S)[0], "a caller has no answer"
            more = os.read(answers, len(self._places) - len(seen))
            assert more, "a caller is gone"
            seen += more
        return seen.decode()


def _wait_and_connect(user: int, places: Sequence[Place], question: int, answer: int) -> None:
    become((user,) * 3, (_GROUP,) * 3, ())
    while os.read(question, 1):
        for place in places:
            os.write(answer, _connect(place))


def _connect(place: Place) -> bytes:
    """``+`` for connected, ``-`` for denied (EPERM by eBPF, ECONNREFUSED by iptables), ``?`` for any other error."""
    with socket.socket(socket.AF_INET6 if ":" in place[0] else socket.AF_INET) as one:
        one.settimeout(10)
        try:
            one.connect(place)
        except (PermissionError, ConnectionRefusedError):
            return b"-"
        except OSError:
            return b"?"
        return b"+"
