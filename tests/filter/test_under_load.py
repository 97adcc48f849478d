# SPDX-License-Identifier: Apache-2.0
"""The service ends, starts and gets other rules while many callers ask: no answer past it, and nobody waits."""

from __future__ import annotations

import errno
import json
import mmap
import os
import socket
import time
from collections import Counter
from contextlib import ExitStack
from functools import partial
from typing import Callable

import pytest

from imds_guard.policy.model import Policy
from tests.filter.scene import (
    BY_USER,
    METADATA,
    POLICY,
    REGION,
    RESET,
    SECRET,
    TIMED_OUT,
    Scene,
    become_caller,
    policy_of,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="guards a namespace of its own")

CALLERS = 50
AT_LEAST, AT_MOST = 5, 150
"""Requests of a caller during one action."""
WITHIN_S = 10.0
"""For a connect, a request and its response."""
OTHER_POLICY = policy_of("GET /**", deny=("/*/meta-data/iam/**",))
"""It has another listener, and refuses SECRET too: whoever gets that has been past the service."""


class Callers:
    """Processes of one user that ask while an action runs. Every second one keeps its connection."""

    def __init__(self, scene: Scene, stack: ExitStack) -> None:
        self._is_over = stack.enter_context(mmap.mmap(-1, 1))
        self._channels = []
        for number in range(CALLERS):
            ours, theirs = (
                stack.enter_context(one) for one in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            )
            ours.settimeout(60)
            scene.sandbox.spawn(self._asking(theirs, keeps_alive=number % 2 == 1))
            self._channels.append(ours)

    def _asking(self, channel: socket.socket, keeps_alive: bool) -> Callable[[], None]:
        def run() -> None:
            become_caller(BY_USER)
            client = _Client(keeps_alive)
            while channel.recv(1):
                channel.send(json.dumps(self._some(client)).encode())

        return run

    def _some(self, client: _Client) -> tuple[dict[str, int], float]:
        seen: Counter[str] = Counter()
        slowest = 0.0
        for number in range(AT_MOST):
            if number >= AT_LEAST and self._is_over[0]:
                break
            path = REGION if number % 4 == 0 else SECRET
            before = time.monotonic()
            seen[f"{'region' if path == REGION else 'secret'} {client.ask(path)}"] += 1
            slowest = max(slowest, time.monotonic() - before)
        return dict(seen), slowest

    def during(self, action: Callable[[], object]) -> tuple[Counter[str], float]:
        """What they got while it ran, and how long the slowest request took."""
        self._is_over[0] = 0
        for channel in self._channels:
            channel.send(b".")
        action()
        self._is_over[0] = 1
        found = [json.loads(channel.recv(10_000)) for channel in self._channels]
        total: Counter[str] = Counter()
        for seen, _ in found:
            total.update(seen)
        return total, max(slowest for _, slowest in found)


class _Client:
    """One caller's connection, which is kept if it is to be."""

    def __init__(self, keeps_alive: bool) -> None:
        self._header = "" if keeps_alive else "Connection: close\r\n"
        self._kept: socket.socket | None = None

    def ask(self, path: str) -> str:
        """The status, RESET, or the errno."""
        one, self._kept = self._kept, None
        try:
            if one is None:
                one = socket.socket()
                one.settimeout(WITHIN_S)
                one.connect((METADATA, 80))
            one.sendall(f"GET {path} HTTP/1.1\r\nHost: {METADATA}\r\n{self._header}\r\n".encode())
            answer = _whole(one)
            if answer and not self._header and b"Connection: close" not in answer:
                self._kept, one = one, None
            return answer.split(b" ")[1].decode() if answer else RESET
        except socket.timeout:
            return TIMED_OUT
        except OSError as error:
            is_reset = error.errno in (errno.EPIPE, errno.ECONNRESET)
            return RESET if is_reset else errno.errorcode[error.errno or 0]
        finally:
            if one is not None:
                one.close()


def _whole(one: socket.socket) -> bytes:
    """A response with its body. What has come when the connection ends."""
    answer = b""
    while part := one.recv(65536):
        answer += part
        head, found, body = answer.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if found and len(body) >= int(length):
            break
    return answer


def actions(scene: Scene) -> list[Callable[[], None]]:
    """From a service that runs to one that runs, and back to the first policy."""

    def kill() -> None:
        scene.kill(scene.service)

    def reload(policy: Policy) -> None:
        scene.change(policy)
        assert scene.reload() == []

    def restart() -> None:
        kill()
        scene.start()

    def restart_under_another_policy() -> None:
        scene.change(OTHER_POLICY)
        kill()
        scene.change(POLICY)
        scene.start()

    reloads = [partial(reload, OTHER_POLICY), partial(reload, POLICY)]
    return [kill, scene.start, *reloads, restart, restart_under_another_policy]


def test_no_caller_gets_past_the_service_and_none_waits(by_each: Scene) -> None:
    """A direct answer would be the only one with status 200 for SECRET."""
    by_each.start()
    total: Counter[str] = Counter()
    with ExitStack() as stack:
        callers = Callers(by_each, stack)
        for number, action in enumerate(2 * actions(by_each)):
            seen, slowest = callers.during(action)
            assert slowest < WITHIN_S, (number, seen)
            total += seen
    denied, reset = f"secret {by_each.denied}", f"secret {RESET}"
    # The listener may go between the look of the hook at it and the arrival of the SYN: ECONNREFUSED by eBPF, too.
    secrets = {key for key in total if key.startswith("secret")}
    assert {"secret 403", denied} <= secrets <= {"secret 403", denied, reset, "secret ECONNREFUSED"}, total
    assert total["region 200"] > 0, total
