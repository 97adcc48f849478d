# SPDX-License-Identifier: Apache-2.0
"""The structs of tests/vm/c/machine.h that Python fills and reads. library.py compares their sizes."""

from __future__ import annotations

import ctypes
import enum
from ctypes import c_int32, c_uint8, c_uint16, c_uint32, c_uint64


class Trap(enum.IntFlag):
    """enum trap: what a program must never do."""

    OPCODE = 1 << 0
    HELPER = 1 << 1
    ARGUMENT = 1 << 2
    LOAD = 1 << 3
    STORE = 1 << 4
    KERNEL_LOAD = 1 << 5
    KERNEL_READ = 1 << 6
    JUMP = 1 << 7
    ENDLESS = 1 << 8
    RETURN = 1 << 9
    REFERENCE = 1 << 10
    DEPTH = 1 << 11

    @classmethod
    def names(cls, bits: int) -> frozenset[str]:
        """The names of the bits that are set, in lower case: ``{"store", "return"}``."""
        return frozenset(one.name.lower() for one in cls if one & bits and one.name)


class TaskC(ctypes.Structure):
    """struct task_facts."""

    _fields_ = [
        *((name, c_uint64) for name in ("pid_tgid", "cgroup_id", "netns_cookie")),
        *((name, c_uint32) for name in ("fsuid", "fsgid", "flags", "pid_level", "user_ns_level", "user_ns_owner")),
        ("groups", c_uint32),
        ("claimed_groups", c_uint32),
        ("comm", c_uint8 * 16),
    ]


MARK_BYTES, EARLIER_BYTES = 64, 192


class SocketC(ctypes.Structure):
    """struct socket_facts."""

    _fields_ = [
        ("family", c_uint32),
        ("state", c_uint32),
        ("local", c_uint8 * 16),
        ("remote", c_uint8 * 16),
        ("local_port", c_uint16),
        ("remote_port", c_uint16),
        ("device", c_uint32),
        ("full", c_uint32),
        ("type", c_uint32),
        ("protocol", c_uint32),
        ("snd_una", c_uint32),
        ("bytes_acked", c_uint64),
        ("marked", c_uint32),
        ("marked_earlier", c_uint32),
        ("filter_marked", c_uint32),
        ("filter_mark", c_uint32 * 2),
        ("pad", c_uint32),
        ("mark", c_uint8 * MARK_BYTES),
        ("earlier", c_uint8 * EARLIER_BYTES),
    ]


ATTEMPT_SOCKETS = 2


class AttemptC(ctypes.Structure):
    """struct attempt."""

    _fields_ = [
        ("family", c_uint32),
        ("protocol", c_uint32),
        ("to", c_uint8 * 16),
        ("port", c_uint32),
        ("message_source", c_uint8 * 16),
        ("is_ipv4", c_uint32),
        ("is_message", c_uint32),
        ("repeat", c_uint32),
        ("others_len", c_uint32),
        ("socket", SocketC),
        ("others", SocketC * ATTEMPT_SOCKETS),
    ]


class PacketC(ctypes.Structure):
    """struct packet."""

    _fields_ = [
        ("protocol", c_uint32),
        ("ifindex", c_uint32),
        ("uid", c_uint32),
        ("socket", c_int32),
        ("len", c_uint32),
    ]


CASE_SOCKETS = 4


class PacketCaseC(ctypes.Structure):
    """struct packet_case."""

    _fields_ = [
        ("packet", PacketC),
        ("bytes_at", c_uint32),
        ("sockets_len", c_uint32),
        ("pad", c_uint32),
        ("sockets", SocketC * CASE_SOCKETS),
    ]


COVERED_WORDS = 96


class ReplayC(ctypes.Structure):
    """struct replay."""

    _fields_ = [
        *((name, c_uint32) for name in ("slot", "task", "fail_first", "fail_last", "fail_load", "ring_full")),
        ("is_packet", c_uint32),
        ("attempt", AttemptC),
        ("packet", PacketCaseC),
    ]


CALLBACK = ctypes.CFUNCTYPE(None, c_uint32)


class ControlsC(ctypes.Structure):
    """struct controls."""

    _fields_ = [
        *((name, c_uint32) for name in ("fail_first", "fail_last", "fail_load", "callback_at")),
        ("callback", CALLBACK),
        ("time_ns", c_uint64),
        ("step_limit", c_uint64),
        ("ring_full", c_uint32),
        ("keep_results", c_uint32),
    ]


COUNTS, EVENT_BYTES, ROW_KEY_BYTES, ROW_BYTES = 64, 128, 12, 64


class OutcomeC(ctypes.Structure):
    """struct outcome."""

    _fields_ = [
        ("returned", c_uint64),
        *((name, c_uint32) for name in ("traps", "events", "rows", "marked", "marked_earlier", "port")),
        ("counts", c_uint8 * COUNTS),
        ("event", c_uint8 * EVENT_BYTES),
        ("row_key", c_uint8 * ROW_KEY_BYTES),
        ("row", c_uint8 * ROW_BYTES),
        ("mark", c_uint8 * MARK_BYTES),
        ("earlier", c_uint8 * EARLIER_BYTES),
        ("to", c_uint8 * 16),
        ("pad_to_words", c_uint8 * 4),
    ]


class CallC(ctypes.Structure):
    """struct call."""

    _fields_ = [("helper", c_uint16), ("map", c_uint16), ("instruction", c_uint32)]


LAYOUT_FIELDS = 12
LayoutC = c_int32 * LAYOUT_FIELDS
"""struct layout."""

SIZES = (TaskC, SocketC, AttemptC, PacketC, ControlsC, OutcomeC, CallC, LayoutC, PacketCaseC, ReplayC)
"""In the order of vm_sizes()."""
