# SPDX-License-Identifier: Apache-2.0
"""The BPF filesystem for the pins: that of PID 1. In another one the lock would end with its mount namespace."""

from __future__ import annotations

import errno
import os

from imds_guard.errors import GuardError, NotPermitted, Unsupported, system_text
from imds_guard.kernel import ownership, syscalls
from imds_guard.kernel.mounts import Mount, mounts, same_namespace_as_pid1, window_to_pid1

USUAL_PATH = "/sys/fs/bpf"


def find_bpffs() -> str | None:
    """A path by which this process reaches the bpffs of PID 1, or None when PID 1 has none.

    Raises Unsupported when this mount namespace has no such path.
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
        f"looking for the BPF filesystem that PID 1 has at {of_host.path}: this process is in another mount "
        "namespace and can't reach it, and pins in a BPF filesystem of this namespace would end with it; run this in "
        "the host's mount namespace"
    )


def require_bpffs() -> str:
    """A path to the bpffs of PID 1, which is writable. Mounts one in PID 1's mount namespace where there is none."""
    path = find_bpffs()
    if path is None:
        _mount_for_pid1()
        path = find_bpffs()
    if path is None:
        raise Unsupported(f"mounting a BPF filesystem at {USUAL_PATH}: PID 1 does not see it; mount it there")
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        raise Unsupported(f"using the BPF filesystem at {path}: it is read-only; mount -o remount,rw {path}")
    _refuse_other_writers(path)
    return path


def _refuse_other_writers(path: str) -> None:
    """Takes the right to write from everyone but root, as systemd does. A mount without a mode is 01777.

    Other users could take the names of our pins again and again, so that no start would succeed; without the sticky bit
    they could rename the pins. They lose nothing: pinning needs CAP_BPF.
    """
    found = os.stat(path)
    if not ownership.is_owned_by_root(found):
        raise Unsupported(
            f"using the BPF filesystem at {path}: it belongs to user {found.st_uid}, who could remove the lock; "
            f"chown root {path}"
        )
    if not ownership.only_root_can_write(found):
        try:
            os.chmod(path, ownership.mode_for_root_alone(found))
        except OSError as error:
            raise NotPermitted(
                f"taking the right to write to {path} from other users: {system_text(error)}; run this as root"
            ) from error


def _of_pid1() -> Mount | None:
    try:
        found = [mount for mount in mounts("bpf", "1") if mount.root == "/"]
    except OSError as error:
        raise NotPermitted(f"reading /proc/1/mountinfo: {system_text(error)}; run this as root") from error
    usual = [mount for mount in found if mount.path == USUAL_PATH] or found
    return usual[-1] if usual else None


def _device(path: str) -> int | None:
    try:
        return os.stat(path).st_dev
    except OSError:
        return None


def _mount_for_pid1() -> None:
    """Mounts in a child process: this one could not come back from setns(2) without a descriptor of its own mounts."""
    from imds_guard.kernel import children  # noqa: PLC0415 -- start-up time: bpffs is mounted nearly everywhere

    what = f"mounting a BPF filesystem at {USUAL_PATH} in PID 1's mount namespace"
    advice = f"mount it by hand: mount -t bpf bpf {USUAL_PATH}"
    try:
        code = children.run_in_child(_mount_in_pid1s_namespace)
    except children.ChildFailed as error:
        raise GuardError(f"{what}: {str(error).strip().splitlines()[-1]}; {advice}") from error
    if code in (errno.EPERM, errno.EACCES):
        raise NotPermitted(f"{what}: {system_text(OSError(code, ''))}; run this as root (CAP_SYS_ADMIN)")
    if code != 0:
        raise GuardError(f"{what}: {system_text(OSError(code, ''))}; {advice}")


def _mount_in_pid1s_namespace() -> int:
    """The errno of the step that failed, or 0."""
    try:
        if not same_namespace_as_pid1():
            fd = os.open(f"/proc/{window_to_pid1() or 1}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            syscalls.setns(fd, syscalls.CLONE_NEWNS)
        syscalls.mount("bpf", USUAL_PATH, "bpf", "mode=0700")  # as systemd does: without it everyone may write there
    except OSError as error:
        return error.errno or errno.EIO
    return 0
