# SPDX-License-Identifier: Apache-2.0
"""Names of users and groups from the files of another root, which is untrusted input."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imds_guard.backends.iptables.members import members_of
from imds_guard.errors import BadPolicy, GuardError, NotPermitted, Unsupported
from imds_guard.identity import (
    caller_of_user,
    create_group,
    group_id,
    group_name,
    is_missing_group,
    user_id,
    user_name,
)
from imds_guard.kernel import accounts, syscalls

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="files must belong to root: root only")

PASSWD = """\
root:x:0:0:root:/root:/bin/sh
client:x:41001:51003::/:/usr/sbin/nologin
client:x:41009:51009:a second line of the same name does not count:/:/bin/sh
"""
GROUP = "root:x:0:\nreaders:x:51001:client,absent\nclients:x:51003:\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another root, whose files are read in place of the name service."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(PASSWD, encoding="ascii")
    (tmp_path / "etc/group").write_text(GROUP, encoding="ascii")
    monkeypatch.setenv(accounts.VARIABLE, str(tmp_path))
    return tmp_path


def test_names_are_those_of_the_other_root(root: Path) -> None:
    """And no longer those of the name service."""
    assert (user_id("client"), group_id("readers")) == (41001, 51001)
    assert (user_name(41001), group_name(51003)) == ("client", "clients")
    assert user_name(1) == "1", "the account is in this machine's passwd, not in that root's"
    assert (is_missing_group("readers"), is_missing_group("daemon")) == (False, True)


def test_an_account_has_the_groups_that_list_it(root: Path) -> None:
    """As with a new login: the primary group, and the groups of the file."""
    for who in ("client", 41001):
        caller = caller_of_user(who)
        assert (caller.fsuid, caller.fsgid, caller.groups) == (41001, 51003, frozenset({51001, 51003}))
    assert members_of(51001) == {41001}
    assert accounts.primary_groups() == [(0, 0), (41001, 51003), (41009, 51009)]


def test_an_empty_variable_is_none(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(accounts.VARIABLE, "")
    assert accounts.other_root() is None
    assert user_id("root") == 0


def test_an_unknown_name_is_reported_with_the_place(root: Path) -> None:
    with pytest.raises(BadPolicy, match=f"no user 'daemon' in the passwd and group files below {root} "):
        user_id("daemon")
    with pytest.raises(BadPolicy, match=f"no group 'daemon' in the passwd and group files below {root} "):
        group_id("daemon")


def test_a_group_is_not_created_there(root: Path) -> None:
    """groupadd would write the files of this root."""
    assert create_group("readers") == 51001
    with pytest.raises(Unsupported, match="create it there, or give a group ID"):
        create_group("imds-guard-absent")


def test_the_usual_folder_comes_first(root: Path) -> None:
    """/usr/lib is for what /etc does not say (nss-altfiles)."""
    (root / "usr/lib").mkdir(parents=True)
    (root / "usr/lib/passwd").write_text("client:x:7:7::/:\nof-the-image:x:997:995::/:\n", encoding="ascii")
    assert (user_id("client"), user_id("of-the-image")) == (41001, 997)


def test_a_root_without_files_has_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """IDs work there: nothing else is needed."""
    monkeypatch.setenv(accounts.VARIABLE, str(tmp_path))
    assert (user_id("0"), user_name(0)) == (0, "0")
    with pytest.raises(BadPolicy, match="there is no user 'root'"):
        user_id("root")


@pytest.mark.parametrize("target", ["/usr/share/factory/passwd", "../../../../../../usr/share/factory/passwd"])
def test_a_symbolic_link_stays_in_that_root(root: Path, target: str) -> None:
    """An absolute link of the node would otherwise lead to a file of the container."""
    factory = root / "usr/share/factory"
    factory.mkdir(parents=True)
    (root / "etc/passwd").rename(factory / "passwd")
    (root / "etc/passwd").symlink_to(target)
    assert user_id("client") == 41001


def too_large(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(accounts.MAX_BYTES + 1)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def writable_by_others(path: Path) -> None:
    path.chmod(0o666)


def of_somebody(path: Path) -> None:
    os.chown(path, 41001, 0)


def a_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (too_large, "more than 16 MiB"),
        (a_pipe, "not a regular file"),
        (writable_by_others, "others than root may write it"),
        (of_somebody, "others than root may write it"),
        (a_loop, "Too many levels of symbolic links"),
    ],
)
def test_a_file_that_can_not_be_trusted_is_refused(root: Path, spoil: object, why: str) -> None:
    """A name has no ID then; an ID is printed as a number."""
    assert callable(spoil)
    spoil(root / "etc/passwd")
    with pytest.raises(GuardError, match=why):
        user_id("client")
    assert user_name(41001) == "41001"
    assert user_id("41001") == 41001


def test_a_root_that_may_not_be_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As /proc/1/root in a container that is not privileged."""

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(NotPermitted, match="run the container privileged, with hostPID"):
        user_id("client")


@pytest.mark.parametrize(
    "line",
    ["", "client", "client:x:1", "client:x:-1:1::/:", "client:x:4294967295:1::/:", "+client:x:1:1::/:", ":x:1:1"],
)
def test_a_line_that_is_no_entry_is_skipped(root: Path, line: str) -> None:
    """4294967295 is no ID: it means "no change" to setuid(2) and others."""
    (root / "etc/passwd").write_text(f"{line}\n{PASSWD}", encoding="ascii")
    assert user_id("client") == 41001


@given(content=st.binary(max_size=200))
def test_any_content_is_read(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever is in the files, looking for a name ends with an answer."""
    root = tmp_path_factory.mktemp("root")
    (root / "etc").mkdir()
    (root / "etc/passwd").write_bytes(content)
    (root / "etc/group").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(accounts.VARIABLE, str(root))
        for uid, _ in accounts.primary_groups():
            user = accounts.user_by_id(uid)
            assert user is not None
            accounts.groups_of(user)
        assert accounts.group_by_name("imds-guard-absent") is None


def test_the_machines_own_files_are_read_where_openat2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the units: RestrictSUIDSGID= answers ENOSYS (systemd.exec(5)). At boot names come from these files."""

    def refused(root: int, path: str, flags: int) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.delenv(accounts.VARIABLE, raising=False)
    monkeypatch.setattr(syscalls, "open_in_root", refused)
    for cached in (accounts._users, accounts._users_by_name):
        cached.cache_clear()
    found = accounts.user_in_files("root")
    assert found is not None
    assert (found.uid, found.gid) == (0, 0)
