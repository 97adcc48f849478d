# SPDX-License-Identifier: Apache-2.0
"""Sends frames by an AF_XDP socket (Documentation/networking/af_xdp.rst), which needs no more than CAP_NET_RAW."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
from types import TracebackType

AF_XDP, SOL_XDP = 44, 283  # include/linux/socket.h
_MMAP_OFFSETS, _TX_RING, _UMEM_REG, _FILL_RING, _COMPLETION_RING = 1, 3, 4, 5, 6  # include/uapi/linux/if_xdp.h
_COPY = 1 << 1
_TX_RING_AT = 0x80000000
_DESCRIPTOR = struct.Struct("=QII")  # addr, len, options
_CHUNK, _CHUNKS = 4096, 64

_libc = ctypes.CDLL(None, use_errno=True)


class XdpSender:
    """A socket that sends the frames of its first queue of an interface. Raises OSError where the kernel has none."""

    def __init__(self, interface: str) -> None:
        self._socket = socket.socket(AF_XDP, socket.SOCK_RAW, 0)
        self._memory = mmap.mmap(-1, _CHUNK * _CHUNKS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        place = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._socket.setsockopt(SOL_XDP, _UMEM_REG, struct.pack("=QQIIII", place, len(self._memory), _CHUNK, 0, 0, 0))
        for ring in (_FILL_RING, _COMPLETION_RING, _TX_RING):
            self._socket.setsockopt(SOL_XDP, ring, struct.pack("=I", _CHUNKS))
        offsets = self._socket.getsockopt(SOL_XDP, _MMAP_OFFSETS, 128)
        self._producer, _, self._descriptors, _ = struct.unpack_from(
            "=4Q", offsets, 32
        )  # those of the ring for sending
        size = self._descriptors + _CHUNKS * _DESCRIPTOR.size
        self._ring = mmap.mmap(self._socket.fileno(), size, mmap.MAP_SHARED, offset=_TX_RING_AT)
        self._sent = 0
        address = struct.pack("=HHIII", AF_XDP, _COPY, socket.if_nametoindex(interface), 0, 0)
        self._check(_libc.bind(self._socket.fileno(), address, len(address)))

    def __enter__(self) -> XdpSender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ring.close()
        self._socket.close()

    def send(self, frame: bytes) -> None:
        """Sends a frame with its Ethernet header. At most 64 in all."""
        at = self._sent * _CHUNK
        self._memory[at : at + len(frame)] = frame
        place = self._descriptors + self._sent * _DESCRIPTOR.size
        self._ring[place : place + _DESCRIPTOR.size] = _DESCRIPTOR.pack(at, len(frame), 0)
        self._sent += 1
        self._ring[self._producer : self._producer + 4] = struct.pack("=I", self._sent)
        self._check(_libc.sendto(self._socket.fileno(), None, 0, socket.MSG_DONTWAIT, None, 0))

    @staticmethod
    def _check(result: int) -> None:
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
