# SPDX-License-Identifier: Apache-2.0
"""The hooks' programs: where the source is, which version it is, and how it gets into the kernel."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from imds_guard.backends.ebpf import abi, probe
from imds_guard.errors import GuardError, Unsupported, trying
from imds_guard.kernel import bpf, btf, compiler

Defines = tuple[tuple[str, int], ...]

_OFFSETS = (
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
    ("pid", "level"),
)


def source_folder() -> Path:
    """The bpf/ folder: inside the installed package, or beside src/ in a checkout."""
    installed = Path(__file__).resolve().parents[2] / "bpf"
    return installed if installed.is_dir() else Path(__file__).resolve().parents[4] / "bpf"


def source_version(defines: Defines = ()) -> str:
    """8 hexadecimal digits that change with the source of the hooks; part of the programs' names in the kernel."""
    state = hashlib.sha256()
    folder = source_folder()
    for path in sorted(folder.rglob("*.[ch]")):
        text = path.read_bytes()
        state.update(f"{path.relative_to(folder)} {len(text)}\n".encode() + text)
    state.update(repr(defines).encode())
    return state.hexdigest()[: abi.VERSION_DIGITS]


@functools.cache
def kernel_offsets() -> Defines:
    """IG_OFF_* from the running kernel's BTF. Raises Unsupported where it has none that serve."""
    offsets = btf.read_kernel_btf().offsets(_OFFSETS)
    return tuple((f"IG_OFF_{struct}_{member}".upper(), offset) for (struct, member), offset in offsets.items())


def compile_hooks(names: Collection[str], defines: Defines = ()) -> Mapping[str, bytes]:
    """The instructions of the named hooks' functions, nothing yet put in: function -> instructions."""
    folder, loops = source_folder(), LOOP[0] in defines
    return compiler.compile_functions(
        (folder / "imds_guard.bpf.c").read_text(encoding="utf-8"),
        str(folder),
        str(folder / "include"),
        tuple(sorted({abi.HOOKS[name].function for name in names} | (set(abi.CALLBACKS.values()) if loops else set()))),
        kernel_offsets() + defines + (() if abi.EGRESS in names else WITHOUT_EGRESS),
    )


WITHOUT_EGRESS: Defines = (("IG_WITHOUT_EGRESS", 1),)
"""A third of the time that compiling takes; strict alone has that hook."""
DIRECT: Defines = (("IG_DIRECT_READS", 1),)
"""Plain loads from the current task in place of a helper call a word; not every verifier takes them."""
LOOP: Defines = (("IG_BPF_LOOP", 1),)
"""Loops by bpf_loop(): loads in a tenth of the time."""
PLAIN: Defines = (("IG_PLAIN", 1),)
"""For tests: what serves every kernel, on one that could do better."""


def load_hooks(names: Sequence[str], map_fds: Sequence[int], defines: Defines) -> dict[str, int]:
    """The fd of the named hooks' programs, on the given maps: in the form that this kernel does best with."""
    version = source_version(defines)
    better = () if PLAIN[0] in defines else better_form()
    if better:
        with contextlib.suppress(Unsupported):
            return _load_all(names, compile_hooks(names, defines + better), map_fds, version)
    return _load_all(names, compile_hooks(names, defines), map_fds, version)


def better_form() -> Defines:
    """What this kernel can do that Linux 5.10 can't."""
    return (DIRECT if probe.knows_current_task() else ()) + (LOOP if probe.knows_loops() else ())


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
    """The fd of a hook's program, verified by the kernel, on the given maps (in the order of abi.Map)."""
    shape = abi.HOOKS[hook]
    name = abi.program_name(hook, version)
    steps = {place: (step, code[step]) for place, step in abi.CALLBACKS.items() if step in code}
    whole = compiler.with_steps(name, code[shape.function], steps)
    instructions = compiler.linked(whole.instructions, {abi.HOOK_PLACEHOLDER: shape.number}, abi.MAP_BASE, map_fds)
    with trying(f"loading the eBPF program {name}", "nothing was changed"):
        fd, refusal = bpf.prog_load_explained(instructions, name, shape.attach_type, whole.functions)
    if fd < 0:
        raise Unsupported(
            f"loading the eBPF program {name}: the kernel's verifier refused it: {refusal}; nothing was changed, "
            "please report it with the kernel's version"
        )
    return fd
