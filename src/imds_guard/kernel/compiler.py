# SPDX-License-Identifier: Apache-2.0
"""Compiles C to BPF instructions with bcc, and completes the instructions for the kernel.

This module alone imports bcc, for the compiler alone: maps, loading and links are calls of bpf(2) (kernel/bpf/). So
every version of bcc serves.
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
"""Compiling takes a fifth of a second on a machine of 2022, and ten seconds where the processor is emulated."""
_R1_IS_R2 = struct.pack("=BBhi", 0xBF, 0x21, 0, 0)


def has_bcc() -> bool:
    """True when Python finds bcc. It is not imported here: that takes up to a third of a second."""
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
    """The instructions (8 bytes each) of each function.

    ``include`` is the folder of the source's own headers, ``stubs`` the tree that replaces the kernel's headers.
    """
    require_bcc()
    # -g0: bcc asks for debug information, which nobody reads here. Without it compiling takes a fifth less time.
    flags = ["-g0", f"-I{include}", *(f"-D{name}={value}" for name, value in defines)]
    with _environment(BCC_KERNEL_SOURCE=stubs), _captured_stderr() as log:
        bcc = _import_bcc(log)
        try:
            return run_in_child(lambda: _compile(bcc, source, flags, functions, log), timeout_s=_TIMEOUT_S)
        except ChildFailed as error:
            raise _refused(error, log) from error


def _import_bcc(log: str) -> ModuleType:
    """Imports bcc in this process, once for all children, and no earlier: a change of policy must not wait for it."""
    try:
        import bcc  # noqa: PLC0415
    except (Exception, SystemExit) as error:  # it loads libbcc, or is another project of that name
        raise _refused(error, log) from error
    return bcc  # type: ignore[no-any-return]


def _compile(bcc: ModuleType, source: str, flags: list[str], functions: Sequence[str], log: str) -> dict[str, bytes]:
    """Runs in a child process, which frees the compiler's memory. The child is not root, but can read root's files.

    For root libbcc reads every name in /proc/kallsyms, which takes two fifths of the time. It would learn whether the
    kernel has bpf_probe_read_kernel(), but our programs call helpers by number. Source: bcc_procutils_each_ksym() in
    bcc's src/cc/bcc_proc.c.
    """
    os.chdir("/")  # libbcc goes back to where it was, and gives up where that folder was deleted
    with suppress(OSError):  # without CAP_SETUID compiling takes longer
        become(uids=(0, _NOBODY, 0), fsuid=0)
    try:
        module = bcc.BPF(text=source.encode(), cflags=flags)
        return {name: bytes(module.dump_func(name.encode())) for name in functions}
    # bcc raises a bare Exception and writes the reason to file descriptor 2.
    except (Exception, SystemExit) as error:
        raise _refused(error, log) from error


def _refused(error: BaseException, log: str) -> Unsupported:
    return Unsupported(
        f"compiling the eBPF programs with bcc: {error}: {_last_lines(log)}; please report it with the version of "
        "bcc and of the kernel"
    )


def _last_lines(file: str) -> str:
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
def _captured_stderr() -> Iterator[str]:
    """Redirects file descriptor 2, which C code writes to, to a file; yields the file's name."""
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
    """A program and the functions behind it: all instructions, and (name, index of the first instruction) of each."""

    instructions: bytes
    functions: tuple[tuple[str, int], ...]


def with_callbacks(name: str, instructions: bytes, callbacks: Mapping[int, tuple[str, bytes]]) -> Program:
    """A function, followed by the callbacks that it passes to bpf_loop().

    ``callbacks``: the placeholder in the instructions -> the callback's name and instructions. bpf_loop() passes the
    context as the second argument, but bcc compiles functions of one argument. So each callback begins with r1 = r2.
    The placeholder becomes the distance to the callback in instructions: BPF_PSEUDO_FUNC in include/uapi/linux/bpf.h.
    """
    code = bytearray(instructions)
    functions = {name: 0}
    for at in _constants(instructions, _PSEUDO_FUNC):
        callback, body = callbacks[struct.unpack_from("=i", code, at + 4)[0]]
        if callback not in functions:
            functions[callback] = len(code) // 8
            code += _R1_IS_R2 + body
        struct.pack_into("=i", code, at + 4, functions[callback] - at // 8 - 1)
    return Program(bytes(code), tuple(functions.items()))


def _constants(instructions: bytes, kind: int) -> Iterator[int]:
    """Offsets in bytes of the instructions that load a constant of a kind (BPF_PSEUDO_*). Each fills two slots."""
    at = 0
    while at < len(instructions):
        wide = instructions[at] == _LD_IMM64
        if wide and instructions[at + 1] >> 4 == kind:
            yield at
        at += 16 if wide else 8


def relocated(instructions: bytes, values: Mapping[int, int], base: int, fds: Sequence[int]) -> bytes:
    """The instructions with their placeholders replaced: ``base`` + n by the fd of map n, others by ``values``.

    Raises GuardError for an unknown placeholder. Encoding: struct bpf_insn in include/uapi/linux/bpf.h.
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
