# SPDX-License-Identifier: Apache-2.0
"""Other people's BPF programs at the connect4 hook, written as instructions."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from imds_guard.kernel import bpf

# Source: include/uapi/linux/bpf.h and bpf_common.h
_LOAD_WORD, _STORE_WORD = 0x61, 0x63
_JUMP_IF_NOT_EQUAL_32, _CALL, _EXIT = 0x56, 0x85, 0x95
_MOVE, _MOVE_32 = 0xB7, 0xB4
_USER_IP4 = 4  # offset in struct bpf_sock_addr
_SET_RETVAL = 187


def _instruction(code: int, to: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return struct.pack("=BBhi", code, source << 4 | to, offset, value)


def _word(address: str) -> int:
    """An IPv4 address as an immediate value: network byte order, read as a signed 32-bit number of this machine."""
    number: int = struct.unpack("=i", socket.inet_aton(address))[0]
    return number


def rewriting(address: str, into: str) -> bytes:
    """A program that sends a connect to ``address`` to another address."""
    return b"".join(
        (
            _instruction(_LOAD_WORD, 6, 1, _USER_IP4),
            _instruction(_JUMP_IF_NOT_EQUAL_32, 6, 0, 2, _word(address)),
            _instruction(_MOVE_32, 2, value=_word(into)),
            _instruction(_STORE_WORD, 1, 2, _USER_IP4),
            _instruction(_MOVE, 0, value=1),
            _instruction(_EXIT),
        )
    )


OVERRIDING = b"".join(
    (
        _instruction(_MOVE, 1, value=0),
        _instruction(_CALL, value=_SET_RETVAL),
        _instruction(_MOVE, 0, value=1),
        _instruction(_EXIT),
    )
)
"""A program that overrides a denial by programs that ran before it: bpf_set_retval(), since v5.18."""


@contextmanager
def attached(cgroup: str, code: bytes) -> Iterator[None]:
    """Attaches the program to connect4 of a cgroup, as the last one."""
    program = bpf.prog_load(code, "somebody_else", bpf.AttachType.CGROUP_INET4_CONNECT)
    folder = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    try:
        link = bpf.link_create(program, folder, bpf.AttachType.CGROUP_INET4_CONNECT)
        try:
            yield
        finally:
            bpf.link_detach(link)
            os.close(link)
    finally:
        os.close(folder)
        os.close(program)
