# SPDX-License-Identifier: Apache-2.0
"""The programs of the hooks: where their source is, its version, compiling it, loading them into the kernel."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from imds_guard.backends.ebpf import abi, compiled, probe
from imds_guard.errors import GuardError, Unsupported, trying
from imds_guard.kernel import bpf, btf, compiler

Defines = tuple[tuple[str, int], ...]
"""Macros for the compiler: (name, value)."""

OFFSETS = (
    ("task_struct", "cred"),
    ("task_struct", "flags"),
    ("task_struct", "thread_pid"),
    ("cred", "fsuid"),
    ("cred", "fsgid"),
    ("cred", "group_info"),
    ("cred", "user_ns"),
    ("group_info", "ngroups"),
    ("group_info", "gid"),
    ("user_namespace", "level"),
    ("user_namespace", "owner"),
    ("pid", "level"),
)
"""The (struct, member) of the kernel whose offsets the hooks need."""


def source_folder() -> Path:
    """The bpf/ folder: inside the installed package, or beside src/ in a checkout."""
    installed = Path(__file__).resolve().parents[2] / "bpf"
    return installed if installed.is_dir() else Path(__file__).resolve().parents[4] / "bpf"


def source_version(defines: Defines = ()) -> str:
    """8 hexadecimal digits that change with any source of the hooks. They are part of the programs' names."""
    return _source_digest(defines)[: abi.VERSION_DIGITS]


def _source_digest(defines: Defines = ()) -> str:
    state = hashlib.sha256()
    folder = source_folder()
    for path in sorted(folder.rglob("*.[ch]")):
        text = path.read_bytes()
        state.update(f"{path.relative_to(folder)} {len(text)}\n".encode() + text)
    state.update(repr(defines).encode())
    return state.hexdigest()


@functools.cache
def kernel_offsets() -> Defines:
    """The macros IG_OFF_*, from the running kernel's BTF. Raises Unsupported when they can't be had from it."""
    found = compiled.offsets((OFFSETS, btf.kernel_btf_digest()), _offsets_in_btf)
    return tuple(found.items())


def _offsets_in_btf() -> Mapping[str, int]:
    offsets = btf.read_kernel_btf().offsets(OFFSETS)
    return {f"IG_OFF_{struct}_{member}".upper(): offset for (struct, member), offset in offsets.items()}


def compile_hooks(names: Collection[str], defines: Defines = (), offsets: Defines | None = None) -> Mapping[str, bytes]:
    """The instructions of the functions of these hooks, with placeholders: function -> instructions.

    ``offsets`` are those of another kernel, for tests. By default the running kernel's are used.
    """
    callbacks = set(abi.CALLBACKS.values()) if BPF_LOOP[0] in defines else set()
    functions = tuple(sorted({abi.HOOKS[name].function for name in names} | callbacks))
    without = () if abi.EGRESS in names else WITHOUT_EGRESS
    return _compiled(functions, (kernel_offsets() if offsets is None else offsets) + defines + without)


@functools.cache
def _compiled(functions: tuple[str, ...], defines: Defines) -> Mapping[str, bytes]:
    folder = source_folder()
    return compiled.instructions(
        (_source_digest(), functions, defines),
        lambda: compiler.compile_functions(
            (folder / "imds_guard.bpf.c").read_text(encoding="utf-8"),
            str(folder),
            str(folder / "include"),
            functions,
            defines,
        ),
    )


WITHOUT_EGRESS: Defines = (("IG_WITHOUT_EGRESS", 1),)
"""Leaves out the hook that strict mode alone has. It is a third of the time that compiling takes."""
DIRECT_READS: Defines = (("IG_DIRECT_READS", 1),)
"""Plain loads from the current task, and not a helper call for each member. Not every verifier accepts them."""
BPF_LOOP: Defines = (("IG_BPF_LOOP", 1),)
"""Loops by bpf_loop(): the program loads in a tenth of the time."""
PLAIN: Defines = (("IG_PLAIN", 1),)
"""For tests: the form for the oldest kernels, on a kernel that can do better."""


def load_hooks(names: Sequence[str], map_fds: Sequence[int], defines: Defines) -> dict[str, int]:
    """The fds of the programs of these hooks, on the given maps, in the best form that this kernel accepts."""
    version = source_version(defines)
    better = () if PLAIN[0] in defines else better_form()
    if better:
        with contextlib.suppress(Unsupported):
            return _load_all(names, compile_hooks(names, defines + better), map_fds, version)
    return _load_all(names, compile_hooks(names, defines), map_fds, version)


def better_form() -> Defines:
    """The defines of the best form: for what this kernel can do and Linux 5.10 can't."""
    return (DIRECT_READS if probe.knows_current_task() else ()) + (BPF_LOOP if probe.knows_loops() else ())


def _load_all(names: Sequence[str], code: Mapping[str, bytes], map_fds: Sequence[int], version: str) -> dict[str, int]:
    loaded: dict[str, int] = {}
    try:
        for hook in names:
            loaded[hook] = load_hook(hook, code, map_fds, version)
    except GuardError:
        for fd in loaded.values():
            os.close(fd)
        raise
    return loaded


def load_hook(hook: str, code: Mapping[str, bytes], map_fds: Sequence[int], version: str) -> int:
    """The fd of one hook's program, verified by the kernel, on the given maps (in the order of abi.Map)."""
    name = abi.program_name(hook, version)
    whole = complete(hook, code, map_fds, name)
    with trying(f"loading the eBPF program {name}", "nothing was changed"):
        fd, refusal = bpf.prog_load_explained(whole.instructions, name, abi.HOOKS[hook].attach_type, whole.functions)
    if fd < 0:
        raise Unsupported(
            f"loading the eBPF program {name}: the kernel's verifier refused it: {refusal}; nothing was changed, "
            "please report it with the kernel's version"
        )
    return fd


def complete(hook: str, code: Mapping[str, bytes], map_fds: Sequence[int], name: str) -> compiler.Program:
    """The program of one hook as the kernel gets it: with its callbacks, on the maps (in the order of abi.Map)."""
    shape = abi.HOOKS[hook]
    callbacks = {number: (callback, code[callback]) for number, callback in abi.CALLBACKS.items() if callback in code}
    whole = compiler.with_callbacks(name, code[shape.function], callbacks)
    return whole._replace(
        instructions=compiler.relocated(whole.instructions, {abi.HOOK_PLACEHOLDER: shape.number}, abi.MAP_BASE, map_fds)
    )
