# SPDX-License-Identifier: Apache-2.0
"""Each cell of cells.toml: without a lock every caller connects, and under each backend it sees what the file says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tomllib

from vagrant.guest import world
from vagrant.guest.containers.modes import MODES
from vagrant.guest.containers.scene import ACCOUNTS, IPV4, Watch, client, lock, run, until, words

RUNTIMES = os.environ["IMDS_GUARD_RUNTIMES"].split()
USERLAND = "debian-13" if os.environ["IMDS_GUARD_BCC"] == "0.31" else "debian-12"
RESULTS = Path(os.environ.get("IMDS_GUARD_RESULTS", "/results"))
LINGER_S = 3
"""How long a container stays after its connects under eBPF. watch finds no name for a cgroup that is gone."""
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
    yield from _recorded("cells.json")


@pytest.fixture(scope="session")
def named() -> Iterator[dict[str, list[str]]]:
    """The name and the cgroup of the containers that watch has seen, which is among the results, too."""
    yield from _recorded("names.json")


def _recorded(name: str) -> Iterator[dict[str, list[str]]]:
    found: dict[str, list[str]] = {}
    yield found
    (RESULTS / name).write_text(json.dumps(found, indent=1), encoding="ascii")


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


def name_of(cell: Cell) -> str:
    """What watch calls the container in this guest, as a regular expression."""
    nameless = set(cell.get("nameless", ())) & set(os.environ["IMDS_GUARD_SETUP"].split())
    return "None" if nameless else str(cell.get("name", "None"))


@contextmanager
def policy_of(cell: Cell, backend: str) -> Iterator[None]:
    """The policy of a cell, in place of the usual one."""
    if "containers" not in cell:
        yield
        return
    lock(backend, "--containers", cell["containers"])
    try:
        yield
    finally:
        lock(backend)


@EACH_CELL
def test_without_a_lock_everybody_connects(cell: Cell, request: pytest.FixtureRequest) -> None:
    """Otherwise a denial would show nothing."""
    assert attempts(cell, request) == ["-" if word == "-" else "connected" for word in cell["ebpf"]]


@EACH_CELL
def test_cell(
    backend: str,
    cell: Cell,
    request: pytest.FixtureRequest,
    seen: dict[str, list[str]],
    named: dict[str, list[str]],
    watch: Watch | None,
) -> None:
    """The callers see what the cell says, and watch names the container of each that the hook denies."""
    place = f"{cell['runtime']}/{cell['mode']}"
    before = len(watch) if watch is not None else 0
    with policy_of(cell, backend):
        outcomes = attempts(cell, request, LINGER_S if watch is not None else 0)
    seen[f"{backend}/{place}"] = outcomes
    assert outcomes == cell[backend]
    if watch is not None:
        until(lambda: len(watch.denied(before)) >= outcomes.count("EPERM"), "a line of watch for each denial")
        denied = watch.denied(before)
        named[place] = sorted({f"{one['container']} {one['cgroup']}" for one in denied})
        assert [one for one in denied if not re.fullmatch(name_of(cell), str(one["container"]))] == []


if "docker" in RUNTIMES:  # no other runtime is asked, so that no guest skips it

    @pytest.mark.parametrize(("options", "forwarded"), [((), "rejected"), (("--network=host",), None)])
    def test_explain_knows_the_container_of_a_process(
        backend: str, docker: None, options: tuple[str, ...], forwarded: str | None
    ) -> None:
        """By its cgroup; and it says that packets are forwarded and rejected, unless the network is the machine's."""
        container = run("docker", "run", "--detach", *options, "client", "/bin/sleep", "3600").stdout.strip()
        try:
            pid = run("docker", "inspect", "--format={{.State.Pid}}", container).stdout.strip()
            explained = json.loads(world.command("explain", "--pid", pid, IPV4, "--json").stdout)
        finally:
            run("docker", "rm", "--force", container)
        assert (explained["container"], explained["forwarded"]) == (f"docker:{container[:12]}", forwarded)
        assert explained["reason"] == "container"
