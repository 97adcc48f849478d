# SPDX-License-Identifier: Apache-2.0
"""The BPF filesystem that pins live in: the one of PID 1, or the lock would go away with somebody's mount namespace."""

from __future__ import annotations

import os
import stat

from imds_guard.errors import GuardError, NotPermitted, Unsupported, system_words
from imds_guard.kernel import syscalls
from imds_guard.kernel.mounts import Mount, mounts, same_namespace_as_pid1, window_to_pid1

USUAL_PATH = "/sys/fs/bpf"


def find_bpffs() -> str | None:
    """A path to the bpffs of PID 1 that works from here, or None when PID 1 has none.

    Raises Unsupported when it has one that can't be reached from this mount namespace.
    """
    of_host = _of_pid1()
    if of_host is None:
        return None
    for path in (of_host.path, USUAL_PATH):
        if _device(path) == of_host.device:
            return path
    window = window_to_pid1()
    if window is not None and _device(f"/proc/{window}/root{of_host.path}") == of_host.device:
        return f"/proc/{window}/root{of_host.path}"
    raise Unsupported(
        f"looking for the BPF filesystem that PID 1 has at {of_host.path}: this process lives in another mount "
        "namespace and can't reach it, and a pin in a private one would be gone with the namespace; run this in "
        "the host's mount namespace"
    )


def require_bpffs() -> str:
    """A path to the bpffs of PID 1, mounted in PID 1's mount namespace if need be, and writable."""
    path = find_bpffs()
    if path is None:
        _mount_for_pid1()
        path = find_bpffs()
    if path is None:
        raise Unsupported(
            f"mounting a BPF filesystem at {USUAL_PATH}: PID 1 does not see it afterwards; mount it there"
        )
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        raise Unsupported(f"using the BPF filesystem at {path}: it is read-only; mount -o remount,rw {path}")
    _close_to_others(path)
    return path


def _close_to_others(path: str) -> None:
    """Only root may make names in it afterwards, as systemd mounts it; mounted without a mode it is 01777.

    There others could take the names that we need, again and again, and keep a start from ever working; without the
    sticky bit they could rename the pins. Nobody else has a use for it: to pin takes CAP_BPF.
    """
    found = os.stat(path)
    others = stat.S_IWGRP | stat.S_IWOTH
    if found.st_uid != 0:
        raise Unsupported(
            f"using the BPF filesystem at {path}: it belongs to user {found.st_uid}, who may take the lock away; "
            f"chown root {path}"
        )
    if found.st_mode & others:
        try:
            os.chmod(path, stat.S_IMODE(found.st_mode) & ~others)
        except OSError as error:
            raise NotPermitted(
                f"taking others' right to write from {path}: {system_words(error)}; run this as root"
            ) from error


def _of_pid1() -> Mount | None:
    try:
        found = [mount for mount in mounts("bpf", "1") if mount.root == "/"]
    except OSError as error:
        raise NotPermitted(f"reading /proc/1/mountinfo: {system_words(error)}; run this as root") from error
    usual = [mount for mount in found if mount.path == USUAL_PATH] or found
    return usual[-1] if usual else None


def _device(path: str) -> int | None:
    try:
        return os.stat(path).st_dev
    except OSError:
        return None


def _mount_for_pid1() -> None:
    """In a child process, since setns(2) can't be undone without keeping an fd of where we came from."""
    pid = os.fork()
    if pid == 0:
        os._exit(_mount_in_pid1s_namespace())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == 0:
        return
    words = system_words(OSError(code, ""))
    text = f"mounting a BPF filesystem at {USUAL_PATH} in PID 1's mount namespace: {words}"
    if code in (1, 13):  # EPERM, EACCES
        raise NotPermitted(f"{text}; run this as root (CAP_SYS_ADMIN)")
    raise GuardError(f"{text}; mount it by hand: mount -t bpf bpf {USUAL_PATH}")


def _mount_in_pid1s_namespace() -> int:
    """An errno, or 0."""
    try:
        if not same_namespace_as_pid1():
            fd = os.open(f"/proc/{window_to_pid1() or 1}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            syscalls.enter_mount_namespace(fd)
        syscalls.mount("bpf", USUAL_PATH, "bpf", "mode=0700")  # as systemd does: without it everyone may write there
    except OSError as error:
        return error.errno or 255
    return 0
