# SPDX-License-Identifier: Apache-2.0
"""Lines for readers who are slow, or gone."""

from __future__ import annotations

import json
import os
import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from imds_guard.watch.event import as_json
from imds_guard.watch.output import FULL, MOST_FOLLOWERS, MOST_LINES, Followers, Lead, Outlet


@contextmanager
def pipe() -> Iterator[tuple[int, Outlet]]:
    reader, writer = os.pipe()
    try:
        yield reader, Outlet(writer, as_json)
    finally:
        os.close(reader)
        os.close(writer)


def lines(reader: int) -> list[dict[str, Any]]:
    """What is there, in whole lines."""
    text = b""
    while select.select([reader], [], [], 0)[0]:
        more = os.read(reader, 1 << 16)
        if not more:
            break
        text += more
    assert text.endswith(b"\n")
    return [json.loads(line) for line in text.splitlines()]


def test_lines_go_out_in_order() -> None:
    with pipe() as (reader, outlet):
        for number in range(3):
            outlet.put({"event": "denied", "count": number})
        assert outlet.push()
        assert [line["count"] for line in lines(reader)] == [0, 1, 2]


def test_a_reader_who_does_not_read_is_not_waited_for_and_hears_how_much_it_missed() -> None:
    """Each line here is a denial of two; together they are more than a pipe and the queue hold."""
    with pipe() as (reader, outlet):
        put = 10 * MOST_LINES
        for _ in range(put):
            outlet.put({"event": "denied", "count": 2})
            assert outlet.push()
        outlet.put({"event": "lost", "count": 7})
        seen: list[dict[str, Any]] = []
        while outlet.pending:
            seen += _whole(reader)
            assert outlet.push()
        seen += _whole(reader)
    gaps = [line for line in seen if line["event"] == "gap"]
    assert len(gaps) == 1
    assert sum(line["count"] for line in seen if line["event"] == "denied") + gaps[0]["count"] == 2 * put
    assert gaps[0]["lost"] == 7


_REST: dict[int, bytes] = {}


def _whole(reader: int) -> list[dict[str, Any]]:
    """One read, and the whole lines of it; the rest is kept for the next time."""
    if not select.select([reader], [], [], 0)[0]:
        return []
    *whole, _REST[reader] = (_REST.get(reader, b"") + os.read(reader, 1 << 16)).split(b"\n")
    return [json.loads(line) for line in whole]


def test_a_line_longer_than_a_pipe_takes_at_once_comes_whole() -> None:
    with pipe() as (reader, outlet):
        outlet.put({"event": "denied", "count": 1, "cmdline": "x" * 20_000})
        assert outlet.push()
        assert [len(line["cmdline"]) for line in lines(reader)] == [20_000]


def test_a_reader_who_is_gone_is_noticed() -> None:
    reader, writer = os.pipe()
    outlet = Outlet(writer, as_json)
    os.close(reader)
    outlet.put({"event": "denied", "count": 1})
    assert not outlet.push()
    os.close(writer)


def test_followers_hear_and_are_bounded(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    followers = Followers(path, as_json)
    leads: list[Lead] = []
    try:
        for _ in range(MOST_FOLLOWERS + 1):
            lead = Lead.find(path, wants_allowed=not leads)
            assert lead is not None
            leads.append(lead)
            followers.accept()
        for follower in followers.by_fd.values():
            assert follower.listen()
            follower.outlet.put({"event": "denied", "count": 1})
            assert follower.outlet.push()
        assert [follower.wants_allowed for follower in followers.by_fd.values()].count(True) == 1
        heard = [json.loads(line)["event"] for lead in leads for line in lead.read() or []]
        assert heard == ["denied"] * MOST_FOLLOWERS + [FULL]
    finally:
        followers.close()
        for lead in leads:
            assert lead.read() is None
            lead.close()
    assert not os.path.exists(path)
    assert Lead.find(path, wants_allowed=False) is None


def test_a_follower_who_leaves_is_noticed(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    followers = Followers(path, as_json)
    try:
        lead = Lead.find(path, wants_allowed=False)
        assert lead is not None
        followers.accept()
        ((fd, follower),) = followers.by_fd.items()
        assert follower.listen()
        assert follower.listen()  # it says no more, and is there
        lead.close()
        assert not follower.listen()
        followers.drop(fd)
    finally:
        followers.close()


def test_a_socket_that_a_killed_one_left_is_taken_over(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    assert Lead.find(path, wants_allowed=False) is None
    followers = Followers(path, as_json)
    try:
        assert os.stat(path).st_mode & 0o777 == 0o600
        lead = Lead.find(path, wants_allowed=False)
        assert lead is not None
        lead.close()
    finally:
        followers.close()
