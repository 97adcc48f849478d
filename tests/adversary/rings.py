# SPDX-License-Identifier: Apache-2.0
"""One io_uring request with all fields that an attacker can set (io_uring_enter(2))."""

from __future__ import annotations

import ctypes
import os
import select
import struct

from tests.conformance import uring
from tests.conformance.attempts import _Vector

_REGISTER_PERSONALITY = 9
_OP_SENDMSG, _OP_CONNECT = 9, 16
_MESSAGE_HEADER = struct.Struct("@QI4xQQQQi4x")  # struct msghdr (sendmsg(2))


class Ring(uring.Ring):
    """A ring for one request."""

    ASYNC = uring.IOSQE_ASYNC

    def register_personality(self) -> int:
        """Registers the caller's credentials in the ring. Returns their ID."""
        return uring.call("io_uring_register", self._fd, _REGISTER_PERSONALITY, 0, 0)

    def take(self, fd: int, address: bytes, flags: int = 0, personality: int = 0) -> None:
        """Connects. Raises OSError with the errno of the completion."""
        buffer = ctypes.create_string_buffer(address, len(address))
        self._submit(_OP_CONNECT, fd, ctypes.addressof(buffer), 0, len(address), flags, personality)

    def send(self, fd: int, payload: bytes, address: bytes, message_flags: int = 0) -> None:
        """Sends one message to an address."""
        name = ctypes.create_string_buffer(address, len(address))
        vector = _Vector(payload, len(payload))
        header = ctypes.create_string_buffer(
            _MESSAGE_HEADER.pack(ctypes.addressof(name), len(address), ctypes.addressof(vector), 1, 0, 0, 0)
        )
        self._submit(_OP_SENDMSG, fd, ctypes.addressof(header), 1, 0, 0, 0, message_flags)

    def _submit(
        self,
        code: int,
        fd: int,
        address: int,
        length: int,
        offset: int,
        flags: int,
        personality: int,
        operation: int = 0,
    ) -> None:
        self._sqes[: uring._SQE_SIZE] = struct.pack(
            "=BBHiQQIIQHH20x", code, flags, 0, fd, offset, address, length, operation, 1, 0, personality
        )
        struct.pack_into("=I", self._sq, self._sq_array, 0)
        struct.pack_into("=I", self._sq, self._sq_tail, 1)
        wake = uring._ENTER_SQ_WAKEUP if self._sqpoll else 0
        uring.call("io_uring_enter", self._fd, 0 if self._sqpoll else 1, 0, wake, 0, 0)
        if not select.select([self._fd], [], [], 10.0)[0]:
            raise TimeoutError("the ring has no completion")
        result = self._completion()[1]
        if result < 0:
            raise OSError(-result, os.strerror(-result))
