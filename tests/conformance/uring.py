# SPDX-License-Identifier: Apache-2.0
"""Connects through io_uring with raw system calls (io_uring(7)), without a library."""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import struct

from imds_guard.kernel.syscall_numbers import syscall_number

_libc = ctypes.CDLL(None, use_errno=True)

# Source: include/uapi/linux/io_uring.h
_SETUP_SQPOLL = 1 << 1
_ENTER_GETEVENTS, _ENTER_SQ_WAKEUP = 1 << 0, 1 << 1
_OFF_SQ_RING, _OFF_CQ_RING, _OFF_SQES = 0, 0x8000000, 0x10000000
_OP_CONNECT = 16
IOSQE_ASYNC = 1 << 4
_PARAMS_SIZE = 120
_SQ_OFFSETS, _CQ_OFFSETS = 40, 80
_SQE_SIZE = 64


class Ring:
    """A ring of one entry. With ``sqpoll``, a kernel thread submits it."""

    def __init__(self, *, sqpoll: bool = False) -> None:
        params = ctypes.create_string_buffer(struct.pack("=III", 0, 0, _SETUP_SQPOLL if sqpoll else 0), _PARAMS_SIZE)
        self._fd = call("io_uring_setup", 1, ctypes.addressof(params))
        self._sqpoll = sqpoll
        sq = struct.unpack_from("=7I", params.raw, _SQ_OFFSETS)
        cq = struct.unpack_from("=7I", params.raw, _CQ_OFFSETS)
        self._sq_tail, self._sq_array = sq[1], sq[6]
        self._cq_tail, self._cqes = cq[1], cq[5]
        self._sq = mmap.mmap(self._fd, self._sq_array + 4, offset=_OFF_SQ_RING)
        self._cq = mmap.mmap(self._fd, self._cqes + 32, offset=_OFF_CQ_RING)
        self._sqes = mmap.mmap(self._fd, _SQE_SIZE, offset=_OFF_SQES)

    def connect(self, fd: int, sockaddr: bytes, *, flags: int = 0, timeout_s: float = 10.0) -> None:
        """Connects ``fd`` through the ring. Raises OSError with the errno of the completion."""
        address = ctypes.create_string_buffer(sockaddr, len(sockaddr))
        self._sqes[:_SQE_SIZE] = struct.pack(
            "=BBHiQQIIQ24x", _OP_CONNECT, flags, 0, fd, len(sockaddr), ctypes.addressof(address), 0, 0, 1
        )
        struct.pack_into("=I", self._sq, self._sq_array, 0)
        struct.pack_into("=I", self._sq, self._sq_tail, 1)
        call("io_uring_enter", self._fd, 0 if self._sqpoll else 1, 0, _ENTER_SQ_WAKEUP if self._sqpoll else 0, 0, 0)
        if not select.select([self._fd], [], [], timeout_s)[0]:
            raise TimeoutError("the ring has no completion")
        _, result = self._completion()
        if result < 0:
            raise OSError(-result, os.strerror(-result))

    def _completion(self) -> tuple[int, int]:
        (tail,) = struct.unpack_from("=I", self._cq, self._cq_tail)
        if tail != 1:
            raise AssertionError(f"the ring has {tail} completions instead of one")
        user_data, result = struct.unpack_from("=Qi", self._cq, self._cqes)
        return user_data, result

    def close(self) -> None:
        """Unmaps and closes the ring."""
        for mapped in (self._sq, self._cq, self._sqes):
            mapped.close()
        os.close(self._fd)


def call(name: str, *arguments: int) -> int:
    """syscall(2). Raises OSError."""
    result = int(
        _libc.syscall(ctypes.c_long(syscall_number(name)), *(ctypes.c_long(argument) for argument in arguments))
    )
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
