# SPDX-License-Identifier: Apache-2.0
"""The ABI of bpf/imds_guard.h in Python: the maps, their records, the keys of addresses.

Integers are in the machine's byte order, addresses in network byte order. tests/unit/test_abi.py compares sizes and
offsets with those of the C structs.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import NamedTuple

from imds_guard.kernel import bpf
from imds_guard.policy.model import Address, Policy

ABI = 3
MAP_BASE = 0x494D4400
HOOK_PLACEHOLDER = 0x494D44FF
CALLBACKS = {0x494D4500: "ig_walk_four", 0x494D4501: "ig_search_one"}
"""Functions that the hooks pass to bpf_loop(), by the placeholder that stands for each in the instructions."""


class Map(enum.IntEnum):
    """enum ig_map."""

    CONFIG = 0
    SETTINGS = 1
    ADDRESS_BITMAP = 2
    ENDPOINTS = 3
    LISTS = 4
    MEMBERS = 5
    GROUPS = 6
    LOCKS = 7
    COUNTERS = 8
    EVENTS = 9
    REPORT = 10
    WATCH = 11
    MARKS = 12
    EARLIER = 13
    SHARES = 14
    FILTERS = 15
    TARGETS = 16
    FILTER_TEXTS = 17
    FILTER_MARKS = 18

    @property
    def pin_name(self) -> str:
        """The name of the map's pin. Other versions of imds-guard open the map by it, so it never changes."""
        return "first_look" if self is Map.ADDRESS_BITMAP else self.name.lower()


GENERATIONS = (1, 2)

ARRAY_KEY = struct.Struct("=I")
CONFIG = struct.Struct("=B7x")
SETTINGS = struct.Struct("=4I16sI4xQ")  # valid, mode, allow_containers, abi, digest, strict, serial
"""``valid``, ``abi`` and ``serial`` stay where they are in every layout: an upgrade reads them from the old maps."""
MODE_ENFORCE, MODE_AUDIT = 1, 2

HOST_BITS_LOG2 = 18
HOST_BYTES = 1 << (HOST_BITS_LOG2 - 3)
NETWORK_BYTES = 65536 // 8
ADDRESS_BITMAP_BYTES = HOST_BYTES + 2 * NETWORK_BYTES

ENDPOINT_KEY = struct.Struct("=IB3x16s")  # prefixlen, generation, address
ENDPOINT_KEY_FIXED_BITS = 32
RANGE = struct.Struct("=4HBBH")  # low, high, lock, list, protocols, flags, target
RANGES = 24
ENDPOINT_HEAD = struct.Struct("=I4x")
ENDPOINT_BYTES = ENDPOINT_HEAD.size + RANGES * RANGE.size
TCP, UDP = 1, 2
INHERITED = 1
NO_LIST, FILTER_LIST = 0xFFFF, 0xFFFE

LISTS = 4096
LIST_VALID, LIST_DEFAULT_ALLOW, LIST_GROUPS, LIST_DENY_GROUPS, LIST_SMALL, LIST_USERS = 1, 2, 4, 8, 16, 32
LIST_FILTER_GROUPS = 64
GID_BITMAP_WORDS = 16
LIST = struct.Struct(f"=II{GID_BITMAP_WORDS}II4x")  # flags, zero, gid_bitmap, everyone

MEMBER = struct.Struct("=BBHI")  # generation, kind, list, id
USER, GROUP = 1, 2
MEMBER_VALUE = struct.Struct("=I")
ALLOW, DENY, FILTER_ACCOUNT = 1, 2, 128
FILTERS = 24
FIRST_FILTER_BIT = 8
MEMBERS = 262144

SMALL_KEY = struct.Struct("=BxH")  # generation, number of a list or a lock
MAX_SEARCHED_GROUPS = 128
GROUPS = struct.Struct(f"=II{MAX_SEARCHED_GROUPS}I")  # denied, len, gid

LOCKS = 32768
LOCK_NAME_BYTES = 64
LOCK = struct.Struct(f"=HH{LOCK_NAME_BYTES}s")  # list, pad, name

ENDPOINTS = 65536

TARGETS, NUMBERS = 254, 254
FILTER_KEY = struct.Struct("=BB2xI")  # generation, target, bit
FILTER = struct.Struct("=QB7x")  # digest, number
TARGET = struct.Struct("=16sH6x")  # address, port; its key is a SMALL_KEY
FILTER_TEXT_KEY = struct.Struct("=BBH")  # generation, filter, piece
FILTER_PIECES, FILTER_PIECE_BYTES = 4096, 1024
FILTER_MARK = struct.Struct("=Q")  # digest

REASONS = 19
LOST_EVENTS, REPORT_OVERFLOW, COUNTERS = REASONS, REASONS + 1, REASONS + 2
COUNTER = struct.Struct("=QQ")  # enforced, audited

HOOK_CONNECT4, HOOK_CONNECT6, HOOK_SENDMSG4, HOOK_SENDMSG6, HOOK_EGRESS = 1, 2, 3, 4, 5
HOOK_GETPEERNAME4, HOOK_GETPEERNAME6 = 6, 7
VERDICT_DENIED, VERDICT_AUDITED, VERDICT_ALLOWED = 1, 2, 3
COMM_BYTES = 16
NO_LOCK = 0xFFFF

EVENTS_BYTES = 1 << 19
EVENT = struct.Struct(f"=3Q5IHH16s{COMM_BYTES}s5B3x")
"""time_ns, cgroup_id, netns_cookie, pid, tgid, fsuid, fsgid, groups_len, port, lock, address, comm, generation, hook,
reason, verdict, protocol."""

REPORT_ROWS = 16384
REPORT_KEY = struct.Struct("=BBHB3xI")  # generation, reason, lock, who, id
WHO_USER, WHO_NAMESPACES, WHO_OTHERS = 1, 2, 3
REPORT = struct.Struct(f"=3Q16sHB5x{COMM_BYTES}s")  # count, first_ns, last_ns, address, port, protocol, comm

SHARE_IDS, ROWS_OF_ACCOUNT, ROWS_OF_BLOCK = 65536, 256, 512
SHARE_KEY = struct.Struct("=B3xI")  # generation, first
SHARE = struct.Struct("=I")  # rows

GENERATION_AT: dict[Map, int] = {
    Map.ENDPOINTS: 4,
    Map.MEMBERS: 0,
    Map.GROUPS: 0,
    Map.LOCKS: 0,
    Map.REPORT: 0,
    Map.SHARES: 0,
    Map.FILTERS: 0,
    Map.TARGETS: 0,
    Map.FILTER_TEXTS: 0,
}
"""Where in the key a map has the generation."""

WATCH = struct.Struct("=I")  # log_allowed

MARK_USER, MARK_GROUP, MARK_DEFAULT, MARK_AUDIT, MARK_OPEN, MARK_ACCEPTED, MARK_FILTER = 1, 2, 3, 4, 5, 6, 7
MARK = struct.Struct("=QIIHBB4x")  # serial, fsuid, gid, list, kind, container_unchecked
EARLIER_MARKS = 8

SHAPES: dict[Map, bpf.MapShape] = {
    Map.CONFIG: bpf.MapShape(bpf.MapType.ARRAY, 4, CONFIG.size, 1),
    Map.SETTINGS: bpf.MapShape(bpf.MapType.ARRAY, 4, SETTINGS.size, 3),
    Map.ADDRESS_BITMAP: bpf.MapShape(bpf.MapType.ARRAY, 4, ADDRESS_BITMAP_BYTES, 3),
    Map.ENDPOINTS: bpf.MapShape(bpf.MapType.LPM_TRIE, ENDPOINT_KEY.size, ENDPOINT_BYTES, ENDPOINTS, bpf.F_NO_PREALLOC),
    Map.LISTS: bpf.MapShape(bpf.MapType.ARRAY, 4, LIST.size, 2 * LISTS),
    Map.MEMBERS: bpf.MapShape(bpf.MapType.HASH, MEMBER.size, MEMBER_VALUE.size, MEMBERS, bpf.F_NO_PREALLOC),
    Map.GROUPS: bpf.MapShape(bpf.MapType.HASH, SMALL_KEY.size, GROUPS.size, 2 * LISTS, bpf.F_NO_PREALLOC),
    Map.LOCKS: bpf.MapShape(bpf.MapType.HASH, SMALL_KEY.size, LOCK.size, LOCKS, bpf.F_NO_PREALLOC),
    Map.COUNTERS: bpf.MapShape(bpf.MapType.PERCPU_ARRAY, 4, COUNTER.size, COUNTERS),
    Map.EVENTS: bpf.MapShape(bpf.MapType.RINGBUF, 0, 0, EVENTS_BYTES),
    Map.REPORT: bpf.MapShape(bpf.MapType.HASH, REPORT_KEY.size, REPORT.size, REPORT_ROWS, bpf.F_NO_PREALLOC),
    Map.WATCH: bpf.MapShape(bpf.MapType.ARRAY, 4, WATCH.size, 1),
    Map.MARKS: bpf.MapShape(bpf.MapType.SK_STORAGE, 4, MARK.size, 0, bpf.F_NO_PREALLOC),
    Map.EARLIER: bpf.MapShape(bpf.MapType.SK_STORAGE, 4, EARLIER_MARKS * MARK.size, 0, bpf.F_NO_PREALLOC),
    Map.SHARES: bpf.MapShape(bpf.MapType.HASH, SHARE_KEY.size, SHARE.size, REPORT_ROWS, bpf.F_NO_PREALLOC),
    Map.FILTERS: bpf.MapShape(bpf.MapType.HASH, FILTER_KEY.size, FILTER.size, 2 * FILTERS * TARGETS, bpf.F_NO_PREALLOC),
    Map.TARGETS: bpf.MapShape(bpf.MapType.HASH, SMALL_KEY.size, TARGET.size, 2 * TARGETS, bpf.F_NO_PREALLOC),
    Map.FILTER_TEXTS: bpf.MapShape(
        bpf.MapType.HASH, FILTER_TEXT_KEY.size, FILTER_PIECE_BYTES, FILTER_PIECES, bpf.F_NO_PREALLOC
    ),
    Map.FILTER_MARKS: bpf.MapShape(bpf.MapType.SK_STORAGE, 4, FILTER_MARK.size, 0, bpf.F_NO_PREALLOC),
}


class HookShape(NamedTuple):
    """A hook: its attach type, the prefix of our program's name, enum ig_hook, and the function in C."""

    attach_type: int
    prefix: str
    number: int
    function: str = "ig_sock_addr"


HOOKS: dict[str, HookShape] = {
    "connect4": HookShape(bpf.AttachType.CGROUP_INET4_CONNECT, "ig_c4", HOOK_CONNECT4),
    "connect6": HookShape(bpf.AttachType.CGROUP_INET6_CONNECT, "ig_c6", HOOK_CONNECT6),
    "sendmsg4": HookShape(bpf.AttachType.CGROUP_UDP4_SENDMSG, "ig_s4", HOOK_SENDMSG4),
    "sendmsg6": HookShape(bpf.AttachType.CGROUP_UDP6_SENDMSG, "ig_s6", HOOK_SENDMSG6),
    "egress": HookShape(bpf.AttachType.CGROUP_INET_EGRESS, "ig_eg", HOOK_EGRESS, "ig_egress"),
    "getpeername4": HookShape(bpf.AttachType.CGROUP_INET4_GETPEERNAME, "ig_p4", HOOK_GETPEERNAME4, "ig_getpeername4"),
    "getpeername6": HookShape(bpf.AttachType.CGROUP_INET6_GETPEERNAME, "ig_p6", HOOK_GETPEERNAME6, "ig_getpeername6"),
}

EGRESS = "egress"
"""The hook that runs for every packet. It is attached in strict mode alone."""


GETPEERNAME = ("getpeername4", "getpeername6")
"""Hooks that show a redirected caller the endpoint. They are attached where the policy has filters."""

INDIFFERENT = (EGRESS, *GETPEERNAME)
"""Hooks where it does not matter which programs of others run before ours or behind: none can lead a connect away."""


def needed_hooks(policy: Policy | None) -> tuple[str, ...]:
    """The hooks that a policy needs; None: one that can't be read."""
    left_out = {
        EGRESS: policy is None or not policy.strict,
        **dict.fromkeys(GETPEERNAME, policy is None or not policy.filters),
    }
    return tuple(name for name in HOOKS if not left_out.get(name))


VERSION_DIGITS = 8


def program_name(hook: str, version: str) -> str:
    """``ig_c4_0123abcd``: bpftool shows it, and it tells our programs from others'."""
    return f"{HOOKS[hook].prefix}_{version}"


def version_in_name(hook: str, name: str) -> str | None:
    """The version in the name of one of our programs; None for a program that is not ours."""
    prefix = HOOKS[hook].prefix + "_"
    return name[len(prefix) :] if name.startswith(prefix) and len(name) == len(prefix) + VERSION_DIGITS else None


def share_of(identity: int) -> int:
    """ig_share_of(): the ID that the share of an ID begins with."""
    return identity if identity < SHARE_IDS else identity & ~(SHARE_IDS - 1)


def endpoint_value(ranges: Sequence[bytes]) -> bytes:
    """The value in Map.ENDPOINTS: its head, then packed RANGE records."""
    return (ENDPOINT_HEAD.pack(len(ranges)) + b"".join(ranges)).ljust(ENDPOINT_BYTES, b"\0")


def endpoint_ranges(value: bytes) -> list[tuple[int, ...]]:
    """The RANGE records in a value of Map.ENDPOINTS, unpacked."""
    count = min(ENDPOINT_HEAD.unpack_from(value)[0], RANGES)
    return [RANGE.unpack_from(value, ENDPOINT_HEAD.size + number * RANGE.size) for number in range(count)]


def list_key(generation: int, number: int) -> bytes:
    """The key in Map.LISTS of a list of a generation."""
    return ARRAY_KEY.pack((generation - 1) * LISTS + number)


def list_number(generation: int, key: bytes) -> int:
    """The number of the list that has this key in Map.LISTS."""
    return int(ARRAY_KEY.unpack(key)[0]) - (generation - 1) * LISTS


_MAPPED_PREFIX = bytes(10) + b"\xff\xff"


def address_bytes(address: Address) -> bytes:
    """16 bytes in network byte order; IPv4 as ``::ffff:a.b.c.d``."""
    return _MAPPED_PREFIX + address.packed if address.version == 4 else address.packed


def host_bit(address: bytes) -> int:
    """ig_host_bit() of address_bytes(): an index below 2 ** HOST_BITS_LOG2."""
    a, b, c, d = struct.unpack("=4I", address)
    mixed = (a * 0x9E3779B1 + b * 0x85EBCA77 + c * 0xC2B2AE3D + d * 0x27D4EB2F) & 0xFFFFFFFF
    mixed ^= mixed >> 15
    return int((mixed * 0x2C1B3C6D & 0xFFFFFFFF) >> (32 - HOST_BITS_LOG2))


def set_bit(bitmap: bytearray, base: int, bit: int) -> None:
    """Sets a bit of a bitmap that begins at byte ``base``: 32-bit words in the machine's byte order."""
    at = base + (bit >> 5) * 4
    word = struct.unpack_from("=I", bitmap, at)[0]
    struct.pack_into("=I", bitmap, at, word | 1 << (bit & 31))
