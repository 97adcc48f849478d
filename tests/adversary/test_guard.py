# SPDX-License-Identifier: Apache-2.0
"""Attacks on the guard itself: only root can take it apart, and names prepared before its start do no harm."""

from __future__ import annotations

import os
import select
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Callable

import pytest

from imds_guard.backends.ebpf import EbpfBackend
from imds_guard.backends.ebpf.folder import Folder
from imds_guard.config.read import Config
from imds_guard.config.store import save_config
from imds_guard.kernel import lockfile
from imds_guard.kernel.credentials import become
from imds_guard.kernel.sandbox import Sandbox
from tests.adversary import service
from tests.adversary.attacks_service import TAKE_APART, target
from tests.adversary.privileges import Refused, in_child
from tests.adversary.scene import ADDRESSES, ATTACKER, ATTACKER_GID, ELSEWHERE, PORT, USUAL, Scene, alongside
from tests.adversary.talk import fetch
from tests.kernel.guards import FAST, folder_of

_SECRET = b"secret"
_WITHIN_S = 10.0


@contextmanager
def _scene() -> Iterator[Scene]:
    """A scene with the service in a child cgroup. There is no guard yet."""
    with Sandbox() as above, Sandbox(ADDRESSES, below=above.cgroup) as sandbox, tempfile.TemporaryDirectory() as folder:
        sandbox.serve_with(
            lambda: service.listen(ADDRESSES, (PORT,)), lambda sockets: service.answer_forever(sockets, _SECRET)
        )
        scene = Scene(sandbox, None, Path(folder), _SECRET)
        try:
            yield scene
        finally:
            _backend(scene).remove()


@pytest.fixture
def scene(as_root: None) -> Iterator[Scene]:
    with _scene() as one:
        yield one


def _backend(scene: Scene) -> EbpfBackend:
    return EbpfBackend(scene.guard_cgroup, FAST)


def _got(scene: Scene) -> bytes:
    """What the attacker gets with a plain connect."""
    try:
        return scene.attacker(fetch)
    except Refused:
        return b""


@pytest.mark.parametrize("name", sorted(TAKE_APART))
def test_root_can_take_it_apart(scene: Scene, name: str) -> None:
    """Each act of the row "take-apart" opens the lock when root does it. Otherwise its failure would prove nothing."""
    _backend(scene).apply(USUAL)
    assert _got(scene) == b""
    of = target(scene.guard_cgroup)
    scene.inside(lambda: TAKE_APART[name](of))
    deadline = time.monotonic() + _WITHIN_S
    while _got(scene) != _SECRET:  # a work queue detaches a link after its last pin is removed
        assert time.monotonic() < deadline, f"{name} left the lock as it was"
        select.select([], [], [], 0.01)


# --- prepared names -------------------------------------------------------------------------------------------------


def _link(path: str, victim: str) -> None:
    os.symlink(victim, path)


def _folder_in_folder(path: str, victim: str) -> None:
    os.makedirs(os.path.join(path, "one", "more"))


def _link_in_folder(path: str, victim: str) -> None:
    os.mkdir(path)
    os.symlink(victim, os.path.join(path, "config"))


def _dangling(path: str, victim: str) -> None:
    os.symlink(os.path.join(victim, "nothing"), path)


PREPARED: dict[str, Callable[[str, str], None]] = {
    "link": _link,
    "dangling-link": _dangling,
    "folder": _folder_in_folder,
    "folder-with-link": _link_in_folder,
}
NAMES: dict[str, Callable[[Folder], str]] = {
    "guard": lambda folder: folder.path,
    "new": lambda folder: folder.building,
    "old": lambda folder: folder.leaving,
}


@pytest.mark.parametrize("name", sorted(NAMES))
@pytest.mark.parametrize("kind", sorted(PREPARED))
def test_a_prepared_name_is_not_used(scene: Scene, kind: str, name: str) -> None:
    """In a bpffs that everyone can write to (01777), a name that a user made before the start is not used."""
    path = NAMES[name](folder_of(scene.guard_cgroup))
    victim = scene.folder / "victim"
    victim.mkdir()
    (victim / "important").write_text("root's own", encoding="ascii")

    backend = _backend(scene)
    with _open_to_all(os.path.dirname(path)):
        _prepare(path, lambda: PREPARED[kind](path, str(victim)))
        try:
            assert backend.faults() == []
            assert backend.read() is None
            backend.apply(USUAL)
            assert (backend.read(), backend.faults()) == (USUAL, [])
            assert _got(scene) == b""
        finally:
            backend.remove()
    assert [entry.name for entry in victim.iterdir()] == ["important"]
    assert not [one for one in NAMES.values() if os.path.lexists(one(folder_of(scene.guard_cgroup)))]


@contextmanager
def _open_to_all(bpffs: str) -> Iterator[None]:
    """Sets the mode 01777, which bpffs has when it is mounted without a mode."""
    before = stat.S_IMODE(os.stat(bpffs).st_mode)
    os.chmod(bpffs, 0o1777)
    try:
        yield
    finally:
        os.chmod(bpffs, before)


def _prepare(path: str, act: Callable[[], object]) -> None:
    """Makes a name as the attacker. Tries again when another test has reset the mode of the folder in between."""

    def as_attacker() -> bool:
        become(groups=(), gids=(ATTACKER_GID,) * 3, uids=(ATTACKER,) * 3)
        try:
            act()
        except PermissionError:
            return False
        return True

    for _ in range(100):
        if in_child(as_attacker):
            return
        os.chmod(os.path.dirname(path), 0o1777)
    pytest.fail(f"the attacker could not make {path}")


def test_start_works_while_a_user_keeps_making_its_names(scene: Scene) -> None:
    """start works although a user makes names of pins faster than they can be removed."""
    folder, backend = folder_of(scene.guard_cgroup), _backend(scene)
    paths = [one(folder) for one in NAMES.values()]

    def make_them() -> None:
        become(groups=(), gids=(ATTACKER_GID,) * 3, uids=(ATTACKER,) * 3)
        while True:
            for path in paths:
                with suppress(OSError):
                    _folder_in_folder(path, "")

    with _open_to_all(os.path.dirname(folder.path)):
        _prepare(folder.building, lambda: os.mkdir(folder.building))
        with alongside(make_them):
            backend.apply(USUAL)
            assert _got(scene) == b""
        backend.remove()
    assert not [name for name in os.listdir(os.path.dirname(folder.path)) if name.startswith(folder.name)]


# --- modes ----------------------------------------------------------------------------------------------------------


def _modes(folder: str) -> dict[str, int]:
    return {name: stat.S_IMODE(os.lstat(os.path.join(folder, name)).st_mode) for name in os.listdir(folder)}


def test_the_pins_are_roots_alone(scene: Scene) -> None:
    _backend(scene).apply(USUAL)
    pins = folder_of(scene.guard_cgroup).path
    assert stat.S_IMODE(os.lstat(pins).st_mode) == 0o700
    assert set(_modes(pins).values()) == {0o600}


def test_the_lock_files_are_roots_alone(as_root: None) -> None:
    """Only root can open lock files. Another user could hold the lock and block every command."""
    with lockfile.exclusive("adversary", 1):
        assert stat.S_IMODE(os.lstat(lockfile.FOLDER).st_mode) & 0o022 == 0
        assert _modes(lockfile.FOLDER)["adversary.lock"] == 0o600
        lockfile.forget("adversary")


def test_a_link_in_place_of_a_lock_file_is_not_followed(as_root: None, tmp_path: Path) -> None:
    from imds_guard.errors import GuardError

    path = os.path.join(lockfile.FOLDER, "adversary-link.lock")
    os.makedirs(lockfile.FOLDER, mode=0o700, exist_ok=True)
    os.symlink(tmp_path / "elsewhere", path)
    try:
        with pytest.raises(GuardError, match="adversary-link"), lockfile.exclusive("adversary-link", 1):
            pass
    finally:
        os.unlink(path)
    assert not list(tmp_path.iterdir())


def test_the_configuration_is_written_beside_and_renamed(tmp_path: Path) -> None:
    """Another name of the old file keeps its content; a symbolic link leads to the new one. Only root can write it."""
    file, other, link = tmp_path / "config.toml", tmp_path / "other", tmp_path / "link.toml"
    save_config(Config(USUAL), str(file))
    os.link(file, other)
    link.symlink_to(file)
    before = other.read_text(encoding="utf-8")
    save_config(Config(ELSEWHERE), str(link))
    assert other.read_text(encoding="utf-8") == before != file.read_text(encoding="utf-8")
    assert os.readlink(link) == str(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


@pytest.mark.parametrize("act", ["rename", "remove", "open", "list"])
def test_nobody_else_reaches_the_pins(scene: Scene, act: str) -> None:
    """Another user can't rename, remove, open or list the pins."""
    _backend(scene).apply(USUAL)
    pins = folder_of(scene.guard_cgroup).path
    acts: dict[str, Callable[[], object]] = {
        "rename": lambda: os.rename(pins, pins + "~old"),
        "remove": lambda: os.unlink(os.path.join(pins, "link_connect4")),
        "open": lambda: os.close(os.open(os.path.join(pins, "config"), os.O_RDONLY)),
        "list": lambda: os.listdir(pins),
    }
    with pytest.raises(Refused, match=r"^E(PERM|ACCES) "):
        scene.attacker(lambda: bool(acts[act]()))
    assert _got(scene) == b""
    assert _backend(scene).faults() == []
