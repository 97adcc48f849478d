# SPDX-License-Identifier: Apache-2.0
"""Compiles C with clang, and reads the sections of ELF files."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

from imds_guard.backends.ebpf.program import source_folder
from tests.tools import need

BPF = source_folder()
INCLUDES = (f"-I{BPF}", f"-I{BPF}/include/include")


def clang(*arguments: str) -> None:
    """Runs clang. A warning fails the test. Skips the test where there is no clang."""
    need("clang")
    done = subprocess.run(["clang", *arguments], capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    assert done.returncode == 0


def compiled_for_bpf(source: str, folder: Path, defines: Sequence[str] = ()) -> dict[str, bytes]:
    """The sections of a BPF object, with BTF."""
    return sections(_built(source, folder, ".o", "-target", "bpf", "-c", *defines).read_bytes())


def compiled_to_library(source: str, folder: Path) -> Path:
    """A shared object for this machine that needs no C library."""
    return _built(source, folder, ".so", "-shared", "-fPIC", "-nostdlib")


def _built(source: str, folder: Path, suffix: str, *arguments: str) -> Path:
    written, made = folder / "source.c", folder / f"made{suffix}"
    written.write_text(source, encoding="utf-8")
    clang(*arguments, "-O2", "-g", "-Wall", "-Wextra", "-Werror", *INCLUDES, str(written), "-o", str(made))
    return made


def sections(elf: bytes) -> dict[str, bytes]:
    """The sections of a 64-bit ELF file by name (elf(5): Elf64_Ehdr, Elf64_Shdr)."""
    table_at = struct.unpack_from("=Q", elf, 40)[0]
    size, count, names_index = struct.unpack_from("=3H", elf, 58)
    headers = [struct.unpack_from("=IIQQQQ", elf, table_at + size * n) for n in range(count)]
    names = _content(elf, headers[names_index])
    return {names[h[0] : names.index(b"\0", h[0])].decode(): _content(elf, h) for h in headers}


def _content(elf: bytes, header: Sequence[int]) -> bytes:
    at, length = header[4], header[5]
    return elf[at : at + length]
