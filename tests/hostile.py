# SPDX-License-Identifier: Apache-2.0
"""Processes of a user without privilege that do what they can to their readers.

Run as a program, this file is one of them: it imports nothing of ours, so that any user can run its text.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

USER, GROUP = 47_001, 47_002
READY = b"ready\n"

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def hostile(mode: str, *words: str, uid: int = USER, gid: int = GROUP) -> Iterator[subprocess.Popen[bytes]]:
    """This file as a program of another user. In the block it does what ``mode`` says."""
    text = Path(__file__).read_text(encoding="utf-8")
    argv = ["/usr/bin/python3", "-I", "-c", text, mode, *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, user=uid, group=gid, extra_groups=[]) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == READY
            yield process
        finally:
            process.kill()


def _need_fuse(folder: Path) -> None:
    """Skips the test where the user can't mount FUSE in a user namespace."""
    import pytest  # not at the top: another user's Python has none

    device = folder / "fuse-probe"
    try:
        os.mknod(device, 0o20600, os.makedev(10, 229))
        os.close(os.open(device, os.O_RDWR))
    except OSError as error:
        pytest.skip(f"this machine has no FUSE: {error}")
    finally:
        device.unlink(missing_ok=True)
    done = subprocess.run(["unshare", "--user", "true"], user=USER, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"users can't make user namespaces here: {done.stderr.strip()}")


@contextmanager
def held_command_line(folder: Path, comm: str = "hostile", uid: int = USER, connect_to: str = "") -> Iterator[int]:
    """The ID of a process whose command line can't be read: whoever reads it waits for a FUSE server.

    ``folder`` must be open to the user. Only the block's end lets its readers go on. The process tries to connect to
    port 80 of ``connect_to`` before.
    """
    device, mount = folder / f"fuse-{uid}", folder / f"mount-{uid}"
    if not device.exists():
        _need_fuse(folder)
        os.mknod(device, 0o20666, os.makedev(10, 229))
        device.chmod(0o666)
        mount.mkdir()
    with hostile("hold", str(device), str(mount), comm, connect_to, uid=uid) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())


def serve_nothing(folder: Path) -> int:
    """Mounts a FUSE filesystem on a folder in this mount namespace, and forks a server that answers only INIT.

    Returns the server's process ID. Its end ends every request.
    """
    _need_fuse(folder)
    device = folder.with_name(f"{folder.name}-fuse")
    os.mknod(device, 0o20600, os.makedev(10, 229))
    fd = _mount_fuse(str(device), str(folder))
    device.unlink()
    pid = os.fork()
    if pid == 0:
        _die_with_parent()
        _serve_fuse(fd, answered=(_INIT,))
    os.close(fd)
    return pid


@contextmanager
def crowd(folder: Path, number: int, name: str, argv0: str = "/usr/bin/cloud-init") -> Iterator[list[int]]:
    """The IDs of many processes of the user that call themselves ``name``, and ``argv0`` in their command line."""
    program = shutil.copy("/bin/sleep", folder / name)
    script = 'for n in $(seq "$1"); do (exec -a "$2" "$3" 1000) & echo $!; done; read -r'
    argv = ["bash", "-c", script, "bash", str(number), argv0, program]
    with subprocess.Popen(argv, stdin=-1, stdout=-1, user=USER, group=GROUP, start_new_session=True) as shell:
        assert shell.stdout is not None
        try:
            pids = [int(shell.stdout.readline()) for _ in range(number)]
            for pid in pids:
                _wait_for_name(pid, name)
            yield pids
        finally:
            os.killpg(shell.pid, signal.SIGKILL)


def _wait_for_name(pid: int, name: str) -> None:
    """The shell has forked it, but it may not run the program yet: 300 take a while on an emulated processor."""
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/comm").read_bytes() != name.encode()[:15] + b"\n":
        assert time.monotonic() < deadline, f"process {pid} is not {name!r}"
        select.select([], [], [], 0.005)


@contextmanager
def fuse_device(folder: Path) -> Iterator[tuple[str, str]]:
    """A device and a directory, for any user who mounts FUSE in namespaces of their own."""
    _need_fuse(folder)
    device, mount = folder / "fuse", folder / "mount"
    os.mknod(device, 0o20666, os.makedev(10, 229))
    device.chmod(0o666)
    mount.mkdir()
    yield str(device), str(mount)
    device.unlink()


# --- in the other user's process ------------------------------------------------------------------------------------


def _check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), what)


def _become_root_of_own_namespaces() -> None:
    uid, gid = os.getuid(), os.getgid()
    _check(_libc.unshare(0x10000000 | 0x00020000), "unshare")  # CLONE_NEWUSER, CLONE_NEWNS
    for file, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        Path(f"/proc/self/{file}").write_text(text, encoding="ascii")


def _die_with_parent() -> None:
    _libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def _attributes(inode: int) -> bytes:
    """struct fuse_attr: a directory with one file of a megabyte (include/uapi/linux/fuse.h)."""
    mode = 0o40755 if inode == 1 else 0o100644
    return struct.pack("=6Q10I", inode, 1 << 20, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _INIT, _OPENDIR, _INTERRUPT, _BATCH_FORGET = 1, 2, 3, 14, 15, 26, 27, 36, 42


def _serve_fuse(fd: int, answered: Sequence[int] = (), left: Callable[[], object] = lambda: None) -> None:
    """Answers everything but READ: the first one with EIO, later ones never. With ``answered`` only these requests.

    ``left`` is called at each READ that gets no answer.

    The first fault of a page waits without mmap_lock. When it has failed the kernel tries again, and this time it holds
    the lock (filemap_fault() in mm/filemap.c in Linux).
    """
    reads = 0
    while True:
        request = os.read(fd, 1 << 18)
        _, opcode, unique, inode = struct.unpack_from("=IIQQ", request)
        reads += opcode == _READ
        if opcode == _READ and (reads > 1 or (answered and opcode not in answered)):
            left()
        if opcode in (_FORGET, _INTERRUPT, _BATCH_FORGET) or reads > 1 or (answered and opcode not in answered):
            continue
        error, body = _fuse_answer(opcode, inode)
        os.write(fd, struct.pack("=IiQ", 16 + len(body), error, unique) + body)


def _fuse_answer(opcode: int, inode: int) -> tuple[int, bytes]:
    if opcode == _READ:
        return -5, b""  # EIO
    bodies = {
        _INIT: struct.pack("=IIIIHHIIHH32x", 7, 31, 0, 0, 0, 0, 4096, 0, 0, 0),
        _LOOKUP: struct.pack("=QQQQII", 2, 0, 3600, 3600, 0, 0) + _attributes(2),
        _GETATTR: struct.pack("=QII", 3600, 0, 0) + _attributes(inode),
        _OPEN: struct.pack("=QII", 1, 0, 0),
        _OPENDIR: struct.pack("=QII", 1, 0, 0),
    }
    return (0, bodies[opcode]) if opcode in bodies else (-38, b"")  # ENOSYS


def _mount_fuse(device: str, mount: str) -> int:
    fd = os.open(device, os.O_RDWR)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
    _check(_libc.mount(b"hostile", mount.encode(), b"fuse", ctypes.c_ulong(6), options), "mount")  # NOSUID, NODEV
    return fd


def _hold(device: str, mount: str, comm: str, connect_to: str) -> int:
    """A child whose mmap_lock one thread holds while it waits for a page, and another one waits to write it."""
    _become_root_of_own_namespaces()
    fd = _mount_fuse(device, mount)
    reader, writer = os.pipe()
    if os.fork() == 0:
        _die_with_parent()
        _serve_fuse(fd, left=lambda: os.write(writer, b"."))
    os.close(fd)
    pid = os.fork()
    if pid == 0:
        _die_with_parent()
        _libc.prctl(15, comm.encode(), 0, 0, 0)  # PR_SET_NAME
        if connect_to:
            socket.socket().connect_ex((connect_to, 80))
        _hold_own_lock(f"{mount}/file", reader)
    _wait_until_held(pid)
    return pid


def _hold_own_lock(path: str, asked: int) -> None:
    """``asked`` is the pipe by which the FUSE server tells that the page is asked for with the lock held."""
    pages = mmap.mmap(os.open(path, os.O_RDONLY), 1 << 20, mmap.MAP_PRIVATE, mmap.PROT_READ)
    writer = os.pipe()[1]
    threading.Thread(target=lambda: os.write(writer, memoryview(pages)[:4096])).start()
    os.read(asked, 1)
    _libc.mmap(None, ctypes.c_size_t(4096), 1, 0x22, -1, ctypes.c_long(0))  # a writer, which later readers wait behind


def lock_socket(one: socket.socket, device: str, mount: str) -> int:
    """Locks a TCP socket of the calling process for as long as a FUSE server lives. Returns the server's process ID.

    A child sends from a page of a file that the server does not give. The kernel has locked the socket for the whole
    of a send (tcp_sendmsg() in Linux).
    """
    _libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: it is not, after setuid(2), and can't write to /proc/self
    _become_root_of_own_namespaces()
    fd = _mount_fuse(device, mount)
    reader, writer = os.pipe()
    server = os.fork()
    if server == 0:
        _die_with_parent()
        answered = (_INIT, _LOOKUP, _GETATTR, _OPEN, _OPENDIR)
        _serve_fuse(fd, answered, left=lambda: os.write(writer, b"."))
    os.close(fd)
    if os.fork() == 0:
        _die_with_parent()
        pages = mmap.mmap(os.open(f"{mount}/file", os.O_RDONLY), 1 << 20, mmap.MAP_PRIVATE, mmap.PROT_READ)
        one.send(memoryview(pages)[:4096])
        os._exit(0)
    os.read(reader, 1)  # the page is asked for
    return server


def _wait_until_held(pid: int) -> None:
    """A child of ours tries to read the command line, and we see it wait."""
    deadline = time.monotonic() + 10
    while True:
        reader = os.fork()
        if reader == 0:
            _die_with_parent()
            Path(f"/proc/{pid}/cmdline").read_bytes()
            os._exit(0)
        if not select.select([os.pidfd_open(reader)], [], [], 0.2)[0]:
            os.kill(reader, signal.SIGKILL)
            return
        os.waitpid(reader, 0)
        if time.monotonic() > deadline:
            sys.exit("the lock is not held")


def _long_command_line(megabytes: str) -> None:
    """Points the command line at a mapping of which only the beginning has pages (PR_SET_MM_MAP in prctl(2))."""
    size = int(megabytes) << 20
    _libc.mmap.restype = ctypes.c_size_t
    at = _libc.mmap(None, ctypes.c_size_t(size), 3, 0x4022, -1, ctypes.c_long(0))  # MAP_NORESERVE
    ctypes.memset(at, ord("x"), 1 << 20)
    text = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace")
    field = [0, 0, 0, *(int(one) for one in ("0 " + text[text.rindex(")") + 4 :]).split())]
    code, stack, data, brk, environment = field[26:28], field[28], field[45:47], field[47], field[50:52]
    numbers = (*code, *data, brk, brk, stack, at, at + size, *environment, 0)
    changed = struct.pack("=12QIi", *numbers, 0, -1)  # struct prctl_mm_map: no auxv, the same program
    _check(_libc.prctl(35, 14, changed, ctypes.c_ulong(len(changed)), 0), "PR_SET_MM_MAP")


def main(words: Sequence[str]) -> None:
    """Does what the mode says, writes READY and the answer, and waits for the end of standard input."""
    mode, *more = words
    modes: dict[str, Callable[..., object]] = {"hold": _hold, "long": _long_command_line}
    answer = modes[mode](*more)
    sys.stdout.buffer.write(READY + f"{answer}\n".encode())
    sys.stdout.buffer.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1:])
