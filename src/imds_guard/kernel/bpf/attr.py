# SPDX-License-Identifier: Apache-2.0
"""The numbers and structs of bpf(2), with the kernel's own names. Source: include/uapi/linux/bpf.h.

Each class below that is not an enum is a ctypes struct: a member of ``union bpf_attr``, or the kernel's description of
an object. Members that nobody sets are zero, which the kernel takes as "not given". Buffers are given by their address,
in a field of type c_uint64. The kernel aligns these to 8 bytes and 32-bit x86 to 4: padding is explicit.
"""

from __future__ import annotations

import ctypes
import enum
from ctypes import c_char, c_uint8, c_uint32, c_uint64


class Command(enum.IntEnum):
    """enum bpf_cmd."""

    MAP_CREATE = 0
    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    MAP_DELETE_ELEM = 3
    MAP_GET_NEXT_KEY = 4
    PROG_LOAD = 5
    OBJ_PIN = 6
    OBJ_GET = 7
    PROG_ATTACH = 8
    PROG_DETACH = 9
    PROG_TEST_RUN = 10
    PROG_GET_NEXT_ID = 11
    MAP_GET_NEXT_ID = 12
    PROG_GET_FD_BY_ID = 13
    MAP_GET_FD_BY_ID = 14
    OBJ_GET_INFO_BY_FD = 15
    PROG_QUERY = 16
    BTF_LOAD = 18
    MAP_LOOKUP_BATCH = 24
    MAP_UPDATE_BATCH = 26
    MAP_DELETE_BATCH = 27
    LINK_CREATE = 28
    LINK_UPDATE = 29
    LINK_GET_FD_BY_ID = 30
    LINK_GET_NEXT_ID = 31
    ENABLE_STATS = 32
    LINK_DETACH = 34


class MapType(enum.IntEnum):
    """enum bpf_map_type."""

    HASH = 1
    ARRAY = 2
    PERCPU_ARRAY = 6
    LPM_TRIE = 11
    ARRAY_OF_MAPS = 12
    SK_STORAGE = 24
    RINGBUF = 27


class ProgType(enum.IntEnum):
    """enum bpf_prog_type."""

    CGROUP_SKB = 8
    CGROUP_SOCK_ADDR = 18


class AttachType(enum.IntEnum):
    """enum bpf_attach_type."""

    CGROUP_INET_EGRESS = 1
    CGROUP_INET4_CONNECT = 10
    CGROUP_INET6_CONNECT = 11
    CGROUP_UDP4_SENDMSG = 14
    CGROUP_UDP6_SENDMSG = 15
    CGROUP_INET4_GETPEERNAME = 29
    CGROUP_INET6_GETPEERNAME = 30


class LinkType(enum.IntEnum):
    """enum bpf_link_type."""

    CGROUP = 3


F_NO_PREALLOC = 1
"""Flag of BPF_MAP_CREATE."""
F_ALLOW_OVERRIDE, F_ALLOW_MULTI = 1, 2
"""Flags with which a program was attached to a cgroup: programs of cgroups below replace it; others run beside it.

With neither, no other program can be attached to the cgroup or below it. Links always have F_ALLOW_MULTI.
"""
F_BEFORE = 8
"""Flag of BPF_LINK_CREATE: attach in front of all other programs of the cgroup."""
F_QUERY_EFFECTIVE = 1
"""Flag of BPF_PROG_QUERY: the programs that run for the processes of the cgroup, those of cgroups above included."""


def object_name(text: str) -> bytes:
    """At most 15 bytes of [A-Za-z0-9_.]: bpf_obj_name_cpy() in kernel/bpf/syscall.c."""
    return text.encode()[:15]


# --- members of union bpf_attr --------------------------------------------------------------------------------------


class MapCreate(ctypes.Structure):
    """BPF_MAP_CREATE."""

    _fields_ = [
        ("map_type", c_uint32),
        ("key_size", c_uint32),
        ("value_size", c_uint32),
        ("max_entries", c_uint32),
        ("map_flags", c_uint32),
        ("inner_map_fd", c_uint32),
        ("numa_node", c_uint32),
        ("map_name", c_char * 16),
        ("map_ifindex", c_uint32),
        ("btf_fd", c_uint32),
        ("btf_key_type_id", c_uint32),
        ("btf_value_type_id", c_uint32),
    ]


class Element(ctypes.Structure):
    """BPF_MAP_*_ELEM and BPF_MAP_GET_NEXT_KEY. ``value`` is ``next_key`` for the latter: the two share their place."""

    _fields_ = [
        ("map_fd", c_uint32),
        ("_padding", c_uint32),
        ("key", c_uint64),
        ("value", c_uint64),
        ("flags", c_uint64),
    ]


class Batch(ctypes.Structure):
    """BPF_MAP_*_BATCH: ``union bpf_attr.batch``. The kernel writes to ``count`` how many elements it has done."""

    _fields_ = [
        ("in_batch", c_uint64),
        ("out_batch", c_uint64),
        ("keys", c_uint64),
        ("values", c_uint64),
        ("count", c_uint32),
        ("map_fd", c_uint32),
        ("elem_flags", c_uint64),
        ("flags", c_uint64),
    ]


class ProgLoad(ctypes.Structure):
    """BPF_PROG_LOAD."""

    _fields_ = [
        ("prog_type", c_uint32),
        ("insn_cnt", c_uint32),
        ("insns", c_uint64),
        ("license", c_uint64),
        ("log_level", c_uint32),
        ("log_size", c_uint32),
        ("log_buf", c_uint64),
        ("kern_version", c_uint32),
        ("prog_flags", c_uint32),
        ("prog_name", c_char * 16),
        ("prog_ifindex", c_uint32),
        ("expected_attach_type", c_uint32),
        ("prog_btf_fd", c_uint32),
        ("func_info_rec_size", c_uint32),
        ("func_info", c_uint64),
        ("func_info_cnt", c_uint32),
    ]


class FuncInfo(ctypes.Structure):
    """struct bpf_func_info: where a function begins, in instructions, and its type in the program's BTF."""

    _fields_ = [("insn_off", c_uint32), ("type_id", c_uint32)]


class BtfLoad(ctypes.Structure):
    """BPF_BTF_LOAD."""

    _fields_ = [
        ("btf", c_uint64),
        ("btf_log_buf", c_uint64),
        ("btf_size", c_uint32),
        ("btf_log_size", c_uint32),
        ("btf_log_level", c_uint32),
    ]


class Pin(ctypes.Structure):
    """BPF_OBJ_PIN and BPF_OBJ_GET."""

    _fields_ = [("pathname", c_uint64), ("bpf_fd", c_uint32), ("file_flags", c_uint32)]


class GetId(ctypes.Structure):
    """BPF_*_GET_NEXT_ID and BPF_*_GET_FD_BY_ID. ``id`` is ``start_id`` for the former."""

    _fields_ = [("id", c_uint32), ("next_id", c_uint32), ("open_flags", c_uint32)]


class Info(ctypes.Structure):
    """BPF_OBJ_GET_INFO_BY_FD: ``union bpf_attr.info``."""

    _fields_ = [("bpf_fd", c_uint32), ("info_len", c_uint32), ("info", c_uint64)]


class Query(ctypes.Structure):
    """BPF_PROG_QUERY: ``union bpf_attr.query``. The kernel writes to ``prog_cnt`` how many programs there are."""

    _fields_ = [
        ("target_fd", c_uint32),
        ("attach_type", c_uint32),
        ("query_flags", c_uint32),
        ("attach_flags", c_uint32),
        ("prog_ids", c_uint64),
        ("prog_cnt", c_uint32),
    ]


class LinkCreate(ctypes.Structure):
    """BPF_LINK_CREATE: ``union bpf_attr.link_create``."""

    _fields_ = [("prog_fd", c_uint32), ("target_fd", c_uint32), ("attach_type", c_uint32), ("flags", c_uint32)]


class LinkUpdate(ctypes.Structure):
    """BPF_LINK_UPDATE: ``union bpf_attr.link_update``."""

    _fields_ = [("link_fd", c_uint32), ("new_prog_fd", c_uint32), ("flags", c_uint32), ("old_prog_fd", c_uint32)]


class LinkDetach(ctypes.Structure):
    """BPF_LINK_DETACH: ``union bpf_attr.link_detach``."""

    _fields_ = [("link_fd", c_uint32)]


class EnableStats(ctypes.Structure):
    """BPF_ENABLE_STATS: ``union bpf_attr.enable_stats``. Type 0 is BPF_STATS_RUN_TIME."""

    _fields_ = [("type", c_uint32)]


# --- descriptions of objects (BPF_OBJ_GET_INFO_BY_FD) ---------------------------------------------------------------


class ProgInfo(ctypes.Structure):
    """struct bpf_prog_info, up to ``run_cnt``."""

    _fields_ = [
        ("type", c_uint32),
        ("id", c_uint32),
        ("tag", c_uint8 * 8),
        ("jited_prog_len", c_uint32),
        ("xlated_prog_len", c_uint32),
        ("jited_prog_insns", c_uint64),
        ("xlated_prog_insns", c_uint64),
        ("load_time", c_uint64),
        ("created_by_uid", c_uint32),
        ("nr_map_ids", c_uint32),
        ("map_ids", c_uint64),
        ("name", c_char * 16),
        ("ifindex", c_uint32),
        ("gpl_compatible", c_uint32),
        ("netns_dev", c_uint64),
        ("netns_ino", c_uint64),
        ("nr_jited_ksyms", c_uint32),
        ("nr_jited_func_lens", c_uint32),
        ("jited_ksyms", c_uint64),
        ("jited_func_lens", c_uint64),
        ("btf_id", c_uint32),
        ("func_info_rec_size", c_uint32),
        ("func_info", c_uint64),
        ("nr_func_info", c_uint32),
        ("nr_line_info", c_uint32),
        ("line_info", c_uint64),
        ("jited_line_info", c_uint64),
        ("nr_jited_line_info", c_uint32),
        ("line_info_rec_size", c_uint32),
        ("jited_line_info_rec_size", c_uint32),
        ("nr_prog_tags", c_uint32),
        ("prog_tags", c_uint64),
        ("run_time_ns", c_uint64),
        ("run_cnt", c_uint64),
    ]


class MapInfo(ctypes.Structure):
    """struct bpf_map_info, up to ``map_flags``."""

    _fields_ = [
        ("type", c_uint32),
        ("id", c_uint32),
        ("key_size", c_uint32),
        ("value_size", c_uint32),
        ("max_entries", c_uint32),
        ("map_flags", c_uint32),
    ]


class LinkInfo(ctypes.Structure):
    """struct bpf_link_info; the last two fields are its member ``cgroup``, and other data for links of other types."""

    _fields_ = [
        ("type", c_uint32),
        ("id", c_uint32),
        ("prog_id", c_uint32),
        ("_padding", c_uint32),
        ("cgroup_id", c_uint64),
        ("attach_type", c_uint32),
    ]
