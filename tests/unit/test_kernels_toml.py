# SPDX-License-Identifier: Apache-2.0
"""vagrant/kernels.toml is consistent, and nothing in it is ignored."""

from __future__ import annotations

import copy
import itertools
import sys
import tarfile
from pathlib import Path
from typing import Any, Callable

import pytest

from vagrant.matrix import archive, guest, initramfs, suite, support, table
from vagrant.matrix.architecture import ARCHITECTURES, Architecture, native
from vagrant.matrix.errors import MatrixError
from vagrant.matrix.kernel import KernelFiles, choose

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
    rows = matrix.all_rows
    assert [row.name for row in rows if not row.why.strip()] == []
    assert len({row.why for row in rows}) == len(rows)
    assert len({row.name for row in rows}) == len(rows)
    assert len({support.meaning(row) for row in rows}) == len(rows)


def test_every_kernel_and_userland_is_used(matrix: table.Matrix) -> None:
    """Nobody would notice that one without a row is broken."""
    assert {row.kernel for row in matrix.rows} == set(matrix.kernels.values())
    assert {row.userland.name for row in matrix.all_rows} == set(matrix.userlands)


def test_the_matrix_reaches_from_the_oldest_to_the_newest(matrix: table.Matrix) -> None:
    """These combinations have rows."""
    assert {"5.10", "6.1", "6.12", "6.18"} < set(matrix.kernels)
    assert {row.kernel.architecture.name for row in matrix.rows} == set(ARCHITECTURES)
    assert {userland.python for userland in matrix.userlands.values()} == {"3.9", "3.11", "3.13"}
    assert {word for row in matrix.all_rows for word in row.setup} == table.SETUPS
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
    """On each architecture there are as many shares as rows with a backend, and each row has another one."""
    for architecture, backend in itertools.product(ARCHITECTURES, table.BACKENDS):
        shares = suite.shares(matrix.rows)
        words = [shares[row.name].split() for row in matrix.rows if row.kernel.architecture.name == architecture]
        taken = [word.partition("=")[2].split("/") for one in words for word in one if word.startswith(backend)]
        assert sorted(int(place) for place, _ in taken) == list(range(len(taken)))
        assert {int(of) for _, of in taken} == {len(taken)}


def test_the_tests_of_a_row_exist(matrix: table.Matrix) -> None:
    words = {word for row in matrix.all_rows for word in row.tests} - {table.USUAL}
    assert [word for word in (*words, *suite.USUAL_TESTS) if not _is_there(word)] == []


def _is_there(word: str) -> bool:
    """``word``: a path of tests, and behind :: the name of a test in it, with its parameters."""
    path, _, test = word.partition("::")
    file = Path(__file__).resolve().parents[2] / path
    return file.exists() and (not test or f"def {test.partition('[')[0]}(" in file.read_text())


def test_the_suite_of_containers_has_a_name_and_a_sample_among_the_default_rows(matrix: table.Matrix) -> None:
    """ "containers" is all its rows; a row is named once; no name means every row that is not kept for its name."""
    default = matrix.select([])
    assert matrix.select([table.CONTAINERS]) == list(matrix.containers)
    assert [row for row in default if row not in matrix.containers] == list(matrix.rows)
    assert 0 < len([row for row in default if row in matrix.containers]) < len(matrix.containers)
    assert matrix.select(["lockdown", table.CONTAINERS])[:1] == [matrix.row("lockdown")]


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


def unknown_architecture(document: Document) -> None:
    document["kernel"]["6.1"]["flavour"] = "cloud-s390x"


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
        (unknown_architecture, "kernel 6.1: flavour cloud-s390x names none of amd64, arm64"),
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
        # A kernel of 16 KiB pages has the architecture in the middle of its name.
        (
            [
                "linux-image-6.12.8+deb13-arm64-16k",
                "linux-image-6.12.9+deb13-arm64",
                "linux-image-6.12.9+deb13-cloud-arm64",
            ],
            "6.12",
            "6.12.8+deb13-arm64-16k",
            ["linux-image-6.12.8+deb13-arm64-16k"],
        ),
    ],
)
def test_the_newest_package_of_a_series(names: list[str], series: str, release: str, packages: list[str]) -> None:
    """Versions are compared as numbers, and the series by its first two numbers."""
    flavour = "arm64-16k" if "arm64" in release else "cloud-amd64"
    assert choose(names, series, flavour) == (release, packages)


def test_a_series_that_the_archive_lacks() -> None:
    """The message names it, and no other series is used."""
    with pytest.raises(MatrixError, match=r"no kernel 6\.1 "):
        choose(["linux-image-6.12.1-9-cloud-amd64"], "6.1", "cloud-amd64")


# --- architectures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flavour", "name", "uname"),
    [
        ("cloud-amd64", "amd64", "x86_64"),
        ("cloud-arm64", "arm64", "aarch64"),
        ("arm64-16k", "arm64", "aarch64"),
        ("amd64", "amd64", "x86_64"),
    ],
)
def test_a_flavour_names_the_architecture(flavour: str, name: str, uname: str) -> None:
    found = table.Kernel("6.1", "bookworm", flavour).architecture
    assert (found.name, found.uname) == (name, uname)


def test_packages_are_of_the_architecture_of_the_kernel(matrix: table.Matrix) -> None:
    """Each suite has security updates, unless its name excludes them."""
    for suite_name, ends in (
        ("bookworm", ["bookworm main", "bookworm-security main"]),
        ("trixie-backports", ["trixie main", "trixie-security main", "trixie-backports main"]),
        ("bullseye-without-security", ["bullseye main"]),
    ):
        lines = archive.sources(matrix.archive, suite_name, "arm64")
        assert [" ".join(line.split()[-2:]) for line in lines] == ends
        assert [line for line in lines if not line.startswith("deb [arch=arm64 ")] == []


def files_of(architecture: Architecture) -> KernelFiles:
    """A kernel that is not there."""
    return KernelFiles("6.1", Path("vmlinuz"), Path("initrd"), Path("modules.img"), architecture)


def test_only_a_guest_of_this_machines_architecture_uses_kvm(
    matrix: table.Matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--accel kvm, or a KVM that was found to work, is for the others not even tried."""
    monkeypatch.setattr("vagrant.matrix.kernel.fetch", lambda _, kernel: files_of(kernel.architecture))
    monkeypatch.setattr("vagrant.matrix.userland.fetch", lambda *_: Path("root.img"))
    for row in matrix.rows:
        wanted = "kvm" if row.kernel.architecture == native() else "tcg"
        assert suite.machine(matrix.archive, row, "kvm").accel == wanted, row.name


def test_no_runtime_and_no_firewall_of_the_container_suite_starts_at_boot(matrix: table.Matrix, tmp_path: Path) -> None:
    """Also in the rows without a runtime: a firewall that runs there rejects what the test wants to be forwarded."""
    plan = suite.Plan(matrix.archive, table.PATH.parent.parent, table.PATH, tmp_path)
    packed = []
    for row in (*matrix.containers, *matrix.rows[:1]):
        suite.pack(plan, row, tmp_path / "job.tar", {"kernels.toml": table.PATH})
        with tarfile.open(tmp_path / "job.tar") as job:
            packed += [row] if "before-systemd" in job.getnames() else []
    assert packed == list(matrix.containers)


def test_the_job_writes_to_the_second_serial_line(matrix: table.Matrix) -> None:
    """The kernel writes to the first one. On arm64 the second one is the first 16550A, ttyS0."""
    for architecture, console, output in (("amd64", "ttyS0", "ttyS1"), ("arm64", "ttyAMA0", "ttyS0")):
        arguments = guest.Guest(files_of(ARCHITECTURES[architecture]), Path("root.img")).kernel_arguments.split()
        assert {f"console={console}", f"imds.output={output}"} < set(arguments)


DEPMOD = {
    "modules.dep": "kernel/fs/ext4.ko: kernel/fs/jbd2.ko\nkernel/fs/jbd2.ko:\nkernel/fs/overlay.ko:\n"
    "kernel/crypto/crc32c_generic.ko:\nkernel/crypto/crc32c-intel.ko: kernel/crypto/simd.ko\nkernel/crypto/simd.ko:\n",
    "modules.builtin": "kernel/drivers/virtio-pci.ko\nkernel/drivers/virtio_blk.ko\n",
    "modules.alias": "# Aliases\nalias usb:v*p* with blanks usb\nalias crypto-crc32c crc32c_intel\n"
    "alias crypto-crc32c crc32c_generic\n",
}


@pytest.mark.parametrize(
    ("softdep", "order"),
    [
        ("", ["jbd2", "ext4", "overlay"]),
        ("softdep ext4 pre: crypto-crc32c\n", ["crc32c_generic", "jbd2", "ext4", "overlay"]),
        ("softdep ext4 pre: crc32c-intel post: overlay\n", ["simd", "crc32c-intel", "jbd2", "ext4", "overlay"]),
        ("softdep ext4 pre: no-such-thing\nsoftdep nfs pre: crypto-crc32c\n", ["jbd2", "ext4", "overlay"]),
    ],
    ids=["none", "by an alias", "by name", "of another module"],
)
def test_a_module_is_loaded_after_what_it_asks_for(softdep: str, order: list[str], tmp_path: Path) -> None:
    """Without crc32c, which ext4 asks for, it mounts nothing. The generic implementation is for every processor."""
    for name, text in {**DEPMOD, "modules.softdep": f"# Soft dependencies\n{softdep}"}.items():
        (tmp_path / name).write_text(text, encoding="ascii")
    assert [path.stem for path in initramfs.load_order(tmp_path)] == order


def test_a_kernel_without_a_driver_for_its_disk_is_an_error(tmp_path: Path) -> None:
    for name, text in {**DEPMOD, "modules.builtin": "", "modules.softdep": ""}.items():
        (tmp_path / name).write_text(text, encoding="ascii")
    with pytest.raises(MatrixError, match="has no virtio_pci, neither as a module nor built in"):
        initramfs.load_order(tmp_path)
