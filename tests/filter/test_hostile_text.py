# SPDX-License-Identifier: Apache-2.0
"""Escapes for terminals, from callers and from a metadata service, are in no record, in no log, in no output."""

from __future__ import annotations

import logging
import os
import socket

import pytest

from imds_guard.commands import filter_refusals
from imds_guard.kernel.children import run_in_child
from imds_guard.policy.filters import FilterRules
from imds_guard.present.refusals import refusal_lines, refusal_values
from imds_guard.watch.event import as_line
from imds_guard.watch.filter_source import FilterSource
from tests.filter.scene import BY_USER, METADATA, Scene, become_caller
from tests.filter.stage import Stage

CLEAR, TITLE, BIDI, BELL = b"\x1b[2J\x1b[H", b"\x1b]0;root\x07", "\u202e".encode(), b"\x9b31m\x08\x7f"
HOSTILE = (CLEAR, TITLE, BIDI, BELL, b"\r\nverdict=allowed ")
ENCODED = (b"%1b[2J", b"%1B%5d0;x%07", b"%e2%80%ae", b"%9b31m", b"%0d%0averdict=allowed")


def requests() -> list[bytes]:
    """With each text in each place of a request."""
    shapes = (
        b"GET /latest/%s HTTP/1.1\r\nHost: {host}\r\n\r\n",
        b"GET /latest/meta-data/iam/%s?a=%s HTTP/1.1\r\nHost: {host}\r\n\r\n",
        b"%s /latest/ HTTP/1.1\r\nHost: {host}\r\n\r\n",
        b"GET /latest/ HTTP/1.1%s\r\nHost: {host}\r\n\r\n",
        b"GET /latest/ HTTP/1.1\r\nHost: %s\r\n\r\n",
        b"GET /latest/ HTTP/1.1\r\nHost: {host}\r\nUser-Agent: %s\r\n\r\n",
        b"GET /latest/ HTTP/1.1\r\nHost: {host}\r\nX-%s: a\r\n\r\n",
        b"%s\r\n\r\n",
    )
    texts = (*HOSTILE, *ENCODED)
    return [shape.replace(b"%s", text) for shape in shapes for text in texts]


def responses() -> list[bytes]:
    """With each text in the status line, in the name and the value of a header, in a length and in the body."""
    shapes = (
        b"HTTP/1.1 200 %s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 %s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        b"%s\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX-A: %s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX-%s: a\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: %s\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: %s\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n%s\r\n\r\n",
    )
    return [shape.replace(b"%s", text) for shape in shapes for text in HOSTILE]


def test_the_answers_and_records_of_the_service_are_plain(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those to hostile requests, which are its own."""
    caplog.set_level(logging.DEBUG)
    with Stage(FilterRules(("GET /allowed",))) as stage:
        for request in requests():
            answer = stage.ask(request.replace(b"{host}", stage.host.encode()))
            assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 403 ")), request
            assert _is_plain(answer), request
        texts = _texts(stage.service.records.report())
    assert [text for text in texts if not _is_plain(text.encode())] == []
    assert stage.metadata.requests == []
    assert _logged(caplog, capfd) == ""


def test_a_hostile_response_is_in_no_text_of_the_service(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is passed on is the service's business and the caller's. What the filter itself says of it is plain."""
    caplog.set_level(logging.DEBUG)
    answers = responses()
    refused = 0
    with Stage(FilterRules(("GET /**",)), lambda request: answers[int(request.split(b" ")[1][1:])]) as stage:
        for number in range(len(answers)):
            answer = stage.ask(stage.request(f"GET /{number}"))
            if answer.startswith(b"HTTP/1.1 502 "):
                refused += 1
                assert _is_plain(answer), answers[number]
        texts = _texts(stage.service.records.report())
    assert refused >= len(answers) / 2
    assert [text for text in texts if not _is_plain(text.encode())] == []
    assert _logged(caplog, capfd) == ""


def _is_plain(text: bytes) -> bool:
    """Only printable ASCII, and the ends of lines."""
    return all(0x20 <= byte < 0x7F or byte in b"\r\n" for byte in text)


def _texts(values: object) -> list[str]:
    """Every text in plain values. JSON would show it escaped."""
    if isinstance(values, dict):
        return [text for one in values.values() for text in _texts(one)]
    if isinstance(values, list):
        return [text for one in values for text in _texts(one)]
    return [values] if isinstance(values, str) else []


def _logged(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> str:
    """What a service under systemd would have in its journal. Asyncio's own word on the event loop is no such text."""
    loop = "Using selector"
    lines = [line for line in caplog.text.splitlines() if loop not in line]
    return "".join((*lines, *capfd.readouterr()))


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="guards a namespace of its own")
def test_watch_and_report_print_no_escape(by_ebpf: Scene, capfd: pytest.CaptureFixture[str]) -> None:
    """Of hostile callers of a service that runs as a process of its own."""
    by_ebpf.start()
    printed = by_ebpf.call(_printed)
    assert len(printed) > 20
    for line in printed:
        assert line.isascii(), line
        assert line.isprintable(), line
        assert "verdict=allowed" not in line.split(), line
    assert capfd.readouterr() == ("", "")


def _printed() -> list[str]:
    """The lines of watch and of report, and the JSON of report, after each of these requests."""
    source = FilterSource()
    source.check()
    run_in_child(_ask_all)
    source.drain(0.0)
    lines = [as_line(source.describe(fold)) for fold in source.folding.take_all()]
    source.close()
    refusals = filter_refusals.read_refusals()
    assert refusals is not None
    return [*lines, *refusal_lines(refusals), *_texts(refusal_values(refusals))]


def _ask_all() -> None:
    become_caller(BY_USER)
    for request in requests():
        with socket.create_connection((METADATA, 80), 10) as one:
            one.sendall(request.replace(b"{host}", METADATA.encode()))
            one.shutdown(socket.SHUT_WR)
            while one.recv(65536):
                pass
