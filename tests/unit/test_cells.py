# SPDX-License-Identifier: Apache-2.0
"""The cells of the container-runtime suite: data, code and rows belong together, and the table hides nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vagrant.guest.containers.modes import MODES
from vagrant.guest.containers.scene import words
from vagrant.matrix import cells, table
from vagrant.matrix.errors import MatrixError

CELLS = cells.load()
ROWS = table.load().containers


def test_each_cell_has_a_mode_and_each_mode_a_cell() -> None:
    assert [(one.runtime, one.mode) for one in CELLS] == list(dict.fromkeys((one.runtime, one.mode) for one in CELLS))
    assert {(one.runtime, one.mode) for one in CELLS} == set(MODES)


def test_each_runtime_has_a_row_on_both_releases_and_with_hybrid_cgroups() -> None:
    """Three rows are among the default ones, and together they try every runtime."""
    runtimes = {one.runtime for one in CELLS}
    rows = [row for row in ROWS if row.runtimes]
    for chosen in (
        [row for row in rows if row.default],
        [row for row in rows if row.userland.suite == "bookworm" and "hybrid-cgroups" not in row.setup],
        [row for row in rows if "hybrid-cgroups" in row.setup],
    ):
        assert {runtime for row in chosen for runtime in row.runtimes} == runtimes
        assert len(chosen) == 3


def test_the_hook_lets_nobody_in_a_container_through() -> None:
    """Where an allowed ID connects under eBPF, the caller has the PIDs, users and network of the machine.

    Or the policy allows containers.
    """
    through = {(one.runtime, one.mode) for one in CELLS if "connected" in one.expected["ebpf"]}
    through = {(runtime, mode) for runtime, mode in through if not mode.endswith("containers allowed")}
    assert through == {("docker", "host network and PIDs"), ("systemd", "plain"), ("systemd", "DynamicUser=")}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('runtime = "a"\nmode = "b"\nebpf = ["EPERM"]\niptables = ["-", "-", "-"]\nwhy = "c"', "ebpf = ['EPERM']"),
        ('runtime = "a"\nmode = "b"\nebpf = ["-", "-", "no"]\niptables = ["-", "-", "-"]\nwhy = "c"', "cell a/b: ebpf"),
        ('runtime = "a"\nmode = "b"\nebpf = ["-", "-", "-"]\niptables = ["-", "-", "-"]', "missing keys ['why']"),
        ('runtime = "a"\nmode = "b"\nwhen = "c"', "unknown keys ['when']"),
    ],
)
def test_a_wrong_cell_is_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "cells.toml"
    path.write_text(f"[[cell]]\n{text}\n", encoding="ascii")
    with pytest.raises(MatrixError, match=re.escape(told)):
        cells.load(path)


def line_of(seen: str) -> list[str]:
    """The cells of the table's line for docker's default mode, where one row saw these words under eBPF."""
    (row,) = (row for row in ROWS if row.default and "docker" in row.runtimes)
    found = {"ebpf/docker/default": seen, "iptables/docker/default": "ECONNREFUSED ECONNREFUSED ECONNREFUSED"}
    lines = cells.table(table.load(), {row.name: {"cells": found}}).splitlines()
    return next(line for line in lines if line.startswith("| docker | default |")).strip("| ").split(" | ")


def test_the_table_shows_what_was_seen() -> None:
    assert line_of("EPERM EPERM EPERM")[2:] == [*["EPERM"] * 3, *["ECONNREFUSED"] * 3, "Debian 13"]


def test_the_table_does_not_hide_another_outcome() -> None:
    assert line_of("EPERM connected EPERM")[3] == "connected, EXPECTED EPERM"


def test_a_cell_that_no_guest_has_seen_is_not_run() -> None:
    lines = cells.table(table.load(), {}).splitlines()[2:]
    assert {line.strip("| ").split(" | ")[-1] for line in lines} == {"not run"}


def test_words_of_a_client() -> None:
    """The messages of busybox's nc, IPv4 and IPv6."""
    said = [
        "metadata",
        "nc: can't connect to remote host (169.254.169.254): Operation not permitted",
        "nc: can't connect to remote host: Connection refused",
        "nc: timed out",
        "something else",
    ]
    assert words("\n".join(said)) == ["connected", "EPERM", "ECONNREFUSED", "ETIMEDOUT", "something else"]
