# SPDX-License-Identifier: Apache-2.0
"""Property: what a metadata service receives is a request that the rules allow, for any bytes that a caller sends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imds_guard.policy.filters import FilterRules
from tests.filter.reference import ALLOW, DENY, faults
from tests.filter.stage import Stage
from tests.filter.test_corpus import CASES

RULES = FilterRules(ALLOW, DENY)
EXAMPLES = 4  # times those of the profile: an example takes a millisecond


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage(RULES) as one:
        yield one


_PIECES = st.sampled_from(
    (
        *(
            b"GET ",
            b"PUT ",
            b"POST ",
            b"HEAD ",
            b"get ",
            b"/latest/meta-data/",
            b"instance-id",
            b"placement",
            b"iam",
            b"/",
        ),
        *(
            b" HTTP/1.1\r\n",
            b" HTTP/1.0\r\n",
            b"Host: metadata\r\n",
            b"Host: evil\r\n",
            b"\r\n",
            b"\n",
            b"\r",
            b" ",
            b"\t",
        ),
        *(
            b"Content-Length: 0\r\n",
            b"Content-Length: 5\r\n",
            b"Transfer-Encoding: chunked\r\n",
            b"Expect: 100-continue\r\n",
        ),
        *(
            b"0\r\n\r\n",
            b"5\r\nhello\r\n",
            b"hello",
            b"..",
            b"%2e%2e",
            b"%2f",
            b"%252e",
            b";",
            b"\\",
            b"//",
            b"%00",
            b"?",
        ),
        *(
            b"recursive=true",
            b"Connection: close\r\n",
            b"Connection: X-A\r\n",
            b"X-A: b\r\n",
            b" c\r\n",
            b":",
            b"\0",
            b"\xff",
        ),
        *(
            b"/latest/api/token",
            b"/echo",
            b"http://metadata",
            b"X_Forwarded_For: 1\r\n",
            b"Upgrade: h2c\r\n",
            b"#",
            b"*",
        ),
    )
)
_CORPUS = st.sampled_from([case.sent for case in CASES if case.sent])


@st.composite
def _edited(draw: st.DrawFn) -> bytes:
    """A request of the corpus with some bytes replaced, removed or added, and perhaps another one behind it."""
    sent = bytearray(draw(_CORPUS))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(sent)))
        sent[at : at + draw(st.integers(0, 3))] = draw(st.one_of(st.binary(max_size=3), _PIECES))
    return bytes(sent) + draw(st.one_of(st.just(b""), _CORPUS))


_SENT = st.one_of(_edited(), st.lists(_PIECES, max_size=24).map(b"".join), st.binary(max_size=200))


@given(sent=_SENT, cut=st.integers(0, 400))
@settings(max_examples=EXAMPLES * settings().max_examples)
def test_the_metadata_service_receives_only_what_the_rules_allow(stage: Stage, sent: bytes, cut: int) -> None:
    """The bytes come in two pieces. Nothing is left running, and no connection."""
    del stage.metadata.requests[:]
    stage.run(_in_two(stage, sent[:cut], sent[cut:]))
    assert faults(stage.metadata.requests) == []


async def _in_two(stage: Stage, first: bytes, second: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*stage.address)
    try:
        writer.write(first)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        writer.write(second)
        writer.write_eof()
        return await reader.read()
    except OSError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize(
    "planted",
    [
        b"GET /latest/meta-data/placement/../iam/ HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n",
        b"GET /latest/meta-data/placement/%2e%2e/iam HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n",
        b"GET /latest/meta-data/placement%2f..%2fiam HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n",
        b"GET /latest/user-data HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n",
        b"GET /latest/meta-data/instance-id?recursive=true HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\n",
        b"GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: evil\r\n\r\n",
        b"GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: 127.0.0.1:1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: 127.0.0.1:1\r\n\r\nGET /latest/user-data",
        b"?",
    ],
)
def test_the_second_judge_finds_planted_requests(planted: bytes) -> None:
    assert faults([planted]) != []
