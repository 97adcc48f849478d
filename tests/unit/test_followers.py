# SPDX-License-Identifier: Apache-2.0
"""The socket between a leader and its followers."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imds_guard.watch.event import as_json
from imds_guard.watch.followers import MAX_FOLLOWERS, TOO_MANY, Followers, LeaderConnection


@contextmanager
def listening(path: str) -> Iterator[Followers]:
    followers = Followers(path, as_json)
    try:
        yield followers
    finally:
        followers.close()


def connect(path: str, wants_allowed: bool = False) -> LeaderConnection:
    connection = LeaderConnection.open(path, wants_allowed)
    assert connection is not None
    return connection


def test_followers_get_events_and_their_number_is_bounded(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    connections: list[LeaderConnection] = []
    with listening(path) as followers:
        for _ in range(MAX_FOLLOWERS + 1):
            connections.append(connect(path, wants_allowed=not connections))
            followers.accept()
        for follower in followers.by_fd.values():
            assert follower.receive()
            follower.queue.put({"event": "denied", "count": 1})
            assert follower.queue.push()
        assert [follower.wants_allowed for follower in followers.by_fd.values()].count(True) == 1
        events = [json.loads(line)["event"] for connection in connections for line in connection.read_lines() or []]
        assert events == ["denied"] * MAX_FOLLOWERS + [TOO_MANY]
    for connection in connections:
        assert connection.read_lines() is None
        connection.close()
    assert not os.path.exists(path)
    assert LeaderConnection.open(path, wants_allowed=False) is None


def test_receive_reports_that_a_follower_is_gone(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    with listening(path) as followers:
        connection = connect(path)
        followers.accept()
        ((fd, follower),) = followers.by_fd.items()
        assert follower.receive()
        assert follower.receive()  # connected, and nothing more to read
        connection.close()
        assert not follower.receive()
        followers.drop(fd)


def test_the_socket_of_a_killed_leader_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    assert LeaderConnection.open(path, wants_allowed=False) is None
    with listening(path):
        assert os.stat(path).st_mode & 0o777 == 0o600
        connect(path).close()
