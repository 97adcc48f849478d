# SPDX-License-Identifier: Apache-2.0
"""Responses, time-outs, limits, records and changed rules of the service."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Callable

import pytest

from imds_guard.filter.limits import Limits, limits_for
from imds_guard.policy.filters import FilterRules
from tests.filter.stage import OK, Stage, status_of, statuses_of

ALL = FilterRules(("GET /**", "PUT /**", "POST /**"))
HASTY = Limits(idle_s=0.2, head_s=0.2, body_s=0.2, stalled_s=0.2, slot_s=0.2)


# --- responses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", b""),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nok", b"2\r\nok\r\n0\r\n\r\n"),
        (b"HTTP/1.0 200 OK\r\nConnection: close\r\n\r\nok", b"2\r\nok\r\n0\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", b"2\r\nok\r\n0\r\n\r\n"),
    ],
)
def test_a_response_is_passed_on_whole(answer: bytes, expected: bytes) -> None:
    with Stage(ALL, lambda request: answer) as stage:
        response = stage.ask(stage.request("GET /a"))
    assert response.partition(b"\r\n\r\n")[2] == expected
    assert status_of(response) == int(answer.split(b"HTTP/1.")[-1].split(b" ")[1])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"nonsense\r\n\r\n", 502),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nConnection: close", 502),
        (b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 300_000 + b"\r\n\r\n", 502),
        (b"HTTP/1.1 101 Switching Protocols\r\nConnection: close\r\nUpgrade: x\r\n\r\n", 502),
        (b"HTTP/1.1 200 OK\r\nX-A: a\0b\r\nConnection: close\r\n\r\n", 502),
    ],
)
def test_a_malformed_response_is_502(answer: bytes, expected: int) -> None:
    with Stage(ALL, lambda request: answer) as stage:
        assert status_of(stage.ask(stage.request("GET /a"))) == expected


def test_headers_about_the_connection_are_not_passed_on() -> None:
    def answer(request: bytes) -> bytes:
        headers = b"X-Mine: 1\r\nKeep-Alive: x\r\nConnection: X-Mine\r\nX-Other: 2\r\nContent-Length: 0"
        return b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n\r\n"

    with Stage(ALL, answer) as stage:
        response = stage.ask(stage.request("GET /a", "X-Request: 3", "Keep-Alive: x", "TE: trailers"))
        (received,) = stage.metadata.requests
    assert (b"X-Mine" in response, b"Keep-Alive" in response, b"X-Other: 2" in response) == (False, False, True)
    assert received.split(b"\r\n")[1:-2] == [b"Host: " + stage.host.encode(), b"X-Request: 3"]


def test_a_response_to_http_1_0_is_not_chunked_and_ends_with_the_connection() -> None:
    with Stage(ALL, lambda request: b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nok") as stage:
        response = stage.ask(stage.request("GET /a").replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert response.partition(b"\r\n\r\n")[2] == b"ok"


def test_a_head_response_has_the_length_and_no_body() -> None:
    with Stage(ALL, lambda request: b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n") as stage:
        response = stage.ask(stage.request("HEAD /a"))
    assert b"Content-Length: 5" in response
    assert response.endswith(b"\r\n\r\n")


def test_a_refusal_of_a_head_request_has_no_body() -> None:
    """What follows the head would be read as the next response of the connection."""
    with Stage(ALL, lambda request: b"nonsense\r\n\r\n") as stage:
        sent = stage.request("HEAD /a").replace(b"Connection: close\r\n", b"")
        response = stage.ask(sent)
    assert status_of(response) == 502
    assert response.endswith(b"\r\n\r\n")


def test_a_chunked_response_is_passed_on_without_a_length() -> None:
    """RFC 9112 section 6.3: Content-Length does not count there. The caller must not read by it."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    with Stage(ALL, lambda request: answer) as stage:
        response = stage.ask(stage.request("GET /a"))
    assert b"Content-Length" not in response
    assert response.endswith(b"\r\n\r\n2\r\nok\r\n0\r\n\r\n")


def test_an_answer_that_drips_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte of a head must not begin the time anew: the slots of a user would be taken for hours."""
    ended = asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while not writer.is_closing():
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                await writer.drain()
                await asyncio.sleep(0.05)
        except OSError:
            pass
        finally:
            writer.close()
            ended.set()

    with Stage(ALL) as stage:
        monkeypatch.setattr(stage.metadata, "_serve", drip)
        monkeypatch.setattr("imds_guard.filter.upstream.Upstream.ask.__defaults__", (0.5,))
        port = stage.run(stage.metadata.start())
        stage.address = stage.serve_in_loop(ALL, port, 2)
        stage.host = f"127.0.0.1:{port}"
        assert status_of(stage.run(stage.exchange(stage.request("GET /a"), half_close=False), 5)) == 502
        stage.run(ended.wait(), 5)


def test_a_response_that_breaks_off_breaks_off() -> None:
    """The caller must not take it for whole."""
    with Stage(ALL, lambda request: b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\nConnection: close\r\n\r\nok") as stage:
        response = stage.ask(stage.request("GET /a"))
    assert not response or response.endswith(b"ok")


def test_a_large_response_is_streamed() -> None:
    """Of 32 MB the service keeps a small part at any time."""
    size = 32 << 20

    def answer(request: bytes) -> bytes:
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size)

    async def read(stage: Stage) -> int:
        reader, writer = await asyncio.open_connection(*stage.address)
        writer.write(stage.request("GET /a"))
        total = 0
        while data := await reader.read(1 << 16):
            total += len(data)
        writer.close()
        return total

    with Stage(ALL, answer) as stage:
        assert stage.run(read(stage)) > size


def test_connections_to_the_service_are_kept_and_used_again() -> None:
    with Stage(ALL) as stage:
        for _ in range(5):
            assert status_of(stage.ask(stage.request("GET /a"))) == 200
        assert stage.metadata.connections == 1


def test_a_kept_connection_that_the_service_has_closed_is_no_error() -> None:
    """The request is sent once more on a new one."""
    with Stage(ALL) as stage:
        assert status_of(stage.ask(stage.request("GET /a"))) == 200
        stage.metadata.answer = lambda request: OK if stage.metadata.connections > 1 else b"Connection: close"
        assert status_of(stage.ask(stage.request("GET /a"))) == 200
        assert stage.metadata.connections == 2


def test_no_service_is_502() -> None:
    with Stage(ALL) as stage:
        stage.metadata.server.close()
        response = stage.ask(stage.request("GET /a"))
    assert status_of(response) == 502
    assert b"the metadata service did not answer" in response


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_refusal_names_the_rule_in_one_line() -> None:
    with Stage(FilterRules(("GET /**",), ("/a/**",))) as stage:
        response = stage.ask(stage.request("GET /a/b"))
    assert response.partition(b"\r\n\r\n")[2] == b"imds-guard: filter 'test' refuses this request (deny: /a/**)\n"


def test_records_have_the_path_and_no_secret() -> None:
    with Stage(FilterRules(("GET /x",))) as stage:
        token = "X-aws-ec2-metadata-token: SECRET"
        stage.ask(stage.request("GET /a?token=SECRET", token))
        stage.ask(stage.request("POST /a?token=SECRET", "Content-Length: 6", body=b"SECRET"))
        stage.ask(stage.request("GET /v2/credentials/SECRET", token))
        stage.ask(stage.request("GET /SECRET%00"))
        stage.ask(b"GET /SECRET\n\n")
        report = stage.service.records.report()
    assert "SECRET" not in str(report)
    assert [(row["method"], row["path"], row["status"]) for row in report["rows"]] == [
        ("GET", "/a", 403),
        ("POST", "/a", 403),
        ("GET", "/v2/credentials/(left out)", 403),
        ("-", "-", 400),
        ("-", "-", 400),
    ]
    assert {row["uid"] for row in report["rows"]} == {os.geteuid()}


def test_audit_passes_on_and_records() -> None:
    """But not what is malformed."""
    with Stage(FilterRules(("GET /x",), audit=True)) as stage:
        assert status_of(stage.ask(stage.request("GET /a"))) == 200
        assert status_of(stage.ask(stage.request("GET /a/../b"))) == 400
        report = stage.service.records.report()
    assert [(row["path"], row["audited"]) for row in report["rows"]] == [("/a", True), ("-", False)]
    assert [(one["outcome"], one["count"]) for one in report["counters"]] == [
        ("audited", 1),
        ("passed", 1),
        ("refused", 1),
    ]


def test_the_table_of_refusals_is_bounded() -> None:
    from imds_guard.filter.records import MAX_ROWS, MAX_ROWS_OF_A_USER, Records, Refusal

    records = Records()
    for number in range(3 * MAX_ROWS_OF_A_USER):
        records.add(Refusal("f", 1001, "GET", f"/{number}", "no allow rule", 403, False))
    assert (len(records.rows), records.left_out) == (MAX_ROWS_OF_A_USER, 2 * MAX_ROWS_OF_A_USER)
    for uid in range(2 * MAX_ROWS):
        records.add(Refusal("f", uid, "GET", "/", "no allow rule", 403, False))
    assert len(records.rows) == MAX_ROWS


# --- time and limits ------------------------------------------------------------------------------------------------


async def _end_of(stage: Stage, sent: bytes) -> bytes:
    """What comes back until the service ends the connection. Nothing more is sent."""
    reader, writer = await asyncio.open_connection(*stage.address)
    try:
        writer.write(sent)
        return await reader.read()
    except OSError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET",
        b"GET /a HTTP/1.1\r\nHost: metadata\r\n",
        b"POST /a HTTP/1.1\r\nHost: metadata\r\nContent-Length: 9\r\n\r\n",
    ],
)
def test_a_caller_that_does_not_go_on_loses_its_connection(sent: bytes) -> None:
    with Stage(ALL, limits=HASTY) as stage:
        assert stage.run(_end_of(stage, sent), 5) == b""
        assert stage.service.connections == {}


def test_a_caller_that_sends_a_byte_now_and_then_loses_its_connection() -> None:
    """The time is for the head as a whole."""

    async def dribble(stage: Stage) -> int:
        reader, writer = await asyncio.open_connection(*stage.address)
        sent = 0
        try:
            for byte in b"GET /" + b"a" * 1000:
                writer.write(bytes((byte,)))
                await writer.drain()
                sent += 1
                await asyncio.wait_for(reader.read(1), 0.05) if reader.at_eof() else await asyncio.sleep(0.02)
                if writer.transport.is_closing():
                    break
        except OSError:
            pass
        writer.close()
        return sent

    with Stage(ALL, limits=HASTY) as stage:
        assert stage.run(dribble(stage)) < 100


def test_a_caller_that_does_not_read_loses_its_connection() -> None:
    big = b"HTTP/1.1 200 OK\r\nContent-Length: 33554432\r\n\r\n" + bytes(32 << 20)

    async def stall(stage: Stage) -> None:
        client = socket.create_connection(stage.address)
        client.sendall(stage.request("GET /a"))
        while stage.service.connections or not stage.metadata.requests:
            await asyncio.sleep(0.05)
        client.close()

    with Stage(ALL, lambda request: big, HASTY) as stage:
        stage.run(stall(stage), 10)


def test_a_user_has_only_so_many_connections() -> None:
    async def many(stage: Stage) -> int:
        opened = [await asyncio.open_connection(*stage.address) for _ in range(8)]
        ended = await asyncio.gather(*(_ended(reader) for reader, _ in opened))
        for _, writer in opened:
            writer.close()
        return sum(ended)

    async def _ended(reader: asyncio.StreamReader) -> bool:
        try:
            return await asyncio.wait_for(reader.read(1), 0.5) == b""
        except asyncio.TimeoutError:
            return False
        except OSError:
            return True

    with Stage(ALL, limits=Limits(connections_of_a_user=5)) as stage:
        assert stage.run(many(stage)) == 3


@pytest.mark.parametrize(
    ("descriptors", "expected"), [(16384, (8192, 6144)), (10_000_000, (8192, 6144)), (1024, (768, 576))]
)
def test_connections_never_take_all_descriptors(descriptors: int, expected: tuple[int, int]) -> None:
    limits = limits_for(descriptors)
    assert (limits.connections, limits.connections_of_a_user) == expected


def test_requests_beyond_the_limit_wait_and_then_are_503() -> None:
    async def several(stage: Stage) -> list[int]:
        answers = await asyncio.gather(*(stage.exchange(stage.request("GET /a"), half_close=False) for _ in range(3)))
        return sorted(map(status_of, answers))

    def slowly(request: bytes) -> bytes:
        return b""

    with Stage(ALL, slowly, HASTY._replace(requests_of_a_user=1)) as stage:

        async def run() -> list[int]:
            asking = asyncio.ensure_future(stage.exchange(stage.request("GET /first"), half_close=False))
            while not stage.metadata.requests:
                await asyncio.sleep(0.01)
            stage.metadata.answer = lambda request: OK
            found = await several(stage)
            asking.cancel()
            return found

        assert stage.run(run()) == [503, 503, 503]


@pytest.mark.parametrize("more", [b"", b"GET"])
def test_a_caller_that_waits_for_a_change_and_goes_frees_its_slot(more: bytes) -> None:
    """Also one that has sent the beginning of another request."""
    with Stage(ALL, lambda request: b"", Limits(requests_of_a_user=1)) as stage:

        async def run() -> None:
            _, writer = await asyncio.open_connection(*stage.address)
            writer.write(stage.request("GET /a?wait_for_change=true"))
            while not stage.metadata.requests:
                await asyncio.sleep(0.01)
            stage.metadata.answer = lambda request: OK
            writer.write(more)
            await asyncio.sleep(0.05)
            writer.close()
            assert status_of(await stage.exchange(stage.request("GET /b"))) == 200

        stage.run(run(), 5)


def test_what_waits_for_a_change_gets_the_answer_and_goes_on() -> None:
    with Stage(ALL) as stage:
        sent = stage.request("GET /a?wait_for_change=true").replace(b"Connection: close\r\n", b"")
        answers = stage.run(stage.exchange(sent + stage.request("GET /b"), half_close=False))
    assert statuses_of(answers) == [200, 200]


# --- changed rules --------------------------------------------------------------------------------------------------


def test_rules_are_those_of_the_listener_and_a_closed_one_ends_its_connections() -> None:
    """A connection at rest is closed; one with a request under way ends after the response."""
    with Stage(ALL) as stage:
        port = int(stage.host.rpartition(":")[2])
        other = stage.serve_in_loop(FilterRules(("GET /b",)), port, digest=2)

        async def run() -> tuple[bytes, list[int]]:
            at_rest = await asyncio.open_connection(*stage.address)
            at_rest[1].write(stage.request("GET /a").replace(b"Connection: close\r\n", b""))
            await at_rest[0].readuntil(b"ok")
            stage.metadata.answer = lambda request: b""
            busy = asyncio.ensure_future(stage.exchange(stage.request("GET /a"), half_close=False))
            while len(stage.metadata.requests) < 2:
                await asyncio.sleep(0.01)
            stage.service.keep_only([("127.169.1.1", 2)])
            rest = await at_rest[0].read()
            at_rest[1].close()
            await asyncio.sleep(0.05)
            assert not busy.done()
            busy.cancel()
            stage.metadata.answer = lambda request: OK
            stage.address = other
            answers = [await stage.exchange(stage.request(line)) for line in ("GET /a", "GET /b")]
            return rest, list(map(status_of, answers))

        assert stage.run(run()) == (b"", [403, 200])


def test_five_thousand_idle_connections_cost_less_than_100_mb() -> None:
    """Of the service and of the test's own ends together. Measured in a child, whose memory begins small."""
    from imds_guard.kernel.children import run_in_child

    number = 5000
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * number + 200:
        pytest.skip(f"only {hard} descriptors are allowed here (RLIMIT_NOFILE)")

    def measure() -> tuple[int, int, int]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        with Stage(ALL) as stage:

            async def run() -> tuple[int, int, int]:
                assert status_of(await stage.exchange(stage.request("GET /a"))) == 200
                before = _resident_kb()
                clients = []
                for _ in range(number):
                    one = socket.socket()
                    one.setblocking(False)
                    one.connect_ex(stage.address)
                    clients.append(one)
                    if len(clients) % 100 == 0:
                        await asyncio.sleep(0.01)
                while sum(stage.service.connections.values()) < number:
                    await asyncio.sleep(0.01)
                after = _resident_kb()
                assert status_of(await stage.exchange(stage.request("GET /a"))) == 200
                for one in clients:
                    one.close()
                return before, after, number

            return stage.run(run(), 60)

    before, after, _ = run_in_child(measure, timeout_s=90)
    assert (after - before) / 1024 < 100, f"{before} KiB before, {after} KiB after"


def _resident_kb() -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.partition("VmRSS:")[2].split()[0])


@pytest.mark.skipif(os.geteuid() != 0, reason="gives sockets to other users")
def test_at_the_maximum_whoever_has_most_connections_loses_one() -> None:
    """A user who takes all of them keeps nobody out."""

    def connect(stage: Stage, uid: int) -> socket.socket:
        one = socket.socket()
        os.fchown(one.fileno(), uid, 0)  # the owner that sock_diag(7) tells
        one.setblocking(False)
        one.connect_ex(stage.address)
        return one

    async def run(stage: Stage) -> tuple[dict[int, int], int]:
        greedy = [connect(stage, 41_001) for _ in range(6)]
        await _until(lambda: stage.service.connections[41_001] == 6)
        others = [connect(stage, uid) for uid in (41_002, 41_003, 41_001)]
        await _until(lambda: stage.service.connections[41_003] == 1)
        await _until(lambda: stage.service.connections[41_001] == 4)
        found = dict(stage.service.connections)
        closed = [record for record in stage.service.records.report()["counters"] if record["outcome"] == "closed"]
        for one in (*greedy, *others):
            one.close()
        return found, closed[0]["count"]

    with Stage(ALL, limits=Limits(connections=6, connections_of_a_user=6)) as stage:
        assert stage.run(run(stage)) == ({41_001: 4, 41_002: 1, 41_003: 1}, 1)


async def _until(is_true: Callable[[], bool]) -> None:
    while not is_true():
        await asyncio.sleep(0.01)
