# SPDX-License-Identifier: Apache-2.0
"""Names and numbers of users and groups, and the credentials of real processes."""

from __future__ import annotations

import contextlib
import ctypes
import grp
import os
import pwd
import subprocess
from collections.abc import Iterator
from typing import Callable

import pytest

from imds_guard.errors import BadPolicy, NotPermitted
from imds_guard.identity import (
    NoSuchProcess,
    caller_of_pid,
    caller_of_user,
    create_group,
    group_id,
    group_name,
    is_missing_group,
    user_id,
    user_name,
)
from imds_guard.kernel.namespaces import INITIAL_PID_NAMESPACE, INITIAL_USER_NAMESPACE
from imds_guard.policy.model import MAX_ID

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes IDs or the group database: root only")

ABSENT = "imds-guard-absent"
UNUSED_ID = 3_999_999_991


@contextlib.contextmanager
def child(prepare: Callable[[], object]) -> Iterator[int]:
    """A process that has called ``prepare`` and waits until the block ends."""
    ready_read, ready_write = os.pipe()
    stop_read, stop_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(stop_write)
            prepare()
            os.write(ready_write, b"1")
            os.read(stop_read, 1)
            status = 0
        finally:
            os._exit(status)
    try:
        os.close(ready_write)
        assert os.read(ready_read, 1) == b"1", "the child failed in prepare()"
        yield pid
    finally:
        os.close(stop_write)
        os.close(stop_read)
        os.close(ready_read)
        os.waitpid(pid, 0)


# --- names and numbers


def test_names_resolve_by_the_databases_of_the_system() -> None:
    assert user_id("root") == 0
    assert group_id(grp.getgrgid(0).gr_name) == 0
    assert user_name(0) == "root"
    assert group_name(0) == grp.getgrgid(0).gr_name


@pytest.mark.parametrize(
    ("word", "number"), [("1001", 1001), (1001, 1001), ("0", 0), ("007", 7), (str(MAX_ID), MAX_ID)]
)
def test_digits_are_a_number_without_need_of_an_account(word: str | int, number: int) -> None:
    assert number == user_id(word)
    assert number == group_id(word)


@pytest.mark.parametrize("word", ["4294967295", 4294967295, -1, "9" * 5000, "99999999999"])
def test_a_number_outside_the_range_is_refused(word: str | int) -> None:
    for resolve in (user_id, group_id):
        with pytest.raises(BadPolicy, match="ID: they go from 0 to 4294967294"):
            resolve(word)


@pytest.mark.parametrize("word", ["", " ", ABSENT, "-1", "+1", "1_000", "1.0", "nul\0nul", "\u0661"])
def test_an_unknown_name_is_refused(word: str) -> None:
    """int() of Python accepts some of these: "+1", "1_000", Arabic digits."""
    for resolve in (user_id, group_id):
        with pytest.raises(BadPolicy):
            resolve(word)


def test_an_unknown_group_is_refused_with_the_command_that_makes_it() -> None:
    with pytest.raises(BadPolicy) as caught:
        group_id(ABSENT)
    assert "--create-group" in str(caught.value)
    assert f"groupadd --system {ABSENT}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_user_is_refused_with_the_command_that_makes_it() -> None:
    with pytest.raises(BadPolicy, match=f"useradd --system {ABSENT}"):
        user_id(ABSENT)


def test_a_name_that_needs_quotes_is_not_part_of_the_command() -> None:
    with pytest.raises(BadPolicy) as caught:
        group_id("x; rm -rf /")
    assert "groupadd --system NAME" in str(caught.value)


def test_an_id_without_a_name_is_shown_as_a_number() -> None:
    assert user_name(UNUSED_ID) == str(UNUSED_ID)
    assert group_name(UNUSED_ID) == str(UNUSED_ID)


def test_only_a_name_can_be_a_missing_group() -> None:
    assert is_missing_group(ABSENT)
    assert not is_missing_group(str(UNUSED_ID))
    assert not is_missing_group(grp.getgrgid(0).gr_name)


@needs_root
def test_create_group_makes_a_system_group_once() -> None:
    name = f"imdsgT{os.getpid()}"
    try:
        number = create_group(name)
        assert number == grp.getgrnam(name).gr_gid
        assert number < 1000
        assert number == create_group(name)
    finally:
        subprocess.run(["groupdel", name], check=False)
    assert is_missing_group(name)


@needs_root
def test_a_name_that_groupadd_refuses_is_refused_with_its_message() -> None:
    with pytest.raises(BadPolicy, match=r"groupadd could not make the group '-x:y': .*not a valid group name"):
        create_group("-x:y")


@needs_root
def test_create_group_needs_root() -> None:
    """In a child, which can't get its IDs back."""

    def try_it() -> None:
        os.setresuid(65534, 65534, 65534)
        with pytest.raises(NotPermitted, match="only root can create the group"):
            create_group(ABSENT)

    with child(try_it):
        assert is_missing_group(ABSENT)


# --- credentials


def test_the_credentials_of_this_process() -> None:
    caller = caller_of_pid(os.getpid())
    assert (os.geteuid(), os.getegid()) == (caller.fsuid, caller.fsgid)
    assert frozenset(os.getgroups()) == caller.groups
    assert not caller.kernel_thread
    assert caller.pid_namespace_is_initial == (os.stat("/proc/self/ns/pid").st_ino == INITIAL_PID_NAMESPACE)
    assert caller.user_namespace_is_initial == (os.stat("/proc/self/ns/user").st_ino == INITIAL_USER_NAMESPACE)


@needs_root
def test_the_filesystem_ids_count_not_the_effective_ones() -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        os.setgroups([7001, 7003, 7002, 7003, 7003])
        os.setresgid(6001, 6002, 6003)
        os.setresuid(5001, 5002, 0)
        os.seteuid(0)
        libc.setfsgid(6009)
        libc.setfsuid(5009)

    with child(prepare) as pid:
        caller = caller_of_pid(pid)
    assert (5009, 6009, frozenset({7001, 7002, 7003})) == (caller.fsuid, caller.fsgid, caller.groups)
    assert caller.repeated_groups == 2  # the kernel's list has five


@needs_root
def test_a_user_namespace_and_a_pid_namespace_are_recognised() -> None:
    clone_newuser = 0x10000000
    libc = ctypes.CDLL(None, use_errno=True)

    def unshare() -> None:
        if libc.unshare(clone_newuser) != 0:
            raise OSError(ctypes.get_errno(), "unshare")

    with child(unshare) as pid:
        caller = caller_of_pid(pid)
        assert not caller.user_namespace_is_initial
        assert caller_of_pid(os.getpid()).pid_namespace_is_initial == caller.pid_namespace_is_initial
    argv = ["unshare", "--pid", "--fork", "sh", "-c", "echo; read line"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as outer:
        assert outer.stdout is not None
        outer.stdout.readline()
        inner = _only_child(outer.pid)
        assert not caller_of_pid(inner).pid_namespace_is_initial
        assert caller_of_pid(inner).user_namespace_is_initial == caller_of_pid(os.getpid()).user_namespace_is_initial
        outer.communicate(b"\n")


def _only_child(pid: int) -> int:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        children: list[str] = file.read().split()
    assert len(children) == 1
    return int(children[0])


@needs_root
@pytest.mark.skipif(not os.path.exists("/proc/2/comm"), reason="kthreadd is not in this PID namespace")
def test_a_kernel_thread_is_recognised() -> None:
    with open("/proc/2/comm", encoding="ascii") as file:
        if file.read().strip() != "kthreadd":
            pytest.skip("process 2 is not kthreadd in this PID namespace")
    assert caller_of_pid(2).kernel_thread


def test_a_process_that_is_gone_is_an_error() -> None:
    with child(lambda: None) as pid:
        pass
    with pytest.raises(NoSuchProcess, match=f"there is no process {pid}"):
        caller_of_pid(pid)


def test_parentheses_and_blanks_in_a_name_do_not_make_a_kernel_thread() -> None:
    """Counted from the first parenthesis, the field of the flags would be another one."""
    libc = ctypes.CDLL(None)

    def rename() -> None:
        assert libc.prctl(15, b") 1 1 1 1 1 b", 0, 0, 0) == 0

    with child(rename) as pid:
        assert not caller_of_pid(pid).kernel_thread


def test_a_user_has_the_groups_of_a_login() -> None:
    entry = next((found for found in pwd.getpwall() if found.pw_uid != 0), pwd.getpwuid(0))
    expected = frozenset(os.getgrouplist(entry.pw_name, entry.pw_gid))
    caller = caller_of_user(entry.pw_name)
    assert (entry.pw_uid, entry.pw_gid, expected) == (caller.fsuid, caller.fsgid, caller.groups)
    assert caller == caller_of_user(str(entry.pw_uid))


def test_a_number_without_an_account_is_refused() -> None:
    with pytest.raises(BadPolicy, match=f"no account has the user ID {UNUSED_ID}"):
        caller_of_user(UNUSED_ID)
