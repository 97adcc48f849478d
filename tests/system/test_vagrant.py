# SPDX-License-Identifier: Apache-2.0
"""The rows as Vagrant machines. vagrant/up-here shows that a machine comes up; it takes minutes, and root."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import tarfile
from pathlib import Path
from typing import Callable

import pytest

from tests.tools import missing, need
from vagrant.box import build, here, image, job, machines
from vagrant.box.edit import Edit
from vagrant.matrix import suite, table
from vagrant.matrix.disk import make_disk
from vagrant.matrix.errors import MatrixError
from vagrant.matrix.process import run

TREE = Path(__file__).resolve().parents[2]
FOLDER = TREE / "vagrant"
ROWS = [row.name for row in table.load().rows if row.kernel.architecture.name == "amd64"]
LEFT_OUT = [row.name for row in table.load().rows if row.name not in ROWS]
TIMEOUT_S = 300

Ran = subprocess.CompletedProcess


@pytest.fixture
def vagrant(tmp_path: Path) -> Callable[..., Ran[str]]:
    """Runs vagrant with a new state: (folder, arguments, provider) -> the completed process."""
    need("vagrant")

    def command(folder: Path, *words: str, provider: str = "libvirt") -> Ran[str]:
        state = {
            "HOME": str(tmp_path),
            "VAGRANT_HOME": str(tmp_path / "home"),
            "VAGRANT_DOTFILE_PATH": str(tmp_path / "dot"),
            "VAGRANT_CHECKPOINT_DISABLE": "1",
            "VAGRANT_DEFAULT_PROVIDER": provider,
            "IMDS_GUARD_CACHE": str(tmp_path / "cache"),
        }
        return subprocess.run(
            ["vagrant", *words],
            cwd=folder,
            env={**os.environ, **state},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    return command


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the folder vagrant/ that a test may change."""
    return Path(shutil.copytree(FOLDER, tmp_path / "tree" / "vagrant", ignore=shutil.ignore_patterns("__pycache__")))


def test_the_vagrantfile_is_ruby() -> None:
    need("ruby")
    for path in (FOLDER / "Vagrantfile", FOLDER / "box" / "Vagrantfile"):
        assert subprocess.run(["ruby", "-wc", str(path)], capture_output=True, text=True, check=True).stderr == ""


@pytest.mark.parametrize("name", ["inside", "kernel", "suite", "init"])
def test_the_scripts_are_shell(name: str) -> None:
    assert subprocess.run(["sh", "-n", str(FOLDER / "box" / name)], capture_output=True, check=True).stderr == b""


@pytest.mark.parametrize("words", [("libvirt",), ("virtualbox", "-p")])
def test_every_row_is_valid(vagrant: Callable[..., Ran[str]], words: list[str]) -> None:
    """For both providers. -p does not check the options of the provider itself, so VirtualBox is not needed."""
    provider, *options = words
    done = vagrant(FOLDER, "validate", *options, provider=provider)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["Vagrantfile validated successfully."]), done


@pytest.mark.parametrize(("provider", "options"), [("libvirt", []), ("virtualbox", ["-p"])])
def test_no_row_is_left_out_of_the_validation(
    vagrant: Callable[..., Ran[str]], copy: Path, provider: str, options: list[str]
) -> None:
    """A mistake in the last row for one provider is found."""
    text = (copy / "Vagrantfile").read_text(encoding="utf-8")
    spoilt = f'override.vm.nonsense = 1 if row["name"] == "{ROWS[-1]}"\n'
    begin = f'machine.vm.provider "{provider}" do |{provider}, override|\n'
    assert text.count(begin) == 1
    (copy / "Vagrantfile").write_text(text.replace(begin, begin + spoilt), encoding="utf-8")
    done = vagrant(copy, "validate", *options, provider=provider)
    assert done.returncode != 0
    assert "nonsense" in done.stdout + done.stderr, done


def test_each_row_is_a_machine(vagrant: Callable[..., Ran[str]]) -> None:
    """In the order of kernels.toml. Rows of another architecture are left out, which one line says."""
    done = vagrant(FOLDER, "status", "--machine-readable")
    assert [line.split(",")[1] for line in done.stdout.splitlines() if ",metadata," in line] == ROWS
    told = f"Vagrantfile: left out, because boxes are for amd64 alone: {', '.join(LEFT_OUT)}"
    assert LEFT_OUT != []
    assert [line for line in done.stderr.splitlines() if line.startswith("Vagrantfile")] == [told]


def test_a_mistake_in_kernels_toml_is_reported(vagrant: Callable[..., Ran[str]], copy: Path) -> None:
    """By the sentence of Python, not only by a trace of Ruby."""
    with open(copy / "kernels.toml", "a", encoding="utf-8") as handle:
        handle.write("[[row]]\nname = 'spoilt'\n")
    done = vagrant(copy, "validate")
    assert done.returncode != 0
    assert "row spoilt: kernel = None is not described in the file" in done.stdout + done.stderr, done


def test_a_box_that_was_built_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its name changes with its content, because Vagrant adds no box again under a name that it knows."""
    monkeypatch.setenv("IMDS_GUARD_CACHE", str(tmp_path))
    matrix = table.load()
    row = matrix.rows[0]
    assert (machines.machine(matrix, row).box, machines.machine(matrix, row).box_name) == ("", "")
    for digest in ("0123", "4567"):
        box = tmp_path / "boxes" / f"{row.name}-{digest}" / f"{row.name}.box"
        box.parent.mkdir(parents=True)
        box.touch()
        build.point(machines.link(row.name), box)
        found = machines.machine(matrix, row)
        assert (Path(found.box).resolve(), found.box_name) == (box, f"{row.name}-{digest}")


@pytest.mark.parametrize(
    ("name", "suites", "cmdline"),
    [
        ("6.1-debian-12", [], ""),
        ("7.3-debian-12", ["trixie", "trixie-security", "trixie-backports"], ""),
        ("7.3-debian-13", ["trixie-backports"], ""),
        ("5.10-debian-13", ["bullseye", "bullseye-security"], ""),
        ("5.10-debian-11", [], ""),
        ("lockdown", [], "lockdown=confidentiality"),
        ("legacy-cgroups", ["bookworm", "bookworm-security"], suite.LEGACY_CGROUPS),
    ],
)
def test_sources_and_arguments_for_a_stock_box(name: str, suites: list[str], cmdline: str) -> None:
    """The suite of the row's kernel, unless it is the release of the box, and the arguments for the kernel."""
    matrix = table.load()
    found = machines.machine(matrix, matrix.row(name))
    assert [line.split()[2] for line in found.sources] == suites
    assert found.cmdline == cmdline


def test_the_job_is_the_matrix_job(tmp_path: Path) -> None:
    """The wheel, the tests and the suite of the QEMU rows, with the expectations of the row. No draft is left."""
    matrix = table.load()
    packed = job.pack(matrix, matrix.row("lockdown"), tmp_path)
    with tarfile.open(packed) as archive:
        names = archive.getnames()
        script = archive.extractfile("job.sh")
        assert script is not None
        text = script.read().decode()
    assert {"suite/vagrant/guest/suite", "suite/tests/conformance/test_backends.py", "tools/pytest/__init__.py"} < set(
        names
    )
    assert [name for name in names if name.endswith(".whl")] != []
    assert "export IMDS_GUARD_EXPECT=groups,iptables\n" in text
    assert "guest/suite" in text
    assert os.listdir(tmp_path) == ["job.tar.gz"]


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ext2(tmp_path: Path) -> Path:
    """A small image with a file /etc/hosts."""
    need("mke2fs")
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "hosts").write_text("127.0.0.1 localhost\n")
    made = tmp_path / "root.img"
    make_disk(root, made)
    return made


def stat(image: Path, path: str) -> dict[str, str]:
    """Mode, owner and group of a file, by debugfs."""
    words = run(["debugfs", "-R", f"stat {path}", str(image)]).replace("\n", " ").split()
    return {key: words[words.index(f"{key}:") + 1] for key in ("Mode", "User", "Group")}


def cat(image: Path, path: str) -> str:
    return run(["debugfs", "-R", f"cat {path}", str(image)])


def test_an_image_is_edited_without_a_mount(ext2: Path, tmp_path: Path) -> None:
    """Files, folders and links get their owners; afterwards the file system is intact, also when enlarged."""
    edit = Edit(ext2, tmp_path)
    edit.append("/etc/hosts", "::1 localhost\n", 0o640, 42)
    edit.folder("/home", 0o700, 1000, 1001)
    edit.put(Path(__file__), "/home/test", 0o440, 1000, 1001)
    edit.link("/etc/gone", "/dev/null")
    edit.apply()
    image.grow(ext2, 64 * image.MIB)
    assert cat(ext2, "/etc/hosts") == "127.0.0.1 localhost\n::1 localhost\n"
    assert stat(ext2, "/etc/hosts") == {"Mode": "0640", "User": "0", "Group": "42"}
    assert stat(ext2, "/home") == {"Mode": "0700", "User": "1000", "Group": "1001"}
    assert stat(ext2, "/home/test") == {"Mode": "0440", "User": "1000", "Group": "1001"}
    assert cat(ext2, "/home/test") == Path(__file__).read_text(encoding="utf-8")
    assert set(Edit(ext2, tmp_path / "root").names("/etc")) == {".", "..", "hosts", "gone"}
    run(["e2fsck", "-f", "-n", str(ext2)])


def test_an_edit_that_fails_is_an_error(ext2: Path, tmp_path: Path) -> None:
    """debugfs itself exits with 0."""
    edit = Edit(ext2, tmp_path)
    edit.put(Path(__file__), "/no/such/folder/test")
    with pytest.raises(MatrixError, match="debugfs could not change"):
        edit.apply()
    with pytest.raises(MatrixError, match="has no /etc/passwd"):
        edit.append("/etc/passwd", "vagrant:x:1000:1000::/:/bin/sh\n")


def test_partitions_are_at_the_offsets_of_the_table(tmp_path: Path) -> None:
    """At whole MiB. The first one is active, and at the sector that its boot sector expects."""
    if not any(path.exists() for path in image.MBR):
        missing("syslinux-common is not installed")
    parts = []
    for number, size in enumerate((3 * image.MIB, 512, 2 * image.MIB)):
        parts.append(tmp_path / f"part{number}")
        parts[-1].write_bytes(bytes([number + 1]) * size)
    disk = tmp_path / "disk"
    image.join(disk, parts)
    content = disk.read_bytes()
    assert content[510:512] == b"\x55\xaa"
    entries = [struct.unpack_from("<B3xB3xII", content, 446 + 16 * number) for number in range(3)]
    assert [(active, kind) for active, kind, _, _ in entries] == [(0x80, 0x0E), (0, 0x83), (0, 0x83)]
    assert [(first, count) for _, _, first, count in entries] == [(2048, 6144), (8192, 2048), (10240, 4096)]
    for part, (_, _, first, _) in zip(parts, entries):
        assert content[first * 512 :].startswith(part.read_bytes())
    assert len(content) == (10240 + 4096) * 512


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["build-box", "up-here"])
def test_an_unknown_row_is_an_error(command: str) -> None:
    """Nothing is built or started."""
    if command == "up-here":
        if os.geteuid() != 0:
            pytest.skip("up-here is for root")
        need(*here.PROGRAMS)
    done = subprocess.run([str(FOLDER / command), "2.6-debian-1"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith(f"{command}: there is no row '2.6-debian-1'")


def test_there_is_no_box_of_another_architecture() -> None:
    """Nothing is built."""
    done = subprocess.run([str(FOLDER / "build-box"), LEFT_OUT[0]], capture_output=True, text=True, check=False)
    said = f"build-box: boxes are for amd64 alone: use ./run matrix {LEFT_OUT[0]}\n"
    assert (done.returncode, done.stdout, done.stderr) == (3, "", said)


def test_steps_are_parsed(tmp_path: Path) -> None:
    """In the format of vagrant/box/inside; without the file there are none."""
    assert here.steps(tmp_path) == []
    (tmp_path / "steps").write_text("up 80 0\nprovision 200 1\n")
    assert here.steps(tmp_path) == [("up", 80, 0), ("provision", 200, 1)]


def test_nothing_outlives_the_deadline(tmp_path: Path) -> None:
    """Neither the first process nor its children: they end with their PID namespace."""
    mark = tmp_path / "mark"
    script = f"mkfifo {mark}; sleep 3600 & (exec sleep 3601 <>{mark}) & echo started >{tmp_path}/started; wait"
    argv = ["setpriv", "--pdeathsig", "KILL", "--", "unshare", *here.NAMESPACES, "--", "sh", "-c", script]
    if os.geteuid() != 0:
        pytest.skip("namespaces are for root")
    assert here.run(argv, {}, 5.0) is None
    assert (tmp_path / "started").read_text() == "started\n"
    # Opening a FIFO for writing is ENXIO when nobody has it open for reading (fifo(7)).
    with pytest.raises(OSError, match="No such device"):
        os.close(os.open(mark, os.O_WRONLY | os.O_NONBLOCK))


def test_the_list_for_vagrant_is_json() -> None:
    """One object for each row, from the command that the Vagrantfile runs."""
    argv = ["/usr/bin/python3", "-m", "vagrant.box.machines"]
    said = subprocess.run(argv, cwd=TREE, capture_output=True, text=True, check=True).stdout
    assert [one["name"] for one in json.loads(said)] == ROWS
