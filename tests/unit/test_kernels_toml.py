# SPDX-License-Identifier: Apache-2.0
"""vagrant/kernels.toml is consistent, and nothing in it is ignored."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any, Callable

import pytest

from vagrant.matrix import suite, support, table
from vagrant.matrix.errors import MatrixError
from vagrant.matrix.kernel import choose

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Document = dict[str, Any]


@pytest.fixture
def document() -> Document:
    """The decoded file, which a test may change."""
    return tomllib.loads(table.PATH.read_text(encoding="utf-8"))


@pytest.fixture
def matrix() -> table.Matrix:
    return table.load()


def test_every_row_says_why(matrix: table.Matrix) -> None:
    """No two rows have the same name or the same values."""
    assert [row.name for row in matrix.rows if not row.why.strip()] == []
    assert len({row.why for row in matrix.rows}) == len(matrix.rows)
    assert len({row.name for row in matrix.rows}) == len(matrix.rows)
    assert len({support.meaning(row) for row in matrix.rows}) == len(matrix.rows)


def test_every_kernel_and_userland_is_used(matrix: table.Matrix) -> None:
    """Nobody would notice that one without a row is broken."""
    assert {row.kernel.series for row in matrix.rows} == set(matrix.kernels)
    assert {row.userland.name for row in matrix.rows} == set(matrix.userlands)


def test_the_matrix_reaches_from_the_oldest_to_the_newest(matrix: table.Matrix) -> None:
    """These combinations have rows."""
    assert {"5.10", "6.1", "6.12", "6.18"} < set(matrix.kernels)
    assert {userland.python for userland in matrix.userlands.values()} == {"3.9", "3.11", "3.13"}
    assert {word for row in matrix.rows for word in row.setup} == table.SETUPS
    cmdlines = {row.cmdline for row in matrix.rows}
    assert {"lockdown=confidentiality", "initcall_blacklist=btf_vmlinux_init"} <= cmdlines


def test_every_expectation_occurs_and_is_missing_somewhere(matrix: table.Matrix) -> None:
    """An expectation of every row, or of none, would show nothing; one row expects neither backend."""
    for word in table.EXPECTATIONS:
        assert {word in row.expect for row in matrix.rows} == {True, False}, word
    assert [row.expectation_text for row in matrix.rows if not row.expect & table.BACKENDS] == ["none"]


def test_no_row_expects_what_its_setup_takes_away(matrix: table.Matrix) -> None:
    """eBPF needs bcc and bpf(2), the fallback iptables, supplementary groups of the fallback the fallback."""
    takes = {"without-bcc": {"ebpf"}, "refuse-bpf": {"ebpf"}, "without-iptables": {"iptables", "groups"}}
    wrong = [row.name for row in matrix.rows for word in row.setup if row.expect & takes.get(word, set())]
    assert wrong == []
    assert [row.name for row in matrix.rows if "groups" in row.expect and "iptables" not in row.expect] == []


def test_a_skip_has_a_reason_that_says_why(matrix: table.Matrix) -> None:
    skips = {skip for row in matrix.rows for skip in row.skips}
    assert [skip.reason for skip in skips if not skip.why.strip() or not skip.kernels] == []


def test_all_rows_together_run_the_whole_table(matrix: table.Matrix) -> None:
    """There are as many shares as rows with a backend, and each row has another one."""
    for backend in table.BACKENDS:
        words = [share.split() for share in suite.shares(matrix.rows).values()]
        taken = [word.partition("=")[2].split("/") for one in words for word in one if word.startswith(backend)]
        assert sorted(int(place) for place, _ in taken) == list(range(len(taken)))
        assert {int(of) for _, of in taken} == {len(taken)}


def test_the_tests_of_a_row_exist(matrix: table.Matrix) -> None:
    words = {word.partition("::")[0] for row in matrix.rows for word in row.tests} - {table.USUAL}
    paths = [word for word in (*words, *suite.USUAL_TESTS)]
    assert [path for path in paths if not (Path(__file__).resolve().parents[2] / path).exists()] == []


def unknown_key(document: Document) -> None:
    document["row"][0]["expects"] = ["ebpf"]


def unknown_expectation(document: Document) -> None:
    document["row"][0]["expect"] = ["epbf"]


def unknown_setup(document: Document) -> None:
    document["row"][0]["setup"] = ["without-everything"]


def unknown_kernel(document: Document) -> None:
    document["row"][0]["kernel"] = "2.6"


def unknown_userland(document: Document) -> None:
    document["row"][0]["userland"] = "debian-1"


def same_name_twice(document: Document) -> None:
    document["row"].append(copy.deepcopy(document["row"][0]))


def no_why(document: Document) -> None:
    del document["row"][0]["why"]


def skip_on_unknown_kernel(document: Document) -> None:
    document["skip"][0]["kernels"] = ["2.6"]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (unknown_key, "unknown key expects"),
        (unknown_expectation, "expect has epbf"),
        (unknown_setup, "setup has without-everything"),
        (unknown_kernel, "kernel = '2.6'"),
        (unknown_userland, "userland = 'debian-1'"),
        (same_name_twice, "there are two rows 5.10-debian-12"),
        (no_why, "'why'"),
        (skip_on_unknown_kernel, "kernels has 2.6"),
    ],
)
def test_a_wrong_file_is_refused(document: Document, spoil: Callable[[Document], None], told: str) -> None:
    """The message names the wrong value; without the change the file is accepted."""
    table.parse(copy.deepcopy(document))
    spoil(document)
    with pytest.raises(MatrixError, match=told.replace("(", r"\(")):
        table.parse(document)


@pytest.mark.parametrize(
    ("names", "series", "release", "packages"),
    [
        # 6.1 is not 6.12, and the tenth ABI is newer than the ninth.
        (
            ["linux-image-6.12.1-9-cloud-amd64", "linux-image-6.1.0-9-cloud-amd64", "linux-image-6.1.0-10-cloud-amd64"],
            "6.1",
            "6.1.0-10-cloud-amd64",
            ["linux-image-6.1.0-10-cloud-amd64"],
        ),
        # From 6.19 on the image package is empty; other flavours do not count.
        (
            [
                "linux-image-7.2.1+deb13-cloud-amd64",
                "linux-binary-7.2.1+deb13-cloud-amd64",
                "linux-modules-7.2.1+deb13-cloud-amd64",
                "linux-base-7.2.1+deb13-cloud-amd64",
                "linux-binary-7.2.9+deb13-amd64",
            ],
            "7.2",
            "7.2.1+deb13-cloud-amd64",
            [
                "linux-binary-7.2.1+deb13-cloud-amd64",
                "linux-modules-7.2.1+deb13-cloud-amd64",
                "linux-base-7.2.1+deb13-cloud-amd64",
            ],
        ),
    ],
)
def test_the_newest_package_of_a_series(names: list[str], series: str, release: str, packages: list[str]) -> None:
    """Versions are compared as numbers, and the series by its first two numbers."""
    assert choose(names, series, "cloud-amd64") == (release, packages)


def test_a_series_that_the_archive_lacks() -> None:
    """The message names it, and no other series is used."""
    with pytest.raises(MatrixError, match=r"no kernel 6\.1 "):
        choose(["linux-image-6.12.1-9-cloud-amd64"], "6.1", "cloud-amd64")
