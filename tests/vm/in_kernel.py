# SPDX-License-Identifier: Apache-2.0
"""Runs instructions in the kernel, by BPF_PROG_TEST_RUN: nothing is attached."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_uint32, c_uint64

import pytest

from imds_guard.kernel import bpf
from imds_guard.kernel.bpf.attr import Command
from imds_guard.kernel.bpf.syscall import call


class TestRun(ctypes.Structure):
    """union bpf_attr: test."""

    __test__ = False  # pytest
    _fields_ = [
        *((name, c_uint32) for name in ("prog_fd", "retval", "data_size_in", "data_size_out")),
        *((name, c_uint64) for name in ("data_in", "data_out")),
        *((name, c_uint32) for name in ("repeat", "duration", "ctx_size_in", "ctx_size_out")),
        *((name, c_uint64) for name in ("ctx_in", "ctx_out")),
    ]


def need_bpf() -> None:
    """Skips the test where programs can't be loaded."""
    if os.geteuid() != 0:
        pytest.skip("loading programs needs root")


@contextmanager
def made_map(shape: bpf.MapShape) -> Iterator[int]:
    """A map of the kernel."""
    fd = bpf.map_create(shape, "ig_test")
    try:
        yield fd
    finally:
        os.close(fd)


def run_once(instructions: bytes) -> int:
    """What a program for a packet returns."""
    fd = bpf.prog_load(instructions, "ig_test", bpf.AttachType.CGROUP_INET_EGRESS)
    try:
        packet = ctypes.create_string_buffer(64)  # the least that the kernel takes is an Ethernet header
        attr = TestRun(prog_fd=fd, data_size_in=len(packet), data_in=ctypes.addressof(packet))
        call(Command.PROG_TEST_RUN, attr)
        return int(attr.retval)
    finally:
        os.close(fd)


def run_packet(program: int, packet: bytes, ethertype: int) -> int | None:
    """What a program returns for a packet from its IP header on. None where the kernel does not take the packet.

    The kernel's Ethernet header is not part of what the program sees: bpf_prog_test_run_skb() in net/bpf/test_run.c.
    """
    frame = ctypes.create_string_buffer(bytes(12) + ethertype.to_bytes(2, "big") + packet, 14 + len(packet))
    attr = TestRun(prog_fd=program, data_size_in=len(frame), data_in=ctypes.addressof(frame))
    try:
        call(Command.PROG_TEST_RUN, attr)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise
    return int(attr.retval)
