# SPDX-License-Identifier: Apache-2.0
"""Who besides root may write."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from imds_guard.kernel import ownership
from imds_guard.kernel.mounts import window_to_pid1
from imds_guard.kernel.ownership import mode_for_root_alone, only_root_can_write, others_can_change

FILE, FOLDER = stat.S_IFREG, stat.S_IFDIR


def found(mode: int, uid: int = 0, gid: int = 0) -> os.stat_result:
    return os.stat_result((mode, 1, 1, 1, uid, gid, 0, 0, 0, 0))


@pytest.mark.parametrize("root_group", [False, True])
@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (found(FILE | 0o644), True),
        (found(FOLDER | 0o755, gid=50), True),
        (found(FOLDER | 0o2755), True),
        (found(FILE | 0o644, uid=1000), False),
        (found(FILE | 0o400, uid=1000), False),
        (found(FILE | 0o646), False),
        (found(FOLDER | 0o777), False),
        (found(FOLDER | 0o1777), False),
        (found(FILE | 0o664, gid=50), False),
    ],
)
def test_only_root_can_write(status: os.stat_result, expected: bool, root_group: bool) -> None:
    """Also with the group root trusted: mode 0777 of root:root is open to everybody, and so is a sticky 1777."""
    assert only_root_can_write(status, root_group=root_group) is expected


@pytest.mark.parametrize("root_group", [False, True])
def test_the_group_root_may_write_only_where_it_is_trusted(root_group: bool) -> None:
    assert only_root_can_write(found(FILE | 0o664), root_group=root_group) is root_group


@pytest.mark.parametrize(("mode", "expected"), [(0o1777, 0o1755), (0o770, 0o750), (0o2755, 0o2755)])
def test_write_bits_are_taken_away_and_no_other(mode: int, expected: int) -> None:
    assert mode_for_root_alone(found(FOLDER | mode)) == expected


# --- paths ------------------------------------------------------------------------------------------------------------

BOB = 41_001

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """folder/file, of root."""
    (tmp_path / "folder").mkdir(mode=0o755)
    path = tmp_path / "folder" / "file"
    path.write_text("x", encoding="utf-8")
    path.chmod(0o644)
    return path


def changed_at(path: Path) -> str | None:
    """The path at which others can change it."""
    found = others_can_change(str(path))
    return None if found is None else found.split(" (")[0]


@as_root
def test_a_file_of_root_in_folders_of_root_is_safe(file: Path) -> None:
    """Above it is /tmp, whose sticky bit keeps others from replacing what is root's."""
    assert others_can_change(str(file)) is None
    assert os.stat("/tmp").st_mode & stat.S_ISVTX
    assert str(others_can_change(str(file), lasting=True)).startswith("/tmp (owner 0, group 0, mode 1777)")


@as_root
def test_the_mount_of_what_root_alone_can_write_is_not_asked_for(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart of the unit looks at 380 files, all on mounts that are read-only for the unit."""

    def ask(path: str) -> bool:
        raise AssertionError(path)

    monkeypatch.setattr(ownership, "_is_read_only", ask)
    assert ownership.others_can_change(str(file)) is None
    assert ownership.others_can_change_entry(str(file)) is None


@as_root
@pytest.mark.parametrize("which", ["file", "folder"])
@pytest.mark.parametrize("how", ["owner", "everyone", "group"])
def test_whoever_can_write_to_it_or_to_its_folder_can_change_it(file: Path, which: str, how: str) -> None:
    one = file if which == "file" else file.parent
    if how == "owner":
        os.chown(one, BOB, 0)
    elif how == "everyone":
        one.chmod(0o777)
    else:
        os.chown(one, 0, BOB)
        one.chmod(0o775)
    assert changed_at(file) == str(one)


@as_root
def test_the_group_root_may_write(file: Path) -> None:
    file.chmod(0o664)
    file.parent.chmod(0o775)
    assert changed_at(file) is None


@as_root
def test_an_access_control_list_may_let_others_write_where_the_mode_names_the_group_root(file: Path) -> None:
    """acl(5): the mode's bits of the group are the mask. The entry is: user BOB may read and write."""
    entries = [
        (0x01, 6, 0xFFFFFFFF),
        (0x02, 6, BOB),
        (0x04, 4, 0xFFFFFFFF),
        (0x10, 6, 0xFFFFFFFF),
        (0x20, 4, 0xFFFFFFFF),
    ]
    value = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + bits.to_bytes(2, "little") + number.to_bytes(4, "little")
        for tag, bits, number in entries
    )
    try:
        os.setxattr(file, "system.posix_acl_access", value)
    except OSError as error:
        pytest.skip(f"the filesystem of {file} has no access control lists: {error.strerror}")
    assert stat.S_IMODE(file.stat().st_mode) == 0o664
    assert changed_at(file) == str(file)
    assert "access control list" in str(others_can_change(str(file)))


@as_root
def test_what_somebody_put_into_a_sticky_folder_is_theirs(file: Path) -> None:
    file.parent.chmod(0o1777)
    assert changed_at(file) is None
    os.chown(file, BOB, 0)
    assert changed_at(file) == str(file)


@as_root
def test_a_link_in_a_sticky_folder_belongs_to_whoever_made_it(file: Path) -> None:
    link = file.parent / "link"
    link.symlink_to(file)
    file.parent.chmod(0o1777)
    assert changed_at(link) is None
    os.chown(link, BOB, 0, follow_symlinks=False)
    assert changed_at(link) == str(link)


@as_root
def test_every_link_on_the_way_counts(file: Path, tmp_path: Path) -> None:
    """Two links: the folder of the second one is neither above the path nor above what it leads to."""
    between = tmp_path / "between"
    between.mkdir()
    (between / "second").symlink_to(file.parent)
    (tmp_path / "first").symlink_to("between/second")
    path = tmp_path / "first" / "file"
    assert changed_at(path) is None
    os.chown(between, BOB, 0)
    assert changed_at(path) == str(between)


@as_root
def test_a_circle_of_links_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        others_can_change(str(tmp_path / "a"))


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file of BOB on a mount that nobody can write to."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], check=True)
    try:
        (folder / "file").write_text("x", encoding="utf-8")
        os.chown(folder / "file", BOB, BOB)
        os.chown(folder, BOB, BOB)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        yield folder / "file"
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@as_root
def test_nobody_changes_what_is_on_a_read_only_mount(read_only: Path) -> None:
    assert changed_at(read_only) is None
    os.chown(read_only.parent.parent, BOB, 0)
    assert changed_at(read_only) == str(read_only.parent.parent)


_IN_A_UNIT = """
import sys
from imds_guard.kernel.ownership import others_can_change
print(others_can_change(sys.argv[1]))
"""


def from_private_mounts(script: str, file: Path) -> str:
    """What others_can_change() says of the file, where the script has changed the mounts of its folder, $1."""
    script += ' && ! touch "$1" && exec "$0" -c "$2" "$1/file"'
    argv = ["unshare", "--mount", "sh", "-c", script, sys.executable, str(file.parent), _IN_A_UNIT]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(argv, capture_output=True, text=True, check=True, env=environment).stdout


@as_root
@pytest.mark.skipif(window_to_pid1() is None, reason="no process here may be asked for the mounts of PID 1")
def test_a_mount_that_is_read_only_for_this_process_alone_counts(file: Path) -> None:
    """As in our units: ProtectSystem=strict makes every mount read-only for the unit, and for nobody else."""
    os.chown(file.parent, BOB, 0)
    as_unit = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"'
    assert from_private_mounts(as_unit, file).startswith(f"{file.parent} (owner {BOB}")


@as_root
def test_a_read_only_mount_of_this_process_over_something_else_is_changed_by_nobody(file: Path) -> None:
    """As in a container that sees the processes of the machine: PID 1 has another file there."""
    as_container = (
        f'mount -t tmpfs none "$1" && touch "$1/file" && chown {BOB} "$1" "$1/file" && mount -o remount,bind,ro "$1"'
    )
    assert from_private_mounts(as_container, file) == "None\n"


@as_root
def test_the_folder_of_the_process_may_be_gone(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert others_can_change(str(file)) is None
