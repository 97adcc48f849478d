# SPDX-License-Identifier: Apache-2.0
"""What a process chose itself, from /proc: read with a bound on size and number, in a child that can be abandoned.

No other module reads these files. Which files of /proc/PID can hang, and which have contents that the process chose
(fs/proc/base.c, array.c, fd.c, namespaces.c, kernel/cgroup/cgroup.c in Linux 5.10 and 6.18; "tried": on 6.18):

=================  ================================================  ==================================================
file               how it can hang its reader                        what the process chooses
=================  ================================================  ==================================================
cmdline, environ   mmap_lock, which a thread holds while it waits    everything, of any size: PR_SET_MM_MAP points them
                   for a page of a FUSE file (tried)                 at gigabytes
maps, smaps, mem,  the same; also exec_update_lock, which an         the names of files, any number of lines
auxv, pagemap      execve(2) in that state holds
status, stat       not by a lock. They borrow the address space of   the name, 15 bytes; a line feed in it is escaped
                   the process for a moment (get_task_mm()). Who     in status, not in stat
                   returns it last takes it down and waits for its
                   asynchronous I/O (exit_aio()), whose FUSE server
                   need not answer; the process must end in that
                   moment
comm               no                                                15 bytes
fd                 no, but their number is any, up to fs.nr_open;    the paths of files; the kernel's names of sockets
                   reading one takes 13 microseconds
exe, cwd, root     the links themselves: no. Whoever follows one     a path of up to 4,095 bytes
                   waits for its filesystem (FUSE, NFS)
ns/net, ns/pid...  no; nor does setns(2) for a network namespace     how many there are
cgroup             no (cgroup_mutex is the kernel's own)             the path, in delegated cgroups; no line feed in it
=================  ================================================  ==================================================

So cmdline, exe and fd are read here, in a Worker (abandonable.py), and status and stat in a Worker wherever many
processes are looked at; environ, maps and the like not at all. Links are read, never followed. comm, ns and cgroup are
read directly. Everything is bytes until printable() has made text of it.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import NamedTuple

from imds_guard.kernel import children, syscalls
from imds_guard.kernel.processes import stat_fields
from imds_guard.text import escaped

MAX_COMMAND_LINE = 4096
MAX_DESCRIPTORS = 32768
"""Of one process. Reading 20,000 takes 0.27 s."""
MAX_NAME = 64
"""Characters of a name that are printed."""

_START_TIME = 22 - 3
"""Field 22 in proc_pid_stat(5); stat_fields() begins with field 3."""


class Description(NamedTuple):
    """What a process says of itself, as bytes. Empty for what can't be read."""

    started_ns: int
    """CLOCK_BOOTTIME, up to a clock tick (10 ms) too early."""
    is_zombie: bool
    name: bytes
    exe: bytes
    command_line: tuple[bytes, ...]
    """From the first MAX_COMMAND_LINE bytes."""

    @property
    def program(self) -> str:
        """The name of the program, safe to print: not cut off after 15 bytes where the command line has all of it."""
        whole = os.path.basename(self.command_line[0]) if self.command_line else b""
        return printable(whole if len(self.name) == 15 and whole.startswith(self.name) else self.name, MAX_NAME)


def printable(raw: bytes, maximum: int) -> str:
    r"""Text that is safe on a terminal, of at most ``maximum`` characters: ``\xff`` for a byte that is no UTF-8."""
    text = escaped(raw[: 4 * maximum].decode(errors="backslashreplace"))
    return text if len(text) <= maximum else text[: maximum - 3] + "..."


def name_of(pid: int) -> str:
    """The name that the process gave itself (proc_pid_comm(5)), safe to print; "" when the process is gone."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return printable(file.read()[:-1], MAX_NAME)
    except OSError:
        return ""


# --- only in a child that can be abandoned --------------------------------------------------------------------------


def describe(pid: int, *, command_line: bool = True) -> Description | None:
    """None when the process is gone. Without ``command_line`` for a process in which it has hung."""
    children.require_detached()
    try:
        folder = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _describe(folder, command_line)
    except OSError:
        return None
    finally:
        os.close(folder)


def _describe(folder: int, command_line: bool) -> Description:
    """All by way of one directory: it does not become another process's when the process ID is used again."""
    stat = stat_fields(_read(folder, "stat", 4096))
    return Description(
        int(stat[_START_TIME]) * (10**9 // os.sysconf("SC_CLK_TCK")),
        stat[0] in (b"Z", b"X"),
        _read(folder, "comm", 256)[:-1],
        _link(folder, "exe"),
        _arguments(folder) if command_line else (),
    )


def _arguments(folder: int) -> tuple[bytes, ...]:
    text = _read(folder, "cmdline", MAX_COMMAND_LINE).rstrip(b"\0")
    return tuple(text.split(b"\0")) if text else ()


def _read(folder: int, name: str, maximum: int) -> bytes:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        return os.read(fd, maximum)
    finally:
        os.close(fd)


def _link(folder: int, name: str) -> bytes:
    """Empty for a kernel thread, and where the kernel does not let us read it (ptrace(2))."""
    try:
        return os.fsencode(os.readlink(name, dir_fd=folder))
    except OSError:
        return b""


class Sockets(NamedTuple):
    """The sockets that a process holds."""

    descriptors: dict[int, int]
    """The inode of each, and a descriptor of it."""
    all_read: bool
    """False where the process has more than MAX_DESCRIPTORS."""


def sockets_of(pid: int, wanted: frozenset[int]) -> Sockets:
    """Which of the sockets ``wanted`` (inodes) a process holds. Raises OSError."""
    children.require_detached()
    folder = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    found: dict[int, int] = {}
    try:
        with os.scandir(folder) as entries:
            for number, entry in enumerate(entries):
                if number == MAX_DESCRIPTORS:
                    return Sockets(found, False)
                inode = _socket_inode(folder, entry.name)
                if inode in wanted:
                    found[inode] = int(entry.name)
    finally:
        os.close(folder)
    return Sockets(found, True)


def copy_of_socket(pid: int, descriptor: int, inode: int) -> int:
    """A descriptor of our own for a socket that a process holds. Raises OSError, EBADF where it is another file now.

    Since Linux 8649c322f75c ("pid: Implement pidfd_getfd syscall") (in v5.6).
    """
    process = os.pidfd_open(pid)
    try:
        copy = syscalls.pidfd_getfd(process, descriptor)
    finally:
        os.close(process)
    try:
        # Its holder may have put another file there, and fstat(2) would ask the server of a FUSE mount. This call needs
        # a socket, and waits for nobody.
        syscalls.getsockopt(copy, socket.SOL_SOCKET, socket.SO_TYPE)
        if os.fstat(copy).st_ino != inode:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), f"descriptor {descriptor} of process {pid}")
    except OSError:
        os.close(copy)
        raise
    return copy


def _socket_inode(folder: int, name: str) -> int:
    """0 for another file, and for a descriptor that is closed meanwhile. A path can't begin with ``socket:``."""
    try:
        link = os.readlink(name, dir_fd=folder)
    except FileNotFoundError:
        return 0
    return int(link[8:-1]) if link.startswith("socket:[") else 0
