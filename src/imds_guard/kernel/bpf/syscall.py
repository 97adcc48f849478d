# SPDX-License-Identifier: Apache-2.0
"""The system call bpf(2), with errors that name the command; addresses of buffers; loading of BTF."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from typing import Any

from imds_guard.kernel import syscalls
from imds_guard.kernel.bpf.attr import BtfLoad, Command

_ATTR_BYTES = 512
"""Size of the buffer that union bpf_attr is passed in. The kernel gets the true size, and may write behind it: Linux
6.18.15 writes query.revision, bytes 56 to 63, also when BPF_PROG_QUERY of a cgroup was given fewer bytes
(__cgroup_bpf_query(); 6.18.44 and 7.2 do not)."""

_MAX_TRIES = 5
"""The verifier gives up with EAGAIN when a signal is pending: do_check() in kernel/bpf/verifier.c."""


def invoke(command: int, attr: bytes) -> tuple[int, int, bytes]:
    """Makes the system call once: the result, the errno (0 on success), and union bpf_attr as the kernel left it."""
    buffer = ctypes.create_string_buffer(attr, _ATTR_BYTES)
    result, code = syscalls.bpf(command, buffer, len(attr))
    return result, code, buffer.raw[: len(attr)]


def call(command: Command, attr: ctypes.Structure, *, expected: Sequence[int] = ()) -> int:
    """The result of bpf(2), or minus the errno for an ``expected`` one. Raises OSError for any other errno.

    Afterwards ``attr`` is as the kernel left it.
    """
    for _ in range(_MAX_TRIES):
        result, code, after = invoke(command, bytes(attr))
        if code != errno.EAGAIN or command != Command.PROG_LOAD:
            break
    if code and code not in expected:
        raise OSError(code, os.strerror(code), f"bpf(BPF_{command.name})")
    ctypes.memmove(ctypes.addressof(attr), after, len(after))
    return result if code == 0 else -code


def address(buffer: ctypes.Array[Any] | ctypes.Structure | None) -> int:
    """The address of a buffer, which must live until the system call returns; 0 (NULL) for None."""
    return 0 if buffer is None else ctypes.addressof(buffer)


def load_btf(blob: bytes) -> int:
    """The fd of type information, which the kernel has checked."""
    buffer = ctypes.create_string_buffer(blob, len(blob))
    return call(Command.BTF_LOAD, BtfLoad(btf=address(buffer), btf_size=len(blob)))
