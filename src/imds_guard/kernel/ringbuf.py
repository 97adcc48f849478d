# SPDX-License-Identifier: Apache-2.0
"""Reads a BPF ring buffer (BPF_MAP_TYPE_RINGBUF) by mmap(2) of its pages.

Layout and protocol: Documentation/bpf/ringbuf.rst and kernel/bpf/ringbuf.c in Linux. Page 0 holds the consumer's
position and is writable. Page 1 holds the producer's position. The data follows, mapped twice in a row, so that no
record is split. A position only grows; its low bits are the offset in the data. A record has a header of eight bytes
(the length with two flag bits, and a page offset for the kernel's use) and its data, padded to eight bytes.
"""

from __future__ import annotations

import mmap
import os
import struct

from imds_guard.kernel import bpf, syscalls

_BUSY = 1 << 31
"""BPF_RINGBUF_BUSY_BIT: a program has reserved the record and not committed it yet."""
_DISCARDED = 1 << 30
_HEADER_BYTES = 8
_LENGTH = struct.Struct("=I")


class RingBuffer:
    """The only consumer of a ring buffer: a second one would take records from the first. It owns and closes ``fd``.

    Positions and lengths are read through memoryviews of C types, which copy one aligned word at a time, so that no
    value is read half written. Raises OSError.
    """

    def __init__(self, fd: int) -> None:
        page = mmap.PAGESIZE
        try:
            self._size = bpf.describe_map(fd)[1].max_entries
            self._consumer_page = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            self._rest = mmap.mmap(fd, page + 2 * self._size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
            for pages in (self._consumer_page, self._rest):
                pages.madvise(mmap.MADV_DONTFORK)  # a child that hangs in the kernel would keep the map alive
        except OSError:
            os.close(fd)
            raise
        self._fd = fd
        self._consumer = memoryview(self._consumer_page).cast("Q")
        self._producer = memoryview(self._rest)[:page].cast("Q")
        self._data = memoryview(self._rest)[page:]
        self._headers = self._data.cast("I")

    def fileno(self) -> int:
        """For poll(2): readable while there are unread records."""
        return self._fd

    def close(self) -> None:
        """Unmaps the pages and closes the file descriptor. Unread records stay for the next reader."""
        for view in (self._headers, self._data, self._producer, self._consumer):
            view.release()
        self._rest.close()
        self._consumer_page.close()
        os.close(self._fd)

    def read(self, maximum: int = 8192) -> list[bytes]:
        """The complete records, oldest first, up to the first one that is still being written.

        Memory accesses must be ordered in three places: lengths after the producer's position, data after lengths, and
        the consumer's position after the data. (The kernel's side is an xchg() and its acquire and release accesses.)
        The kernel must also see the last store before the next read for records: it wakes only a reader that has caught
        up. Python has no memory barriers; _barrier() is one.
        """
        begin = self._consumer[0]
        end = self._producer[0]
        if begin == end:
            return []
        _barrier()
        places, position = self._scan(begin, end, maximum)
        _barrier()
        records = [bytes(self._data[at : at + length]) for at, length in places]
        _barrier()
        self._consumer[0] = position
        _barrier()
        return records

    def _scan(self, position: int, end: int, maximum: int) -> tuple[list[tuple[int, int]], int]:
        """(offset in the data, length) of each complete record, and the position after the last one."""
        places: list[tuple[int, int]] = []
        while position < end and len(places) < maximum:
            at = position & (self._size - 1)
            header = self._headers[at // _LENGTH.size]
            if header & _BUSY:
                break
            length = header & ~_DISCARDED
            if not header & _DISCARDED:
                places.append((at + _HEADER_BYTES, length))
            position += _HEADER_BYTES + (length + 7) // 8 * 8
        return places, position


def _barrier() -> None:
    """A full memory barrier for the calling thread.

    MEMBARRIER_CMD_GLOBAL_EXPEDITED begins and ends with smp_mb() (membarrier_global_expedited() in
    kernel/sched/membarrier.c). With one CPU it does nothing, and no barrier is needed. It interrupts only CPUs that run
    a process which has registered for it.
    """
    syscalls.membarrier(syscalls.MEMBARRIER_GLOBAL_EXPEDITED)
