# SPDX-License-Identifier: Apache-2.0
"""What filters refuse, in watch, report and metrics. The service is not root: what it says is read with bounds."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

import pytest

from imds_guard.commands.filter_refusals import RefusalRow, Refusals, read_refusals
from imds_guard.filter.messages import packed
from imds_guard.kernel import lockfile
from imds_guard.present.refusals import refusal_lines, refusal_values
from imds_guard.watch.event import as_line
from imds_guard.watch.filter_source import FilterSource

UID = 3_999_991
REFUSAL = {
    "filter": "region",
    "uid": UID,
    "method": "GET",
    "path": "/latest/user-data",
    "rule": "no allow rule",
    "status": 403,
    "audited": False,
}
TIME = 1_795_000_000.5


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /run/imds-guard."""
    monkeypatch.setattr(lockfile, "FOLDER", str(tmp_path))
    return tmp_path


@contextmanager
def service(folder: Path, converse: Callable[[socket.socket], object]) -> Iterator[None]:
    """Something that listens where the service does, and talks with one command."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(os.path.join(folder, "filter.sock"))
        server.listen(1)

        def serve() -> None:
            one, _ = server.accept()
            with one:
                one.recv(65536)
                converse(one)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


# --- watch ----------------------------------------------------------------------------------------------------------


def followed(folder: Path, *sent: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of what the service sends, similar ones combined."""
    source = FilterSource()
    with service(folder, lambda one: [one.send(packed(values)) for values in sent]):
        source.check()
    source.drain(0.0)
    found = [source.describe(fold) for fold in source.folding.take_all()]
    source.close()
    return found


def test_similar_refusals_are_one_event(folder: Path) -> None:
    first, last = {**REFUSAL, "time": TIME}, {**REFUSAL, "time": TIME + 2, "left_out": 3}
    other = {**REFUSAL, "time": TIME, "path": "/x", "audited": True}
    one, two = followed(folder, first, last, other)
    assert as_line(one) == (
        "time=2026-11-18T11:06:42.500Z verdict=refused filter=region user=3999991 uid=3999991 method=GET "
        'path=/latest/user-data rule="no allow rule" status=403 count=2 since=2026-11-18T11:06:40.500Z'
    )
    assert (two["event"], two["path"], two["count"]) == ("audited", "/x", 1)


@pytest.mark.parametrize(
    "values", [{}, {**REFUSAL}, {**REFUSAL, "time": "x"}, {**REFUSAL, "time": TIME, "uid": "me"}, {"a": "b" * 1000}]
)
def test_a_malformed_message_ends_following_and_is_no_event(folder: Path, values: dict[str, Any]) -> None:
    assert followed(folder, values) == []


def test_a_text_from_the_service_is_cut_and_escaped(folder: Path) -> None:
    (one,) = followed(folder, {**REFUSAL, "time": TIME, "path": "/\x1b[2J\n" + "a" * 1000})
    line = as_line(one)
    assert (line.isprintable(), len(line) < 600) == (True, True)


def test_without_a_service_there_is_nothing_to_follow(folder: Path) -> None:
    source = FilterSource()
    source.check()
    assert source.fileno() == -1
    source.close()


# --- report ---------------------------------------------------------------------------------------------------------

ROW = RefusalRow("region", UID, "GET", "/a", "deny: /a", 403, False, 3, TIME, TIME + 1)
REFUSALS = Refusals((ROW, ROW._replace(path="/b", times=1200, audited=True)), 7, (("region", "refused", 10),), 2)


def test_the_report_has_the_most_frequent_first() -> None:
    assert refusal_lines(REFUSALS) == [
        "",
        "What filters refused since their service was started:",
        "",
        "  1,200 x region, 3999991: GET /b",
        "      403, deny: /a (audit: it was passed on)",
        "  3 x region, 3999991: GET /a",
        "      403, deny: /a",
        "  7 refusals did not fit.",
    ]
    assert refusal_lines(None) == refusal_lines(Refusals((), 0, (), 0)) == []


def test_refusals_as_values() -> None:
    values = refusal_values(REFUSALS)
    assert values is not None
    assert values[0] == {
        "filter": "region",
        "user": "3999991",
        "uid": UID,
        "method": "GET",
        "path": "/a",
        "rule": "deny: /a",
        "status": 403,
        "audited": False,
        "count": 3,
        "first": "2026-11-18T11:06:40.500Z",
        "last": "2026-11-18T11:06:41.500Z",
    }
    assert refusal_values(None) is None


def test_the_report_of_a_service_is_read(folder: Path) -> None:
    row = {**REFUSAL, "count": 2, "first": TIME, "last": TIME}
    counters = [{"filter": "region", "outcome": "refused", "count": 2}]

    def converse(one: socket.socket) -> None:
        one.send(packed({"rows": 3, "left_out": 0, "counters": counters, "connections": 1}))
        one.send(packed({"rows": [row]}))
        one.send(packed({"rows": [row, row]}))

    with service(folder, converse):
        found = read_refusals()
    assert found is not None
    assert ([one.times for one in found.rows], found.counters, found.connections) == (
        [2, 2, 2],
        (("region", "refused", 2),),
        1,
    )


@pytest.mark.parametrize(
    "answers",
    [
        [],
        [{}],
        [{"rows": 1, "left_out": 0, "counters": [], "connections": 0}],
        [{"rows": 1, "left_out": 0, "counters": [], "connections": 0}, {"rows": []}],
        [{"rows": 1, "left_out": 0, "counters": [], "connections": 0}, {"rows": [5]}],
        [{"rows": "x", "left_out": 0, "counters": [], "connections": 0}],
        [{"rows": 0, "left_out": 0, "counters": 5, "connections": 0}],
    ],
)
def test_a_report_that_makes_no_sense_is_none(folder: Path, answers: list[dict[str, Any]]) -> None:
    with service(folder, lambda one: [one.send(packed(values)) for values in answers]):
        assert read_refusals() is None
