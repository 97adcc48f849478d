# SPDX-License-Identifier: Apache-2.0
"""bpf/imds_guard.h against backends/ebpf/abi.py: C and Python have the same layouts and constants."""

from __future__ import annotations

import ctypes
import os
import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.filter_records import filter_bit
from imds_guard.kernel.btf import Btf
from imds_guard.policy.decide import MAX_SEARCHED_GROUPS, MAX_WALKED_GROUPS, Reason
from imds_guard.policy.filters import FILTER_NETWORK, FILTER_PORT, MAX_FILTERS, MAX_TARGETS
from imds_guard.policy.model import MAX_LOCK_NAME_BYTES
from tests.clang import BPF, compiled_for_bpf, compiled_to_library
from tests.strategies import patient

HEADER = (BPF / "imds_guard.h").read_text(encoding="utf-8")

# --- the layouts of Python ------------------------------------------------------------------------------------------

# The Python struct, and the C members in its order. "gid:128" stands for 128 values, "pad" for a run of x.
PACKED: dict[str, tuple[struct.Struct, str]] = {
    "ig_config": (abi.CONFIG, "generation pad"),
    "ig_settings": (abi.SETTINGS, "valid mode allow_containers abi digest strict zero serial"),
    "ig_endpoint_key": (abi.ENDPOINT_KEY, "prefixlen generation pad address"),
    "ig_port_range": (abi.RANGE, "low high lock list protocols flags target"),
    "ig_list": (abi.LIST, f"flags zero gid_bitmap:{abi.GID_BITMAP_WORDS} everyone pad"),
    "ig_member": (abi.MEMBER, "generation kind list id"),
    "ig_list_key": (abi.SMALL_KEY, "generation pad list"),
    "ig_groups": (abi.GROUPS, f"denied len gid:{abi.MAX_SEARCHED_GROUPS}"),
    "ig_lock_key": (abi.SMALL_KEY, "generation pad lock"),
    "ig_lock": (abi.LOCK, "list pad name"),
    "ig_counter": (abi.COUNTER, "enforced audited"),
    "ig_event": (
        abi.EVENT,
        "time_ns cgroup_id netns_cookie pid tgid fsuid fsgid groups_len port lock address comm generation hook reason "
        "verdict protocol pad",
    ),
    "ig_report_key": (abi.REPORT_KEY, "generation reason lock who pad id"),
    "ig_report": (abi.REPORT, "count first_ns last_ns address port protocol pad comm"),
    "ig_share_key": (abi.SHARE_KEY, "generation pad first"),
    "ig_share": (abi.SHARE, "rows"),
    "ig_watch": (abi.WATCH, "log_allowed"),
    "ig_mark": (abi.MARK, "serial fsuid gid list kind container_unchecked pad"),
    "ig_filter_key": (abi.FILTER_KEY, "generation target pad bit"),
    "ig_filter": (abi.FILTER, "digest number pad"),
    "ig_target_key": (abi.SMALL_KEY, "generation pad target"),
    "ig_target": (abi.TARGET, "address port pad"),
    "ig_filter_text_key": (abi.FILTER_TEXT_KEY, "generation filter piece"),
    "ig_filter_mark": (abi.FILTER_MARK, "digest"),
}
# Structs without a struct.Struct in Python: the size, and the offset of each member.
ASSEMBLED: dict[str, tuple[int, dict[str, int]]] = {
    "ig_address": (16, {"word": 0}),
    "ig_address_bitmap": (
        abi.ADDRESS_BITMAP_BYTES,
        {"hosts": 0, "networks4": abi.HOST_BYTES, "networks6": abi.HOST_BYTES + abi.NETWORK_BYTES},
    ),
    "ig_earlier": (abi.EARLIER_MARKS * abi.MARK.size, {"marks": 0}),
    "ig_endpoint": (abi.ENDPOINT_BYTES, {"ranges_len": 0, "pad": 4, "ranges": abi.ENDPOINT_HEAD.size}),
}

CONSTANTS: dict[str, int] = {
    "IG_ABI": abi.ABI,
    "IG_MAP_BASE": abi.MAP_BASE,
    "IG_HOOK_PLACEHOLDER": abi.HOOK_PLACEHOLDER,
    **{f"IG_CALLBACK_{function}": place for place, function in abi.CALLBACKS.items()},
    **{f"IG_MAP_{one.name}": one.value for one in Map},
    "IG_MAPS": len(Map),
    "IG_GENERATIONS": 1 + max(abi.GENERATIONS),
    "IG_ENFORCE": abi.MODE_ENFORCE,
    "IG_AUDIT": abi.MODE_AUDIT,
    "IG_HOST_BITS_LOG2": abi.HOST_BITS_LOG2,
    "IG_HOST_WORDS": abi.HOST_BYTES // 4,
    "IG_NETWORK_WORDS": abi.NETWORK_BYTES // 4,
    "IG_TCP": abi.TCP,
    "IG_UDP": abi.UDP,
    "IG_INHERITED": abi.INHERITED,
    "IG_NO_LIST": abi.NO_LIST,
    "IG_FILTER_LIST": abi.FILTER_LIST,
    "IG_RANGES": abi.RANGES,
    "IG_LISTS": abi.LISTS,
    "IG_LIST_VALID": abi.LIST_VALID,
    "IG_LIST_DEFAULT_ALLOW": abi.LIST_DEFAULT_ALLOW,
    "IG_LIST_GROUPS": abi.LIST_GROUPS,
    "IG_LIST_DENY_GROUPS": abi.LIST_DENY_GROUPS,
    "IG_LIST_SMALL": abi.LIST_SMALL,
    "IG_LIST_USERS": abi.LIST_USERS,
    "IG_LIST_FILTER_GROUPS": abi.LIST_FILTER_GROUPS,
    "IG_GID_BITMAP_WORDS": abi.GID_BITMAP_WORDS,
    "IG_USER": abi.USER,
    "IG_GROUP": abi.GROUP,
    "IG_ALLOW": abi.ALLOW,
    "IG_DENY": abi.DENY,
    "IG_FILTER_ACCOUNT": abi.FILTER_ACCOUNT,
    "IG_FILTERS": abi.FILTERS,
    "IG_FILTER_BITS": sum(1 << abi.FIRST_FILTER_BIT + n for n in range(abi.FILTERS)),
    "IG_FILTER_NETWORK": int(FILTER_NETWORK.network_address),
    "IG_FILTER_PREFIX_MASK": int(FILTER_NETWORK.netmask),
    "IG_FILTER_PORT": FILTER_PORT,
    "IG_TARGETS": abi.TARGETS,
    "IG_NUMBERS": abi.NUMBERS,
    "IG_FILTER_PIECES": abi.FILTER_PIECES,
    "IG_FILTER_PIECE": abi.FILTER_PIECE_BYTES,
    "IG_MEMBERS": abi.MEMBERS,
    "IG_MAX_SEARCHED_GROUPS": abi.MAX_SEARCHED_GROUPS,
    "IG_LOCKS": abi.LOCKS,
    "IG_LOCK_NAME": abi.LOCK_NAME_BYTES,
    "IG_ENDPOINTS": abi.ENDPOINTS,
    **{f"IG_{one.name}": one.value for one in Reason},
    "IG_REASONS": abi.REASONS,
    "IG_LOST_EVENTS": abi.LOST_EVENTS,
    "IG_REPORT_OVERFLOW": abi.REPORT_OVERFLOW,
    "IG_COUNTERS": abi.COUNTERS,
    "IG_CONNECT4": abi.HOOK_CONNECT4,
    "IG_CONNECT6": abi.HOOK_CONNECT6,
    "IG_SENDMSG4": abi.HOOK_SENDMSG4,
    "IG_SENDMSG6": abi.HOOK_SENDMSG6,
    "IG_EGRESS": abi.HOOK_EGRESS,
    "IG_GETPEERNAME4": abi.HOOK_GETPEERNAME4,
    "IG_GETPEERNAME6": abi.HOOK_GETPEERNAME6,
    "IG_VERDICT_DENIED": abi.VERDICT_DENIED,
    "IG_VERDICT_AUDITED": abi.VERDICT_AUDITED,
    "IG_VERDICT_ALLOWED": abi.VERDICT_ALLOWED,
    "IG_COMM": abi.COMM_BYTES,
    "IG_NO_LOCK": abi.NO_LOCK,
    "IG_EVENTS_BYTES": abi.EVENTS_BYTES,
    "IG_REPORT_ROWS": abi.REPORT_ROWS,
    "IG_WHO_USER": abi.WHO_USER,
    "IG_WHO_NAMESPACES": abi.WHO_NAMESPACES,
    "IG_WHO_OTHERS": abi.WHO_OTHERS,
    "IG_SHARE_IDS": abi.SHARE_IDS,
    "IG_ROWS_OF_ACCOUNT": abi.ROWS_OF_ACCOUNT,
    "IG_ROWS_OF_BLOCK": abi.ROWS_OF_BLOCK,
    "IG_EARLIER_MARKS": abi.EARLIER_MARKS,
    "IG_MARK_USER": abi.MARK_USER,
    "IG_MARK_GROUP": abi.MARK_GROUP,
    "IG_MARK_DEFAULT": abi.MARK_DEFAULT,
    "IG_MARK_AUDIT": abi.MARK_AUDIT,
    "IG_MARK_OPEN": abi.MARK_OPEN,
    "IG_MARK_ACCEPTED": abi.MARK_ACCEPTED,
    "IG_MARK_FILTER": abi.MARK_FILTER,
    "IG_MAX_WALKED_GROUPS": MAX_WALKED_GROUPS,
    "IG_MAX_GROUPS": os.sysconf("SC_NGROUPS_MAX"),
}

KEYS_AND_VALUES: dict[Map, tuple[str | int, str | int]] = {
    Map.CONFIG: (4, "ig_config"),
    Map.SETTINGS: (4, "ig_settings"),
    Map.ADDRESS_BITMAP: (4, "ig_address_bitmap"),
    Map.ENDPOINTS: ("ig_endpoint_key", "ig_endpoint"),
    Map.LISTS: (4, "ig_list"),
    Map.MEMBERS: ("ig_member", abi.MEMBER_VALUE.size),
    Map.GROUPS: ("ig_list_key", "ig_groups"),
    Map.LOCKS: ("ig_lock_key", "ig_lock"),
    Map.COUNTERS: (4, "ig_counter"),
    Map.EVENTS: (0, 0),
    Map.REPORT: ("ig_report_key", "ig_report"),
    Map.WATCH: (4, "ig_watch"),
    Map.MARKS: (4, "ig_mark"),
    Map.EARLIER: (4, "ig_earlier"),
    Map.SHARES: ("ig_share_key", "ig_share"),
    Map.FILTERS: ("ig_filter_key", "ig_filter"),
    Map.TARGETS: ("ig_target_key", "ig_target"),
    Map.FILTER_TEXTS: ("ig_filter_text_key", abi.FILTER_PIECE_BYTES),
    Map.FILTER_MARKS: (4, "ig_filter_mark"),
}


def layout(shape: struct.Struct, members: str) -> dict[str, int]:
    """The offset that Python gives each member."""
    offsets = iter(value_offsets(shape.format))
    found = {}
    for member in members.split():
        name, _, count = member.partition(":")
        found[name] = next(offsets)
        for _ in range(int(count or 1) - 1):
            next(offsets)
    assert next(offsets, None) is None
    return found


def value_offsets(form: str) -> list[int]:
    """The offset of each value of a struct format, and of each run of x."""
    order, done, offsets = form[0], "", []
    for count, letter in re.findall(r"(\d*)([a-zA-Z])", form):
        at = struct.calcsize(order + done)
        each = struct.calcsize(order + letter)
        together = letter in "sx"
        offsets += [at] if together else [at + each * n for n in range(int(count or 1))]
        done += count + letter
    return offsets


def expected_layout(name: str) -> tuple[int, dict[str, int]]:
    """The size and the members' offsets that Python gives a C struct."""
    if name in ASSEMBLED:
        return ASSEMBLED[name]
    shape, members = PACKED[name]
    return shape.size, layout(shape, members)


# --- the layouts of C -----------------------------------------------------------------------------------------------

STRUCTS = re.findall(r"^struct (ig_\w+) \{", HEADER, re.MULTILINE)
COMMENTLESS = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.DOTALL)


def constants_of_header() -> list[str]:
    """Every macro with a value, and every enumerator."""
    macros = re.findall(r"^#define (\w+)[ \t]+\S", COMMENTLESS, re.MULTILINE)
    enums = re.findall(r"enum \w+ \{(.*?)\}", COMMENTLESS, re.DOTALL)
    return macros + [name for body in enums for name in re.findall(r"[A-Z]\w+", body)]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The header compiled with a variable of each struct, and the value of each constant in a section of its own."""
    names = ", ".join(constants_of_header())
    variables = "".join(f"struct {name} v_{name};\n" for name in STRUCTS)
    section = '__attribute__((section("constants"), used))'
    source = (
        f'#include <linux/types.h>\n#include "imds_guard.h"\n{variables}const __s64 all[] {section} = {{ {names} }};\n'
    )
    return compiled_for_bpf(source, tmp_path_factory.mktemp("abi"))


@pytest.fixture(scope="module")
def btf(compiled: dict[str, bytes]) -> Btf:
    """clang's BTF of the header's structs."""
    return Btf(compiled[".BTF"])


def test_every_struct_of_the_header_is_compared() -> None:
    assert sorted(STRUCTS) == sorted([*PACKED, *ASSEMBLED])


@pytest.mark.parametrize("name", STRUCTS)
def test_a_struct_has_the_size_and_the_offsets_that_python_packs(name: str, btf: Btf) -> None:
    assert (btf.struct_size(name), btf.members(name)) == expected_layout(name)


def test_every_constant_of_the_header_has_the_value_that_python_has(compiled: dict[str, bytes]) -> None:
    values = struct.unpack(f"={len(constants_of_header())}q", compiled["constants"])
    assert dict(zip(constants_of_header(), values)) == CONSTANTS


def size_of(what: str | int) -> int:
    return what if isinstance(what, int) else expected_layout(what)[0]


@pytest.mark.parametrize("number", list(Map), ids=lambda number: str(number.pin_name))
def test_a_map_is_made_with_the_sizes_of_its_structs(number: Map) -> None:
    shape = abi.SHAPES[number]
    key, value = KEYS_AND_VALUES[number]
    assert (shape.key_size, shape.value_size) == (size_of(key), size_of(value))


def test_the_pins_have_the_names_of_the_first_release() -> None:
    """An upgrade opens the maps of the version before by these names."""
    assert " ".join(number.pin_name for number in Map) == (
        "config settings first_look endpoints lists members groups locks counters events report watch marks "
        "earlier shares filters targets filter_texts filter_marks"
    )


def test_arrays_have_an_element_for_each_generation_and_reason() -> None:
    max_entries = {number: shape.max_entries for number, shape in abi.SHAPES.items()}
    assert max_entries[Map.SETTINGS] == max_entries[Map.ADDRESS_BITMAP] == CONSTANTS["IG_GENERATIONS"]
    assert max_entries[Map.LISTS] == 2 * CONSTANTS["IG_LISTS"]
    assert max_entries[Map.MEMBERS] == CONSTANTS["IG_MEMBERS"]
    assert max_entries[Map.ENDPOINTS] == CONSTANTS["IG_ENDPOINTS"]
    assert max_entries[Map.LOCKS] == CONSTANTS["IG_LOCKS"]
    assert max_entries[Map.COUNTERS] == len(Reason) + 2
    assert max_entries[Map.EVENTS] == CONSTANTS["IG_EVENTS_BYTES"]
    assert max_entries[Map.REPORT] == CONSTANTS["IG_REPORT_ROWS"]
    assert max_entries[Map.FILTERS] == 2 * CONSTANTS["IG_FILTERS"] * CONSTANTS["IG_TARGETS"]
    assert max_entries[Map.TARGETS] == 2 * CONSTANTS["IG_TARGETS"]
    assert max_entries[Map.FILTER_TEXTS] == CONSTANTS["IG_FILTER_PIECES"]


def test_the_limits_of_the_policy_are_those_of_the_hooks() -> None:
    assert (abi.MAX_SEARCHED_GROUPS, abi.LOCK_NAME_BYTES) == (MAX_SEARCHED_GROUPS, MAX_LOCK_NAME_BYTES + 1)
    assert (abi.FILTERS, abi.TARGETS) == (MAX_FILTERS, MAX_TARGETS)
    assert filter_bit(0) == 1 << abi.FIRST_FILTER_BIT


# --- host_bit() -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def c_host_bit(tmp_path_factory: pytest.TempPathFactory) -> ctypes._NamedFuncPointer:
    """ig_host_bit() of the hooks' source, compiled for this machine."""
    source = (
        '#include "address.h"\n__u32 host_bit(const struct ig_address *a);\n'
        "__u32 host_bit(const struct ig_address *a) { return ig_host_bit(a); }\n"
    )
    library = ctypes.CDLL(str(compiled_to_library(source, tmp_path_factory.mktemp("host_bit"))))
    function = library.host_bit
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_uint32
    return function


@patient
@given(address=st.binary(min_size=16, max_size=16))
def test_python_and_the_hooks_look_at_the_same_bit(address: bytes, c_host_bit: ctypes._NamedFuncPointer) -> None:
    assert abi.host_bit(address) == c_host_bit(address)


@patient
@given(address=st.binary(min_size=16, max_size=16))
def test_the_bit_of_a_host_is_in_the_bitmap(address: bytes) -> None:
    assert 0 <= abi.host_bit(address) < abi.HOST_BYTES * 8


def test_set_bit_sets_the_bit_that_the_hooks_test() -> None:
    bitmap = bytearray(64)
    abi.set_bit(bitmap, 16, 77)
    read = struct.unpack("=16I", bitmap)
    assert [(n, word) for n, word in enumerate(read) if word] == [(4 + (77 >> 5), 1 << (77 & 31))]
