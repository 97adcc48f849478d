# SPDX-License-Identifier: Apache-2.0
"""kernel/bpf/attr.py against <linux/bpf.h>: numbers and struct layouts are those of the kernel."""

from __future__ import annotations

import ctypes
import enum
from pathlib import Path

import pytest

from imds_guard.kernel.bpf import attr
from tests.clang import clang
from tests.tools import missing

HEADER = Path("/usr/include/linux/bpf.h")

MEMBERS_OF_ATTR: dict[type[ctypes.Structure], str] = {
    **dict.fromkeys((attr.MapCreate, attr.Element, attr.ProgLoad, attr.BtfLoad, attr.Pin), ""),
    attr.GetId: "",
    attr.Batch: "batch.",
    attr.Info: "info.",
    attr.Query: "query.",
    attr.LinkCreate: "link_create.",
    attr.LinkUpdate: "link_update.",
    attr.LinkDetach: "link_detach.",
    attr.EnableStats: "enable_stats.",
}
"""Where union bpf_attr has the fields: in this member, or ("") in one without a name."""
OTHER_STRUCTS: dict[type[ctypes.Structure], str] = {
    attr.FuncInfo: "bpf_func_info",
    attr.ProgInfo: "bpf_prog_info",
    attr.MapInfo: "bpf_map_info",
    attr.LinkInfo: "bpf_link_info",
}
OTHER_PLACES = {
    (attr.GetId, "id"): "start_id",
    (attr.LinkInfo, "cgroup_id"): "cgroup.cgroup_id",
    (attr.LinkInfo, "attach_type"): "cgroup.attach_type",
}
"""Fields that the header has elsewhere or calls otherwise."""
ENUMS: dict[type[enum.IntEnum], str] = {
    attr.Command: "BPF_",
    attr.MapType: "BPF_MAP_TYPE_",
    attr.ProgType: "BPF_PROG_TYPE_",
    attr.AttachType: "BPF_",
    attr.LinkType: "BPF_LINK_TYPE_",
}
WITHOUT_PLACE = frozenset({"gpl_compatible", "_padding"})
"""C has no offset for a bit-field, and no name for padding."""


def agrees(*claims: str, folder: Path) -> None:
    """Each claim is a constant expression of C that must be true."""
    if not HEADER.exists():
        missing("the kernel's headers for user space are not installed (linux-libc-dev)")
    source = folder / "claims.c"
    lines = ["#include <stddef.h>", "#include <linux/bpf.h>", *(f'_Static_assert({claim}, "");' for claim in claims)]
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    clang("-fsyntax-only", str(source))


def places(struct: type[ctypes.Structure], c_type: str, prefix: str) -> list[str]:
    """That each field has its offset and its size."""
    claims = []
    for name, *_ in struct._fields_:
        if name in WITHOUT_PLACE:
            continue
        field, place = getattr(struct, name), OTHER_PLACES.get((struct, name), name)
        claims.append(f"offsetof({c_type}, {prefix}{place}) == {field.offset}")
        claims.append(f"sizeof((({c_type} *)0)->{prefix}{place}) == {field.size}")
    return claims


@pytest.mark.parametrize("struct", [*MEMBERS_OF_ATTR, *OTHER_STRUCTS], ids=lambda struct: str(struct.__name__))
def test_the_layout_is_the_same_in_a_32_bit_python(struct: type[ctypes.Structure]) -> None:
    """Linux aligns the 64-bit fields to 8 bytes for every program. 32-bit x86 aligns them to 4 where nobody pads."""
    end = 0
    for name, *_ in struct._fields_:
        field = getattr(struct, name)
        if name != "gpl_compatible":
            assert field.offset == end, f"before {name} the compiler pads"
            end = field.offset + field.size
        else:
            end = field.offset + 4


def test_every_struct_is_compared() -> None:
    ours = {one for one in vars(attr).values() if isinstance(one, type) and issubclass(one, ctypes.Structure)}
    assert set(MEMBERS_OF_ATTR) | set(OTHER_STRUCTS) == ours


@pytest.mark.parametrize("struct", MEMBERS_OF_ATTR, ids=lambda struct: str(struct.__name__))
def test_a_member_of_bpf_attr_has_the_kernels_layout(struct: type[ctypes.Structure], tmp_path: Path) -> None:
    agrees(*places(struct, "union bpf_attr", MEMBERS_OF_ATTR[struct]), folder=tmp_path)


@pytest.mark.parametrize("struct", OTHER_STRUCTS, ids=lambda struct: str(struct.__name__))
def test_a_struct_has_the_kernels_layout(struct: type[ctypes.Structure], tmp_path: Path) -> None:
    agrees(*places(struct, f"struct {OTHER_STRUCTS[struct]}", ""), folder=tmp_path)


@pytest.mark.parametrize("numbers", ENUMS, ids=lambda numbers: str(numbers.__name__))
def test_numbers_are_the_kernels(numbers: type[enum.IntEnum], tmp_path: Path) -> None:
    agrees(*(f"{ENUMS[numbers]}{one.name} == {one.value}" for one in numbers), folder=tmp_path)


def test_the_flag_of_maps_is_the_kernels(tmp_path: Path) -> None:
    agrees(f"BPF_F_NO_PREALLOC == {attr.F_NO_PREALLOC}", folder=tmp_path)
