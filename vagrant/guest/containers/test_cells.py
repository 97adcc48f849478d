# SPDX-License-Identifier: Apache-2.0
"""Each cell of cells.toml: without a lock every caller connects, and under each backend it sees what the file says."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomllib

from vagrant.guest.containers.modes import MODES
from vagrant.guest.containers.scene import ACCOUNTS, client, words

RUNTIMES = os.environ["IMDS_GUARD_RUNTIMES"].split()
USERLAND = "debian-13" if os.environ["IMDS_GUARD_BCC"] == "0.31" else "debian-12"
RESULTS = Path(os.environ.get("IMDS_GUARD_RESULTS", "/results"))
Cell = dict[str, Any]


def cells() -> list[Cell]:
    """The cells of this guest's runtimes that exist in its userland."""
    document = tomllib.loads(Path(__file__).with_name("cells.toml").read_text(encoding="utf-8"))
    return [
        cell
        for cell in document["cell"]
        if cell["runtime"] in RUNTIMES and USERLAND in cell.get("userlands", [USERLAND])
    ]


EACH_CELL = pytest.mark.parametrize(
    "cell", cells(), ids=lambda cell: f"{cell['runtime']} {cell['mode']}".replace(" ", "_")
)


@pytest.fixture(scope="session")
def seen() -> Iterator[dict[str, list[str]]]:
    """What was seen in each cell, which is among the results of the guest."""
    found: dict[str, list[str]] = {}
    yield found
    (RESULTS / "cells.json").write_text(json.dumps(found, indent=1), encoding="ascii")


def attempts(cell: Cell, request: pytest.FixtureRequest, linger_s: int = 0) -> list[str]:
    """The outcome for each caller, in the order of ACCOUNTS; "-" for one that can't be there."""
    made = MODES[cell["runtime"], cell["mode"]]
    request.getfixturevalue(made.fixture)
    users = [name for name, word in zip(ACCOUNTS, cell["ebpf"]) if word != "-"]
    if made.alone:
        output = "".join(made.act(client(user, to=made.to, linger_s=linger_s)) for user in users)
    else:
        output = made.act(client(*users, to=made.to, linger_s=linger_s))
    outcomes = dict(zip(users, words(output)))
    return [outcomes.get(name, "-") for name in ACCOUNTS]


@EACH_CELL
def test_without_a_lock_everybody_connects(cell: Cell, request: pytest.FixtureRequest) -> None:
    """Otherwise a denial would show nothing."""
    assert attempts(cell, request) == ["-" if word == "-" else "connected" for word in cell["ebpf"]]


@EACH_CELL
def test_cell(backend: str, cell: Cell, request: pytest.FixtureRequest, seen: dict[str, list[str]]) -> None:
    """The callers see what the cell says."""
    outcomes = attempts(cell, request)
    seen[f"{backend}/{cell['runtime']}/{cell['mode']}"] = outcomes
    assert outcomes == cell[backend]
