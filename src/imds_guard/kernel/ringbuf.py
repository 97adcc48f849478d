# SPDX-License-Identifier: Apache-2.0
"""A reader of a BPF ring buffer (BPF_MAP_TYPE_RINGBUF), by mmap(2) of its pages.

Layout and protocol: Documentation/bpf/ringbuf.rst and kernel/bpf/ringbuf.c in Linux. Page 0 has the consumer's position
and is writable; page 1 has the producer's; the data comes behind it twice in a row, so that a record is never split. A
position only grows, its low bits are the place in the data. A record is a header of eight octets (length with two flag
bits, and a page offset that is the kernel's own) and the octets, rounded up to eight.
"""

from __future__ import annotations

import mmap
import os
import struct

from imds_guard.kernel import bpf, syscalls

_BUSY = 1 << 31
"""BPF_RINGBUF_BUSY_BIT: reserved by a program that has not committed it yet."""
_DISCARDED = 1 << 30
_HEADER_OCTETS = 8
_LENGTH = struct.Struct("=I")


class RingBuffer:
    """The one consumer of a ring buffer: two of them would steal each other's records. It keeps ``fd``, and closes it.

    Positions and lengths are read through memoryviews of C types, which copy one aligned word at a time, so that none
    is seen half written. Raises OSError.
    """

    def __init__(self, fd: int) -> None:
        page = mmap.PAGESIZE
        try:
            self._size = bpf.describe_map(fd)[1].max_entries
            self._consumer_page = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            self._rest = mmap.mmap(fd, page + 2 * self._size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        except OSError:
            os.close(fd)
            raise
        self._fd = fd
        self._consumer = memoryview(self._consumer_page).cast("Q")
        self._producer = memoryview(self._rest)[:page].cast("Q")
        self._data = memoryview(self._rest)[page:]
        self._words = self._data.cast("I")

    def fileno(self) -> int:
        """For poll(2): readable while there is a record that is not read."""
        return self._fd

    def close(self) -> None:
        """Unmaps the pages and closes the file descriptor. What was not read stays for the next reader."""
        for view in (self._words, self._data, self._producer, self._consumer):
            view.release()
        self._rest.close()
        self._consumer_page.close()
        os.close(self._fd)

    def read(self, at_most: int = 8192) -> list[bytes]:
        """The records that are complete, oldest first; fewer than there are when one is still being written.

        Three places need order between memory accesses (the kernel's part is an xchg() and its acquire and release
        accesses): lengths after the producer's position, data after lengths, and the consumer's position after the
        data. The last store must also be seen before the next look for records, or the kernel, which wakes only a
        reader that has caught up, might not wake us. Python has no barriers; _barrier() is one.
        """
        begin = self._consumer[0]
        end = self._producer[0]
        if begin == end:
            return []
        _barrier()
        places, position = self._scan(begin, end, at_most)
        _barrier()
        records = [bytes(self._data[at : at + length]) for at, length in places]
        _barrier()
        self._consumer[0] = position
        _barrier()
        return records

    def _scan(self, position: int, end: int, at_most: int) -> tuple[list[tuple[int, int]], int]:
        """(place in the data, length) of each complete record, and the position behind the last one."""
        places: list[tuple[int, int]] = []
        while position < end and len(places) < at_most:
            at = position & (self._size - 1)
            header = self._words[at // _LENGTH.size]
            if header & _BUSY:
                break
            length = header & ~_DISCARDED
            if not header & _DISCARDED:
                places.append((at + _HEADER_OCTETS, length))
            position += _HEADER_OCTETS + (length + 7) // 8 * 8
        return places, position


def _barrier() -> None:
    """A full memory barrier for the calling thread.

    MEMBARRIER_CMD_GLOBAL_EXPEDITED begins and ends with smp_mb() (membarrier_global_expedited() in
    kernel/sched/membarrier.c); with one CPU it does nothing, and nothing is needed. It interrupts no other CPU unless a
    process there has registered for it.
    """
    syscalls.membarrier(syscalls.MEMBARRIER_GLOBAL_EXPEDITED)
