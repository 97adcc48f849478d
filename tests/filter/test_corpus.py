# SPDX-License-Identifier: Apache-2.0
"""Each request of the corpus is refused or handled, and the metadata service receives only what the rules allow."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from imds_guard.policy.filters import FilterRules
from tests.filter.reference import ALLOW, DENY, faults
from tests.filter.stage import Stage, statuses_of

CORPUS = Path(__file__).parent / "corpus" / "requests.txt"
RULES = FilterRules(ALLOW, DENY)


class Case(NamedTuple):
    """A line of the corpus."""

    statuses: list[int]
    name: str
    sent: bytes


def read_corpus() -> list[Case]:
    cases = []
    for line in CORPUS.read_text(encoding="ascii").splitlines():
        if line and not line.startswith("#"):
            expected, name, raw = line.split(" | ", 2) if not line.endswith(" | ") else (*line[:-3].split(" | "), "")
            statuses = [] if expected == "-" else [int(one) for one in expected.split()]
            cases.append(Case(statuses, name, raw.encode().decode("unicode_escape").encode("latin-1")))
    return cases


CASES = read_corpus()


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage(RULES) as one:
        yield one


def test_the_corpus_is_large_and_has_each_name_once() -> None:
    assert len(CASES) >= 150
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_request(stage: Stage, case: Case) -> None:
    """The statuses are as the corpus says, and each 200 is one request that the metadata service has received."""
    before = len(stage.metadata.requests)
    response = stage.ask(case.sent)
    assert statuses_of(response) == case.statuses
    received = stage.metadata.requests[before:]
    assert len(received) == case.statuses.count(200)
    assert faults(received) == []


SHORT = [case for case in CASES if len(case.sent) <= 400]


@pytest.mark.parametrize("case", SHORT, ids=[case.name for case in SHORT])
def test_a_request_byte_by_byte(stage: Stage, case: Case) -> None:
    """Where the bytes are cut on their way makes no difference."""
    before = len(stage.metadata.requests)
    response = stage.run(_slowly(stage, case.sent))
    assert [status for status in statuses_of(response) if status != 100] == case.statuses
    assert faults(stage.metadata.requests[before:]) == []


async def _slowly(stage: Stage, sent: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*stage.address)
    try:
        for at in range(len(sent)):
            writer.write(sent[at : at + 1])
            await asyncio.sleep(0)
        writer.write_eof()
        return await reader.read()
    except OSError:
        return await reader.read()
    finally:
        writer.close()
