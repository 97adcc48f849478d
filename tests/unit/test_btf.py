# SPDX-License-Identifier: Apache-2.0
"""The BTF reader, compared with clang and with the running kernel, and on broken blobs."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imds_guard.backends.ebpf import program
from imds_guard.errors import Unsupported
from imds_guard.kernel import btf
from imds_guard.kernel.btf import Btf
from tests.clang import compiled_for_bpf
from tests.strategies import patient

# Types of nearly all kinds are between the structs that the tests look up, so the reader must skip each kind.
SOURCE = r"""
typedef unsigned int u32;
enum small { FIRST, SECOND = -3 };
enum wide { HUGE = 0x100000000ull, MORE };
struct forward;
typedef int (*callback)(const char *name, u32 flags, ...);
float a_float;
static volatile int a_static;
int (*const a_pointer)(struct forward *, enum small) = 0;
u32 an_array[3][7];
enum wide a_wide;

struct inner { char a; long long b; };
struct plain { char c; short s; int i; void *p; char tail[3]; };
struct nested {
	int before;
	struct { char x; union { u32 in_union; long long other; }; struct inner named; };
	union { struct { short deep_a; short deep_b; }; u32 whole; };
	callback call;
	struct forward *unknown;
};
struct bits { u32 low : 3; u32 high : 29; int after_bits; struct { u32 one : 8; u32 two : 24; char after; }; };
struct __attribute__((packed)) tight { char a; int b; long long c; };
struct empty { };
struct flexible { int count; struct inner items[]; };

struct plain v_plain; struct nested v_nested; struct bits v_bits; struct tight v_tight; struct empty v_empty;
struct flexible v_flexible; struct inner v_inner; callback v_callback;
int used(struct nested *n) { return a_static + n->before + a_pointer(n->unknown, FIRST) + MORE; }

#define SECTION __attribute__((section("from_clang"), used))
#define AT(s, m) __builtin_offsetof(struct s, m)
"""

ASKED: tuple[tuple[str, str], ...] = (
    *(("plain", name) for name in ("c", "s", "i", "p", "tail")),
    *(("nested", name) for name in ("before", "x", "in_union", "other", "named", "deep_a", "deep_b", "whole")),
    *(("nested", name) for name in ("call", "unknown")),
    ("bits", "after_bits"),
    ("bits", "after"),
    *(("tight", name) for name in "abc"),
    ("flexible", "count"),
    ("flexible", "items"),
)
SIZED = ("plain", "nested", "bits", "tight", "empty", "flexible", "inner")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The sections of SOURCE, with clang's own answers in one of them."""
    answers = [f"AT({name}, {member})" for name, member in ASKED] + [f"sizeof(struct {name})" for name in SIZED]
    source = f"{SOURCE}const unsigned long long answers[] SECTION = {{ {', '.join(answers)} }};\n"
    return compiled_for_bpf(source, tmp_path_factory.mktemp("btf"), ["-Wno-unused"])


@pytest.fixture(scope="module")
def answers(compiled: dict[str, bytes]) -> list[int]:
    """What clang computed."""
    return list(struct.unpack(f"={len(ASKED) + len(SIZED)}Q", compiled["from_clang"]))


@pytest.fixture(scope="module")
def blob(compiled: dict[str, bytes]) -> bytes:
    """clang's BTF of SOURCE."""
    return compiled[".BTF"]


def test_offsets_are_those_of_clang_also_inside_anonymous_members(blob: bytes, answers: list[int]) -> None:
    assert Btf(blob).offsets(ASKED) == dict(zip(ASKED, answers))


@pytest.mark.parametrize("name", SIZED)
def test_a_size_is_that_of_clang(name: str, blob: bytes, answers: list[int]) -> None:
    assert Btf(blob).struct_size(name) == answers[len(ASKED) + SIZED.index(name)]


def test_members_are_the_named_ones(blob: bytes) -> None:
    assert list(Btf(blob).members("plain")) == ["c", "s", "i", "p", "tail"]
    assert list(Btf(blob).members("nested")) == ["before", "call", "unknown"]
    assert Btf(blob).members("empty") == {}


def test_a_struct_that_is_not_there_has_no_size_and_no_members(blob: bytes) -> None:
    assert (Btf(blob).struct_size("nowhere"), Btf(blob).members("nowhere")) == (None, {})


def test_the_end_of_a_structs_name_is_not_its_name(blob: bytes) -> None:
    assert Btf(blob).struct_size("lain") is None


@pytest.mark.parametrize(
    "wanted", [("plain", "nothing"), ("nowhere", "c"), ("bits", "high"), ("small", "FIRST"), ("plain", "")]
)
def test_a_member_without_an_offset_in_bytes_is_refused_by_name(wanted: tuple[str, str], blob: bytes) -> None:
    with pytest.raises(Unsupported, match=f"looking up {wanted[1]} of struct {wanted[0]} .*iptables backend"):
        Btf(blob).offsets([wanted])


# --- broken blobs ---------------------------------------------------------------------------------------------------


def header(types: bytes, strings: bytes) -> bytes:
    """struct btf_header, the types and the strings."""
    return struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings)) + types + strings


@pytest.mark.parametrize("blob", [b"", bytes(23), bytes(64), b"\x7fELF" + bytes(60)])
def test_a_blob_without_the_magic_number_is_refused(blob: bytes) -> None:
    with pytest.raises(Unsupported, match="does not begin like BTF"):
        Btf(blob)


@pytest.mark.parametrize("kind", [20, 25, 31])
def test_a_kind_of_a_later_kernel_is_refused_since_its_length_is_unknown(kind: int) -> None:
    with pytest.raises(Unsupported, match=f"BTF kind {kind} is unknown"):
        Btf(header(struct.pack("=III", 0, kind << 24, 0), b"\0"))


def named_struct(name: str, size: int, members: list[tuple[int, int, int]], strings: bytearray) -> bytes:
    strings += name.encode() + b"\0"
    head = struct.pack("=III", len(strings) - len(name) - 1, 4 << 24 | len(members), size)
    return head + b"".join(struct.pack("=III", *member) for member in members)


@patient
@given(
    sizes=st.lists(st.integers(0, 2**31), min_size=1, max_size=20),
    vlens=st.lists(st.integers(0, 5), min_size=20, max_size=20),
)
def test_each_struct_is_found_among_the_others(sizes: list[int], vlens: list[int]) -> None:
    strings = bytearray(b"\0m\0")
    types = b"".join(
        named_struct(f"s{n}", size, [(1, 0, 32 * i) for i in range(vlens[n])], strings) for n, size in enumerate(sizes)
    )
    read = Btf(header(types, bytes(strings)))
    assert [read.struct_size(f"s{n}") for n in range(len(sizes))] == sizes


# --- the running kernel ---------------------------------------------------------------------------------------------

on_btf = pytest.mark.skipif(not os.path.exists(btf.PATH), reason="this kernel has no BTF")


@pytest.fixture(scope="module")
def kernel() -> Btf:
    """The BTF of the running kernel."""
    return btf.read_kernel_btf()


@on_btf
def test_structs_of_the_kernel_s_abi_have_the_layout_of_its_headers(kernel: Btf) -> None:
    """include/uapi: these never change, so they can be written down."""
    assert kernel.members("in_addr") == {"s_addr": 0}
    assert kernel.members("sockaddr_in6") == {
        "sin6_family": 0,
        "sin6_port": 2,
        "sin6_flowinfo": 4,
        "sin6_addr": 8,
        "sin6_scope_id": 24,
    }
    assert (kernel.struct_size("sockaddr_in6"), kernel.struct_size("iphdr"), kernel.struct_size("ipv6hdr")) == (
        28,
        20,
        40,
    )
    assert kernel.members("bpf_sock_addr")["msg_src_ip4"] == 40


@on_btf
def test_the_eight_ids_of_a_credential_are_in_a_row(kernel: Btf) -> None:
    """struct cred, include/linux/cred.h: the same order since v2.6.29."""
    names = ("uid", "gid", "suid", "sgid", "euid", "egid", "fsuid", "fsgid")
    offsets = kernel.offsets([("cred", name) for name in names])
    first = offsets["cred", "uid"]
    assert [offsets["cred", name] for name in names] == [first + 4 * n for n in range(8)]


@on_btf
def test_every_offset_that_the_hooks_need_is_there(kernel: Btf) -> None:
    offsets = kernel.offsets(program.OFFSETS)
    assert set(offsets) == set(program.OFFSETS)
    for (name, _), offset in offsets.items():
        assert 0 <= offset < (kernel.struct_size(name) or 0) + (name == "group_info")


@on_btf
def test_group_info_is_a_count_and_a_row_of_groups(kernel: Btf) -> None:
    """The binary search may read the word before gid[0], without an effect: that word must be in the struct."""
    offsets = kernel.offsets([("group_info", "ngroups"), ("group_info", "gid")])
    assert offsets["group_info", "gid"] == offsets["group_info", "ngroups"] + 4


def test_the_error_on_a_kernel_without_btf_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(btf, "PATH", str(tmp_path / "vmlinux"))
    with pytest.raises(Unsupported, match=r"ENOENT .*CONFIG_DEBUG_INFO_BTF.*iptables backend"):
        btf.read_kernel_btf()
