# SPDX-License-Identifier: Apache-2.0
"""Runs a command under a seccomp filter that answers bpf(2) with EPERM, as container runtimes and hardened units do."""

from __future__ import annotations

import ctypes
import os
import struct
import sys

from imds_guard.kernel.syscall_numbers import syscall_number

# Numbers from include/uapi/linux/{prctl,seccomp,bpf_common,audit}.h
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, REFUSE_WITH_EPERM = 0x7FFF0000, 0x00050001


def _filter(number: int) -> bytes:
    statements = (
        (LOAD_WORD, 0, 0, 0),  # seccomp_data.nr
        (JUMP_IF_EQUAL, 0, 1, number),
        (RETURN, 0, 0, REFUSE_WITH_EPERM),
        (RETURN, 0, 0, ALLOW),
    )
    return b"".join(struct.pack("=HBBI", *statement) for statement in statements)


def refuse_bpf() -> None:
    """Sets the filter for this process and its children. It can't be removed."""
    code = ctypes.create_string_buffer(_filter(syscall_number("bpf")))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 4, ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    # Root needs no no_new_privs for a filter, and no_new_privs would change the behaviour of sudo and setuid programs.
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP)")


if __name__ == "__main__":
    refuse_bpf()
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606  (the command is the caller's own)
