# SPDX-License-Identifier: Apache-2.0
"""The reader of BPF ring buffers, tested with a program that writes one record for each connect."""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from imds_guard.kernel import bpf
from imds_guard.kernel.abandonable import Worker
from imds_guard.kernel.cgroup import open_cgroup
from imds_guard.kernel.ringbuf import RingBuffer
from imds_guard.kernel.sandbox import Sandbox

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups and attaching programs needs root")

OCTETS = mmap.PAGESIZE
"""The smallest size, one page: 4 KiB on x86_64, and 4, 16 or 64 KiB on arm64."""

RESERVE, SUBMIT, DISCARD = 131, 132, 133  # numbers of helpers in include/uapi/linux/bpf.h


def _insn(code: int, dst: int = 0, src: int = 0, offset: int = 0, imm: int = 0) -> bytes:
    return struct.pack("=BBhi", code, src << 4 | dst, offset, imm)


def _call(number: int) -> bytes:
    return _insn(0x85, imm=number)


def _writer(fd: int, size: int, end: int) -> bytes:
    """r8 = ctx->user_port; record = reserve(size); record->word = r8; submit or discard it; return 1."""
    body = [
        _insn(0x61, 8, 1, 24),  # user_port, in network byte order
        _insn(0x18, 1, 1, 0, fd) + _insn(0),  # r1 = map
        _insn(0xB7, 2, imm=size),
        _insn(0xB7, 3, imm=0),
        _call(RESERVE),
        _insn(0x15, 0, offset=4),  # skip if nothing was reserved
        _insn(0x63, 0, 8, 0),
        _insn(0xBF, 1, 0),
        _insn(0xB7, 2, imm=0),
        _call(end),
        _insn(0xB7, 0, imm=1),
        _insn(0x95),
    ]
    return b"".join(body)


class Written:
    """A ring buffer, a cgroup whose connects are written to it, and its reader."""

    def __init__(self, sandbox: Sandbox, ring: RingBuffer) -> None:
        self.sandbox = sandbox
        self.ring = ring

    def connect(self, *ports: int) -> None:
        """Connects to each port, in this order."""

        def all_of_them() -> None:
            for port in ports:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
                    one.connect(("127.0.0.1", port))

        self.sandbox.call(all_of_them)

    def ports(self) -> list[int]:
        """The ports in the unread records."""
        return [socket.ntohs(struct.unpack_from("=I", record)[0]) for record in self.ring.read()]

    def readable(self, within_s: float = 0.0) -> bool:
        """Whether poll(2) reports the buffer readable."""
        return bool(select.select([self.ring], [], [], within_s)[0])


@contextmanager
def written(size: int = 12, end: int = SUBMIT) -> Iterator[Written]:
    with Sandbox() as sandbox, open_cgroup(sandbox.cgroup) as cgroup:
        fd = bpf.map_create(bpf.MapShape(bpf.MapType.RINGBUF, 0, 0, OCTETS), "ig_test_ring")
        program = bpf.prog_load(_writer(fd, size, end), "ig_test_writer", bpf.AttachType.CGROUP_INET4_CONNECT)
        link = bpf.link_create(program, cgroup.fd, bpf.AttachType.CGROUP_INET4_CONNECT)
        ring = RingBuffer(fd)
        try:
            yield Written(sandbox, ring)
        finally:
            ring.close()
            os.close(link)
            os.close(program)


def test_a_forked_child_does_not_keep_the_buffer() -> None:
    """One that hangs in the kernel would keep it for good. The parent still reads it."""

    def mapped(_: int) -> bool:
        with open("/proc/self/maps", encoding="utf-8") as file:
            return "anon_inode:bpf-map" in file.read()

    with written() as one, Worker(mapped) as worker:
        assert worker.ask(1, 10.0) is False
        assert mapped(1)
        one.connect(5)
        assert one.ports() == [5]


def test_records_are_read_in_order_and_once() -> None:
    with written() as one:
        assert not one.readable()
        one.connect(5, 6, 7)
        assert one.readable()
        assert one.ports() == [5, 6, 7]
        assert one.ports() == []
        assert not one.readable()


def test_a_record_has_the_length_that_was_reserved() -> None:
    with written(size=20) as one:
        one.connect(5)
        assert [len(record) for record in one.ring.read()] == [20]


def test_discarded_records_are_skipped() -> None:
    with written(end=DISCARD) as one:
        one.connect(5, 6)
        assert one.ports() == []
        assert not one.readable()


def test_positions_wrap_many_times() -> None:
    """A record of 24 bytes (with header and padding) does not divide the page, so that one crosses its end."""
    with written(size=13) as one:
        for begin in range(1, 10 * OCTETS // 24, 100):
            ports = list(range(begin, begin + 100))
            one.connect(*ports)
            assert one.ports() == ports


def test_a_full_buffer_keeps_the_oldest_records_and_has_space_once_they_are_read() -> None:
    with written(size=1016) as one:
        fits = OCTETS // 1024 - 1  # the kernel leaves at least one byte free
        one.connect(*range(1, fits + 8))
        assert one.ports() == list(range(1, fits + 1))
        one.connect(fits + 8)
        assert one.ports() == [fits + 8]


def test_records_can_be_read_in_parts() -> None:
    with written() as one:
        one.connect(5, 6, 7)
        assert len(one.ring.read(maximum=2)) == 2
        assert one.readable()
        assert one.ports() == [7]


def test_a_reader_that_has_caught_up_is_woken() -> None:
    """The kernel wakes a reader only if the consumer's position is at the record that it commits."""
    count = 2000
    with written() as one:
        go, gone = os.pipe()

        def paced() -> None:
            os.close(gone)
            for port in range(1, count + 1):
                os.read(go, 1)
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                    client.connect(("127.0.0.1", port))

        one.sandbox.spawn(paced)
        os.close(go)
        with os.fdopen(gone, "wb", buffering=0) as pace:
            for port in range(1, count + 1):
                pace.write(b".")
                assert one.readable(10), port
                assert one.ports() == [port]


def test_unread_records_stay_for_the_next_reader() -> None:
    with written() as one:
        one.connect(5, 6)
        assert len(one.ring.read(maximum=1)) == 1
        again = RingBuffer(os.dup(one.ring.fileno()))
        try:
            assert [socket.ntohs(struct.unpack_from("=I", record)[0]) for record in again.read()] == [6]
        finally:
            again.close()
