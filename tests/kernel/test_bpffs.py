# SPDX-License-Identifier: Apache-2.0
"""The BPF filesystem of PID 1: how it is mounted where there is none, and who may write to it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from imds_guard.errors import GuardError, NotPermitted, Unsupported
from imds_guard.kernel import bpffs, syscalls

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="reads /proc/1/mountinfo: root only")


def failing(error: Exception) -> object:
    def mount(*_: str) -> None:
        raise error

    return mount


@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [
        (errno.EPERM, NotPermitted, r"EPERM .*; run this as root \(CAP_SYS_ADMIN\)"),
        (errno.ENODEV, GuardError, r"ENODEV .*; mount it by hand: mount -t bpf bpf /sys/fs/bpf"),
        (524, GuardError, r"524 .*; mount it by hand"),
    ],
)
def test_a_failed_mount_is_one_sentence(
    code: int, kind: type[GuardError], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """524 is ENOTSUPP, which does not fit into the status of a process."""
    monkeypatch.setattr(bpffs, "same_namespace_as_pid1", lambda: True)
    monkeypatch.setattr(syscalls, "mount", failing(OSError(code, os.strerror(code))))
    with pytest.raises(kind, match=f"^mounting a BPF filesystem at /sys/fs/bpf in PID 1's mount namespace: {text}"):
        bpffs._mount_for_pid1()


def test_an_unexpected_error_in_the_child_reaches_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child never returns into its parent's code, and its process is reaped."""
    monkeypatch.setattr(bpffs, "same_namespace_as_pid1", lambda: True)
    monkeypatch.setattr(syscalls, "mount", failing(ValueError("unexpected")))
    parent, children = os.getpid(), _children()
    try:
        with pytest.raises(GuardError, match=r"^mounting a BPF .*: ValueError: unexpected; mount it by hand"):
            bpffs._mount_for_pid1()
    finally:
        if os.getpid() != parent:  # a child that has escaped must not run the other tests
            os._exit(1)
    assert _children() == children


def _children() -> set[str]:
    """The child processes of this one, zombies included. Other tests of the same run may have some."""
    pid = os.getpid()
    return set(Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split())


def test_a_bpffs_of_another_user_is_refused(tmp_path: Path) -> None:
    """Its owner could remove the pins, whatever the mode says."""
    tmp_path.chmod(0o700)
    os.chown(tmp_path, 41_001, 0)
    with pytest.raises(Unsupported, match=r"it belongs to user 41001, who could remove the lock; chown root "):
        bpffs._refuse_other_writers(str(tmp_path))


@pytest.mark.parametrize(("mode", "after"), [(0o1777, 0o1755), (0o775, 0o755), (0o702, 0o700), (0o700, 0o700)])
def test_others_lose_the_right_to_write_to_the_bpffs(mode: int, after: int, tmp_path: Path) -> None:
    tmp_path.chmod(mode)
    bpffs._refuse_other_writers(str(tmp_path))
    assert tmp_path.stat().st_mode & 0o7777 == after
