# SPDX-License-Identifier: Apache-2.0
"""The cache of compiled programs: used where it is whole and root's alone, and as if it were not there otherwise."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest

from imds_guard.backends.ebpf import compiled, program
from imds_guard.errors import Unsupported
from imds_guard.kernel import compiler
from imds_guard.kernel.cache_folder import CacheFolder, key
from tests.kernel import guards
from tests.kernel.guards import BOTH, NEW, NEW_POLICY, OLD, OLD_POLICY

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the cache is for root alone")

NAME = key("a", 1)
STRANGER = 61_004


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache that is empty. It is in /run, because everybody may write to /tmp."""
    above = Path(tempfile.mkdtemp(dir="/run", prefix="imds-guard-test-"))
    monkeypatch.setattr(compiled, "FOLDER", CacheFolder(str(above / "cache")))
    yield above / "cache"
    shutil.rmtree(above)


def _forget() -> None:
    """As a new process knows nothing."""
    for known in (program._compiled, program.kernel_offsets, compiler.compile_functions):
        known.cache_clear()


@pytest.fixture
def written(place: Path) -> Path:
    """A file that counts."""
    compiled.FOLDER.write(NAME, b"content")
    assert compiled.FOLDER.read(NAME) == b"content"
    return place / NAME


def _altered(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _of_a_group(file: Path) -> None:
    os.chown(file, 0, STRANGER)
    file.chmod(0o664)


def _linked(file: Path) -> None:
    os.rename(file, file.with_name("other"))
    file.symlink_to("other")


def _renamed(file: Path) -> None:
    compiled.FOLDER.write(key("b", 2), b"other content")
    os.replace(file.with_name(key("b", 2)), file)


def _fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _shared_above(file: Path) -> None:
    """A sticky folder may be emptied, and then anybody can make the cache."""
    file.parent.parent.chmod(0o1777)


IN_DOUBT: dict[str, Callable[[Path], object]] = {
    "another owner": lambda file: os.chown(file, STRANGER, 0),
    "writable by everybody": lambda file: file.chmod(0o646),
    "writable by a group": _of_a_group,
    "a second name": lambda file: os.link(file, file.with_name("other")),
    "a symbolic link": _linked,
    "a pipe": _fifo,
    "cut off": lambda file: os.truncate(file, 20),
    "empty": lambda file: os.truncate(file, 0),
    "one bit": _altered,
    "another entry's content": _renamed,
    "the folder's owner": lambda file: os.chown(file.parent, STRANGER, 0),
    "the folder's mode": lambda file: file.parent.chmod(0o777),
    "a folder above": lambda file: os.chown(file.parent.parent, STRANGER, 0),
    "a shared folder above": _shared_above,
}


@pytest.mark.parametrize("doubt", IN_DOUBT)
def test_what_is_in_doubt_is_not_there(doubt: str, written: Path) -> None:
    IN_DOUBT[doubt](written)
    assert compiled.FOLDER.read(NAME) is None


@pytest.mark.parametrize(
    "doubt", ["the folder's owner", "the folder's mode", "a folder above", "a shared folder above"]
)
def test_nothing_is_written_where_others_could_change_it(doubt: str, written: Path) -> None:
    IN_DOUBT[doubt](written)
    compiled.FOLDER.write(key("b", 2), b"other content")
    assert os.listdir(written.parent) == [NAME]


def test_where_nothing_can_be_written_nothing_is(place: Path) -> None:
    place.parent.joinpath("cache").write_text("a file")
    compiled.FOLDER.write(NAME, b"content")
    assert compiled.FOLDER.read(NAME) is None


def test_the_oldest_files_go(written: Path) -> None:
    os.utime(written, (1, 1))
    names = [key(number) for number in range(32)]
    for name in names:
        compiled.FOLDER.write(name, b"content")
    assert sorted(os.listdir(written.parent)) == sorted(names)


def test_a_start_from_the_cache_needs_no_compiler(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And enforces the same: the callers say so."""
    _forget()
    with guards.guarded_sandbox(guards.FAST) as (sandbox, backend):
        backend.apply(OLD_POLICY)
        assert len(os.listdir(place)) >= 2, "offsets and instructions"
        backend.remove()
        _forget()
        monkeypatch.setattr(compiler, "compile_functions", _no_compiler)
        monkeypatch.setattr(program, "_offsets_in_btf", _no_compiler)
        backend.apply(NEW_POLICY)
        assert guards.passing(sandbox) == {NEW, BOTH}


def test_a_planted_program_is_not_loaded(place: Path) -> None:
    """Programs that let everybody through, in each file, whole by their digests, but not root's."""
    _forget()
    with guards.guarded_sandbox(guards.FAST) as (sandbox, backend):
        backend.apply(OLD_POLICY)
        backend.remove()
        for name in os.listdir(place):
            _plant(place / name)
        _forget()
        backend.apply(OLD_POLICY)
        assert guards.passing(sandbox) == {OLD, BOTH}


def _plant(file: Path) -> None:
    text = compiled.FOLDER.read(file.name)
    assert text is not None
    everybody = compiled.encoded(dict.fromkeys(compiled.decoded(text), _LETS_PASS)) if b"ig_sock_addr" in text else text
    compiled.FOLDER.write(file.name, everybody)
    os.chown(file, STRANGER, STRANGER)


_LETS_PASS = bytes.fromhex("b7000000010000009500000000000000")
"""r0 = 1; exit"""


def test_the_planted_program_would_let_everybody_through(place: Path) -> None:
    """The control: as root's file it is loaded. So the test before can fail."""
    _forget()
    with guards.guarded_sandbox(guards.FAST) as (sandbox, backend):
        backend.apply(OLD_POLICY)
        backend.remove()
        for name in os.listdir(place):
            _plant(place / name)
            os.chown(place / name, 0, 0)
        _forget()
        backend.apply(OLD_POLICY)
        assert guards.passing(sandbox) == {OLD, NEW, BOTH, guards.STRANGER}


def _no_compiler(*_: object) -> Any:
    raise Unsupported("the compiler was called")


# --- the key ----------------------------------------------------------------------------------------------------------


def _uname(**changed: str) -> Callable[[], SimpleNamespace]:
    found = os.uname()
    values = {"release": found.release, "version": found.version, "machine": found.machine, **changed}
    return lambda: SimpleNamespace(**values)


INGREDIENTS: dict[str, Callable[[pytest.MonkeyPatch, Path], object]] = {
    "the kernel's release": lambda patch, _: patch.setattr(os, "uname", _uname(release="6.1.0-x")),
    "the kernel's build": lambda patch, _: patch.setattr(os, "uname", _uname(version="#2 SMP")),
    "the machine": lambda patch, _: patch.setattr(os, "uname", _uname(machine="riscv64")),
    "our version": lambda patch, _: patch.setattr(compiled, "__version__", "0.0.0"),
    "bcc's version": lambda _, bcc: bcc.joinpath("version.py").write_text("__version__ = '0.99.0'"),
    "libbcc": lambda _, bcc: bcc.joinpath("libbcc.so.0").write_text("another library"),
}


@pytest.fixture
def bcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that looks like bcc and libbcc."""
    for name in ("__init__.py", "version.py", "libbcc.so.0"):
        (tmp_path / name).write_text("")
    spec = importlib.machinery.ModuleSpec("bcc", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    monkeypatch.setattr(compiled, "_FOLDERS", (str(tmp_path),))
    return tmp_path


def _is_compiled(ingredients: object) -> bool:
    """Whether the compiler is called for these."""
    calls: list[int] = []

    def compile_them() -> dict[str, bytes]:
        calls.append(1)
        return {"f": b"12345678"}

    assert compiled.instructions(ingredients, compile_them) == {"f": b"12345678"}
    return bool(calls)


@pytest.mark.parametrize("ingredient", INGREDIENTS)
def test_another_ingredient_is_another_file(
    ingredient: str, place: Path, bcc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _is_compiled("source")
    assert not _is_compiled("source")
    INGREDIENTS[ingredient](monkeypatch, bcc)
    assert _is_compiled("source")
    assert not _is_compiled("source")
    assert _is_compiled("another source")
    assert place.is_dir()


@pytest.mark.parametrize("variable", ["LD_LIBRARY_PATH", "LD_PRELOAD"])
def test_another_library_path_is_in_doubt(
    variable: str, place: Path, bcc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(bcc))
    assert _is_compiled("source")
    assert _is_compiled("source")
    assert not place.exists()


def test_the_source_is_an_ingredient(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the names of its files, and the macros."""
    folder = tmp_path / "bpf"
    shutil.copytree(program.source_folder(), folder)
    monkeypatch.setattr(program, "source_folder", lambda: folder)
    monkeypatch.setattr(compiler, "compile_functions", lambda *_: {"f": b"12345678"})
    made = functools.partial(program.compile_hooks, ["connect4"], offsets=())
    seen: list[list[str]] = []

    def look() -> None:
        program._compiled.cache_clear()
        made()
        seen.append(sorted(os.listdir(place)))

    look()
    look()
    assert len(seen[0]) == len(seen[1]) == 1
    (folder / "caller.h").write_text((folder / "caller.h").read_text(encoding="utf-8") + "\n", encoding="utf-8")
    look()
    (folder / "include" / "new.h").write_text("")
    look()
    program._compiled.cache_clear()
    made(defines=(("IG_PLAIN", 1),))
    assert [len(one) for one in seen] == [1, 1, 2, 3]
    assert len(os.listdir(place)) == 4
    program._compiled.cache_clear()
