# SPDX-License-Identifier: Apache-2.0
"""The only importer of bcc: C in, instructions out.

bcc compiles and nothing more; maps, loading and links are bpf(2) (kernel/bpf.py). So every version of bcc serves.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from imds_guard.errors import GuardError, Unsupported
from imds_guard.kernel.children import ChildFailed, run_in_child
from imds_guard.kernel.credentials import become

_LD_IMM64, _PSEUDO_MAP_FD, _PSEUDO_FUNC = 0x18, 1, 4
_NOBODY = 65534
_TIMEOUT_S = 600.0
"""A fifth of a second on a machine of 2022; ten are usual where the processor is emulated."""
_R1_IS_R2 = struct.pack("=BBhi", 0xBF, 0x21, 0, 0)


def has_bcc() -> bool:
    """True when Python finds bcc; it is not imported, which takes up to a third of a second."""
    return importlib.util.find_spec("bcc") is not None


def require_bcc() -> None:
    """Raises Unsupported when bcc is not there."""
    if not has_bcc():
        raise Unsupported(
            "looking for bcc, which compiles the eBPF programs: this Python has no module of that name; install the "
            "distribution's package (apt install python3-bpfcc, dnf install python3-bcc) and use the system's Python "
            "(the bcc on PyPI is another thing)"
        )


@functools.cache
def compile_functions(
    source: str, include: str, stubs: str, functions: tuple[str, ...], defines: tuple[tuple[str, int], ...]
) -> Mapping[str, bytes]:
    """The instructions (8 octets each) of each function.

    ``include`` is the folder of the source's own headers, ``stubs`` the tree that stands in for the kernel's.
    """
    require_bcc()
    # -g0: bcc asks for debug information, which nobody reads here; the same instructions come out a fifth sooner.
    flags = ["-g0", f"-I{include}", *(f"-D{name}={value}" for name, value in defines)]
    with _environment(BCC_KERNEL_SOURCE=stubs), _stderr_of_c() as words:
        bcc = _import_bcc(words)
        try:
            return run_in_child(lambda: _compile(bcc, source, flags, functions, words), timeout_s=_TIMEOUT_S)
        except ChildFailed as error:
            raise _refused(error, words) from error


def _import_bcc(words: str) -> ModuleType:
    """Here and not in each child; and not before, for a change of policy must not pay for it."""
    try:
        import bcc  # noqa: PLC0415
    except (Exception, SystemExit) as error:  # it loads libbcc, and may be another project's
        raise _refused(error, words) from error
    return bcc  # type: ignore[no-any-return]


def _compile(bcc: ModuleType, source: str, flags: list[str], functions: Sequence[str], words: str) -> dict[str, bytes]:
    """In a child, which has another effective user than root, but root's way with files.

    For root alone libbcc reads every name in /proc/kallsyms, two fifths of the time that our programs take. It would
    know whether the kernel has bpf_probe_read_kernel(); ours call helpers by number. Source:
    bcc_procutils_each_ksym() in bcc's src/cc/bcc_proc.c. And what a compiler leaves in memory goes with the child.
    """
    with suppress(OSError):  # without CAP_SETUID it takes longer
        become(uids=(0, _NOBODY, 0), fsuid=0)
    try:
        module = bcc.BPF(text=source.encode(), cflags=flags)
        return {name: bytes(module.dump_func(name.encode())) for name in functions}
    # bcc raises a bare Exception and leaves the reason on C's stderr.
    except (Exception, SystemExit) as error:
        raise _refused(error, words) from error


def _refused(error: BaseException, words: str) -> Unsupported:
    return Unsupported(
        f"compiling the eBPF programs with bcc: {error}: {_last_words(words)}; please report it with the version of "
        "bcc and of the kernel"
    )


def _last_words(file: str) -> str:
    text = Path(file).read_text(errors="replace").strip()
    return "; ".join(text.splitlines()[-6:]) or "it gave no reason"


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _stderr_of_c() -> Iterator[str]:
    """Collects what C code writes to file descriptor 2; yields the name of the file."""
    import tempfile  # noqa: PLC0415 -- start-up time: few commands compile

    with tempfile.NamedTemporaryFile() as file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield file.name
        finally:
            os.dup2(saved, 2)
            os.close(saved)


class Program(NamedTuple):
    """Instructions of several functions, the program itself first: the name of each, and its first instruction."""

    instructions: bytes
    functions: tuple[tuple[str, int], ...]


def with_steps(name: str, instructions: bytes, steps: Mapping[int, tuple[str, bytes]]) -> Program:
    """A function followed by those that it passes to bpf_loop(), which it names by the keys of ``steps``.

    Each begins with a copy of its second argument, the context, to the first: bcc knows functions of one argument.
    Encoding: BPF_PSEUDO_FUNC in include/uapi/linux/bpf.h, the distance to the function in instructions.
    """
    code = bytearray(instructions)
    functions = {name: 0}
    for at in _constants(instructions, _PSEUDO_FUNC):
        step, body = steps[struct.unpack_from("=i", code, at + 4)[0]]
        if step not in functions:
            functions[step] = len(code) // 8
            code += _R1_IS_R2 + body
        struct.pack_into("=i", code, at + 4, functions[step] - at // 8 - 1)
    return Program(bytes(code), tuple(functions.items()))


def _constants(instructions: bytes, kind: int) -> Iterator[int]:
    """Where the instructions of two slots are that load a constant of a kind (BPF_PSEUDO_*)."""
    at = 0
    while at < len(instructions):
        wide = instructions[at] == _LD_IMM64
        if wide and instructions[at + 1] >> 4 == kind:
            yield at
        at += 16 if wide else 8


def linked(instructions: bytes, values: Mapping[int, int], base: int, fds: Sequence[int]) -> bytes:
    """The same instructions, with the fd of map n where they name map ``base`` + n, and with ``values`` by name.

    Raises GuardError when they name a map that is not ours. Encoding: struct bpf_insn, include/uapi/linux/bpf.h.
    """
    code = bytearray(instructions)
    for at in _constants(instructions, _PSEUDO_MAP_FD):
        immediate = struct.unpack_from("=i", code, at + 4)[0]
        number = immediate - base
        if immediate in values:
            code[at + 1] &= 0xF  # an ordinary constant
            struct.pack_into("=i", code, at + 4, values[immediate])
        elif 0 <= number < len(fds):
            struct.pack_into("=i", code, at + 4, fds[number])
        else:
            raise GuardError(f"linking the eBPF programs: instruction {at // 8} names an unknown map ({immediate})")
    return bytes(code)
