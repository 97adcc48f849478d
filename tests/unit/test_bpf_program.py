# SPDX-License-Identifier: Apache-2.0
"""The instructions and the names that the loader gives the kernel."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imds_guard.backends.ebpf import abi, program
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.features import FEATURES, defines_of
from imds_guard.errors import GuardError
from imds_guard.kernel import btf_encode
from imds_guard.kernel.compiler import relocated, with_callbacks
from tests.clang import BPF, clang, sections
from tests.strategies import patient

LD_IMM64, PSEUDO_MAP_FD, PSEUDO_FUNC = 0x18, 0x10, 0x40
FDS = [1000 + number for number in Map]


def instruction(opcode: int, registers: int = 0, immediate: int = 0) -> bytes:
    """struct bpf_insn."""
    return struct.pack("=BBhi", opcode, registers, 0, immediate)


def load_map(number: int, register: int = 1) -> bytes:
    """A ld_imm64 of map ``number``, two slots long."""
    return instruction(LD_IMM64, PSEUDO_MAP_FD | register, abi.MAP_BASE + number) + bytes(8)


def load_constant(value: int) -> bytes:
    """A ld_imm64 of a number."""
    return instruction(LD_IMM64, 2, value) + struct.pack("=ii", 0, 7)


def test_a_maps_placeholder_becomes_its_fd_and_nothing_else_changes() -> None:
    code = instruction(0xB7, 1, 5) + load_map(3) + load_constant(abi.MAP_BASE) + instruction(0x95)
    loaded = instruction(LD_IMM64, PSEUDO_MAP_FD | 1, 1003) + bytes(8)
    assert relocated(code, {}, abi.MAP_BASE, FDS) == (
        instruction(0xB7, 1, 5) + loaded + load_constant(abi.MAP_BASE) + instruction(0x95)
    )


def test_a_placeholder_of_the_hook_becomes_a_constant() -> None:
    code = load_map(abi.HOOK_PLACEHOLDER - abi.MAP_BASE, register=7) + load_map(0) + instruction(0x95)
    constant = instruction(LD_IMM64, 7, abi.HOOK_SENDMSG6) + bytes(8)
    fd = instruction(LD_IMM64, PSEUDO_MAP_FD | 1, 1000) + bytes(8)
    values = {abi.HOOK_PLACEHOLDER: abi.HOOK_SENDMSG6}
    assert relocated(code, values, abi.MAP_BASE, FDS) == constant + fd + instruction(0x95)


def test_the_second_slot_of_a_constant_is_not_taken_for_an_instruction() -> None:
    slots = instruction(LD_IMM64, 1) + load_map(0)[:8] + instruction(0x95)
    assert relocated(slots, {}, abi.MAP_BASE, FDS) == slots


@pytest.mark.parametrize("number", [-1, len(Map)])
def test_an_unknown_map_is_refused(number: int) -> None:
    with pytest.raises(GuardError, match=f"instruction 1 names an unknown map .{abi.MAP_BASE + number}"):
        relocated(instruction(0xB7) + load_map(number), {}, abi.MAP_BASE, FDS)


@patient
@given(parts=st.lists(st.one_of(st.sampled_from(Map), st.integers(-(2**31), 2**31 - 1)), max_size=30))
def test_every_map_is_replaced_and_no_constant(parts: list[int]) -> None:
    code = b"".join(load_map(part) if isinstance(part, Map) else load_constant(part) for part in parts)
    fds = relocated(code, {}, abi.MAP_BASE, FDS)
    found = [struct.unpack_from("=i", fds, 16 * n + 4)[0] for n in range(len(parts))]
    assert found == [FDS[part] if isinstance(part, Map) else part for part in parts]


# --- functions that the kernel calls back ---------------------------------------------------------------------------

CALLBACKS = {100: ("ig_first", instruction(0xB7, 0, 1) + instruction(0x95)), 200: ("ig_second", instruction(0x95))}
CONTEXT_FIRST = instruction(0xBF, 0x21)  # r1 = r2


def load_function(place: int, register: int = 2) -> bytes:
    """A ld_imm64 of a function's address, two slots long."""
    return instruction(LD_IMM64, PSEUDO_FUNC | register, place) + bytes(8)


def test_a_callback_follows_the_function_that_passes_it() -> None:
    code = load_constant(100) + load_function(200) + load_function(100, register=3) + instruction(0x95)
    first, second = CONTEXT_FIRST + CALLBACKS[200][1], CONTEXT_FIRST + CALLBACKS[100][1]
    whole = with_callbacks("ig_c4", code, CALLBACKS)
    assert whole.functions == (("ig_c4", 0), ("ig_second", 7), ("ig_first", 9))
    # The distance counts from the next instruction: the load in slots 2 and 3 has 4, and the function is at 7.
    assert whole.instructions == (
        load_constant(100)
        + load_function(7 - 2 - 1)
        + load_function(9 - 4 - 1, register=3)
        + instruction(0x95)
        + first
        + second
    )


def test_a_callback_that_is_passed_twice_is_there_once() -> None:
    whole = with_callbacks("ig_c4", load_function(200) + load_function(200) + instruction(0x95), CALLBACKS)
    assert whole.functions == (("ig_c4", 0), ("ig_second", 5))
    assert whole.instructions == (
        load_function(4) + load_function(2) + instruction(0x95) + CONTEXT_FIRST + CALLBACKS[200][1]
    )


def test_a_program_without_callbacks_stays_as_it_is() -> None:
    code = load_map(0) + load_constant(100) + instruction(0x95)
    assert with_callbacks("ig_eg", code, CALLBACKS) == (code, (("ig_eg", 0),))


def test_the_types_of_functions_name_them_in_their_order() -> None:
    blob = btf_encode.functions(["ig_c4_01234567", "ig_first"])
    strings = blob.split(b"ig_c4_01234567")[0].rindex(b"\0int\0")
    header_size, int_size, prototype_size = 24, 16, 12
    at = header_size + int_size + prototype_size
    names = [struct.unpack_from("=I", blob, at + 12 * n)[0] + strings for n in range(2)]
    assert [blob[name : blob.index(b"\0", name)] for name in names] == [b"ig_c4_01234567", b"ig_first"]
    assert at + 2 * 12 == strings


WITH_FEATURES = [f"-D{name}={value}" for name, value in defines_of(FEATURES)]


# --- the hooks as clang compiles them -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def code_of_clang(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """All hooks with all features, as clang alone compiles them."""
    return compiled_hooks(tmp_path_factory.mktemp("hooks") / "hooks.o", *WITH_FEATURES)


def compiled_hooks(made: Path, *more: str) -> bytes:
    """The instructions of all functions, one after the other."""
    offsets = [f"-DIG_OFF_{struct}_{member}=8".upper() for struct, member in program.OFFSETS]
    include = f"-I{BPF}/include/include"
    clang("-target", "bpf", "-O2", *more, *offsets, include, "-c", str(BPF / "imds_guard.bpf.c"), "-o", str(made))
    return sections(made.read_bytes())[".text"]


def test_the_hooks_use_every_map_but_those_of_texts(code_of_clang: bytes) -> None:
    assert used_maps(code_of_clang) == set(FDS) - {FDS[Map.LOCKS], FDS[Map.FILTER_TEXTS]}


def test_without_features_the_hooks_use_none_of_their_maps(tmp_path: Path) -> None:
    """By its maps user space sees which features a program has."""
    used = used_maps(compiled_hooks(tmp_path / "hooks.o"))
    assert used.isdisjoint(FDS[feature.uses] for feature in FEATURES)


def used_maps(code: bytes) -> set[int]:
    """Their numbers in FDS."""
    code = relocated(code, {abi.HOOK_PLACEHOLDER: abi.HOOK_CONNECT4}, abi.MAP_BASE, FDS)
    return {
        struct.unpack_from("=i", code, at + 4)[0]
        for at in range(0, len(code), 8)
        if code[at] == LD_IMM64 and code[at + 1] & 0xF0 == PSEUDO_MAP_FD
    }


HELPERS = {
    **{1: "map_lookup_elem", 2: "map_update_elem", 14: "get_current_pid_tgid", 16: "get_current_comm"},
    **{26: "skb_load_bytes", 35: "get_current_task", 47: "get_socket_uid", 80: "get_current_cgroup_id"},
    **{84: "sk_lookup_tcp", 86: "sk_release", 99: "skc_lookup_tcp"},
    **{95: "sk_fullsock", 96: "tcp_sock", 107: "sk_storage_get", 113: "probe_read_kernel", 122: "get_netns_cookie"},
    **{125: "ktime_get_boot_ns", 130: "ringbuf_output"},
}
"""include/uapi/linux/bpf.h: those that Linux 5.10 gives programs at these hooks."""


def test_the_hooks_call_only_helpers_that_every_kernel_gives_them(code_of_clang: bytes) -> None:
    calls = {struct.unpack_from("=i", code_of_clang, at + 4)[0] for at in _calls(code_of_clang)}
    assert calls == set(HELPERS)


def test_bpf_loop_is_one_helper_more(tmp_path: Path) -> None:
    code = compiled_hooks(tmp_path / "hooks.o", "-DIG_BPF_LOOP")
    assert {struct.unpack_from("=i", code, at + 4)[0] for at in _calls(code)} == {*HELPERS, 181}  # bpf_loop()


def _calls(code: bytes) -> list[int]:
    """Positions of BPF_CALL instructions; second slots of ld_imm64 have opcode 0."""
    return [at for at in range(0, len(code), 8) if code[at] == 0x85]


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", sorted(abi.HOOKS))
def test_a_programs_name_fits_the_kernel_and_has_its_version(hook: str) -> None:
    version = program.source_version()
    name = abi.program_name(hook, version)
    assert len(name) <= 15
    assert {other: abi.version_in_name(other, name) for other in abi.HOOKS} == {
        other: version if other == hook else None for other in abi.HOOKS
    }


@pytest.mark.parametrize(
    "name", ["", "ig_c4", "ig_c4_", "ig_c4_123", "ig_c4_123456789", "sd_fw_ingress", "ig_c6_12345678"]
)
def test_programs_of_others_are_not_taken_for_ours(name: str) -> None:
    assert abi.version_in_name("connect4", name) is None


SOURCES = tuple(sorted(str(path.relative_to(BPF)) for path in BPF.rglob("*.[ch]")))


@pytest.fixture
def source_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bpf/ folder that the loader takes for its own."""
    for name in SOURCES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((BPF / name).read_bytes())
    monkeypatch.setattr(program, "source_folder", lambda: tmp_path)
    return tmp_path


def test_the_version_changes_with_each_source_and_with_the_defines(source_copy: Path) -> None:
    seen: dict[str, tuple[str, ...]] = {program.source_version(): ("as it is",)}
    seen[program.source_version((("IG_TEST_DELAY", 1),))] = ("delayed",)
    for name in SOURCES:
        with (source_copy / name).open("a", encoding="utf-8") as file:
            file.write("\n")
        seen[program.source_version()] = (name,)
    assert len(seen) == 2 + len(SOURCES)
