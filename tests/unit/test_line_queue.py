# SPDX-License-Identifier: Apache-2.0
"""Lines for readers that are slow or gone."""

from __future__ import annotations

import fcntl
import json
import os
import select
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from imds_guard.watch.event import as_json
from imds_guard.watch.line_queue import MAX_LINES, LineQueue

F_SETPIPE_SZ = 1031  # include/uapi/linux/fcntl.h; fcntl.F_SETPIPE_SZ is new in Python 3.10


class Reader:
    """The reading end of a pipe."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._partial_line = b""

    def read_lines(self) -> list[dict[str, Any]]:
        """The complete lines of one read; none when there is nothing to read."""
        if not select.select([self.fd], [], [], 0)[0]:
            return []
        *lines, self._partial_line = (self._partial_line + os.read(self.fd, 1 << 16)).split(b"\n")
        return [json.loads(line) for line in lines]


@contextmanager
def pipe() -> Iterator[tuple[Reader, LineQueue]]:
    reader, writer = os.pipe()
    try:
        yield Reader(reader), LineQueue(writer, as_json)
    finally:
        os.close(reader)
        os.close(writer)


def test_lines_are_written_in_order() -> None:
    with pipe() as (reader, queue):
        for number in range(3):
            queue.put({"event": "denied", "count": number})
        assert queue.push()
        assert [line["count"] for line in reader.read_lines()] == [0, 1, 2]


def test_a_slow_reader_blocks_nobody_and_gets_the_number_of_missed_events() -> None:
    """Each line is an event with a count of 2. Together they do not fit into the pipe and the queue."""
    with pipe() as (reader, queue):
        fcntl.fcntl(queue.fd, F_SETPIPE_SZ, 65536)  # the default is 16 pages, which may be of 64 KiB
        put = 10 * MAX_LINES
        for _ in range(put):
            queue.put({"event": "denied", "count": 2})
            assert queue.push()
        queue.put({"event": "lost", "count": 7})
        seen: list[dict[str, Any]] = []
        while queue.pending:
            seen += reader.read_lines()
            assert queue.push()
        seen += reader.read_lines()
    gaps = [line for line in seen if line["event"] == "gap"]
    assert len(gaps) == 1
    assert sum(line["count"] for line in seen if line["event"] == "denied") + gaps[0]["count"] == 2 * put
    assert gaps[0]["lost"] == 7


def test_a_line_longer_than_one_write_is_complete() -> None:
    with pipe() as (reader, queue):
        queue.put({"event": "denied", "count": 1, "cmdline": "x" * 20_000})
        assert queue.push()
        assert [len(line["cmdline"]) for line in reader.read_lines()] == [20_000]


def test_push_reports_that_the_reader_is_gone() -> None:
    reader, writer = os.pipe()
    queue = LineQueue(writer, as_json)
    os.close(reader)
    queue.put({"event": "denied", "count": 1})
    assert not queue.push()
    os.close(writer)
