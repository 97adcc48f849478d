# SPDX-License-Identifier: Apache-2.0
"""Where other kernels have the fields that the hooks read: recorded from the BTF in their images.

    python3 -m tests.vm.layouts NAME=VMLINUZ ...    adds to layouts.json, or replaces there

VMLINUZ is the image of a kernel for x86_64 (bzImage) or arm64 (Image), as distributions package it. An image that is
compressed with zstd or lz4 needs the program of that name.
"""

from __future__ import annotations

import functools
import gzip
import json
import lzma
import struct
import subprocess
import sys
from pathlib import Path

from imds_guard.backends.ebpf import program
from imds_guard.backends.ebpf.program import Defines
from imds_guard.kernel.btf import Btf

_RECORDED = Path(__file__).with_name("layouts.json")
_BTF_HEAD = struct.pack("=HBBI", 0xEB9F, 1, 0, 24)  # include/uapi/linux/btf.h: magic, version, flags, hdr_len


@functools.cache
def recorded() -> dict[str, Defines]:
    """The macros IG_OFF_* of each recorded kernel, by its name."""
    found: dict[str, dict[str, int]] = json.loads(_RECORDED.read_text(encoding="ascii"))
    return {name: tuple(offsets.items()) for name, offsets in found.items()}


def offsets_in(image: bytes) -> dict[str, int]:
    """The same, from a kernel's image."""
    found = Btf(_btf_of(_unpacked(image))).offsets(program.OFFSETS)
    return {f"IG_OFF_{struct_name}_{member}".upper(): offset for (struct_name, member), offset in found.items()}


def _unpacked(image: bytes) -> bytes:
    """The kernel itself. Source: Documentation/arch/x86/boot.rst, and Documentation/arch/arm64/booting.rst."""
    if image[0x202:0x206] != b"HdrS":
        return image  # arm64: Image is not compressed
    offset, length = struct.unpack_from("<II", image, 0x248)
    begin = (image[0x1F1] + 1) * 512 + offset
    return _decompressed(image[begin : begin + length])


def _decompressed(payload: bytes) -> bytes:
    """The payload of a bzImage. The size of the kernel stands behind the compressed bytes."""
    if payload.startswith(b"\x1f\x8b"):
        return gzip.decompress(payload[:-4])
    if payload.startswith(b"\xfd7zXZ"):
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload)
    for magic, program_name in ((b"\x28\xb5\x2f\xfd", "zstd"), (b"\x02\x21\x4c\x18", "lz4")):
        if payload.startswith(magic):
            return subprocess.run([program_name, "-dc"], input=payload[:-4], capture_output=True, check=True).stdout
    raise ValueError(f"an unknown compression: {payload[:8].hex()}")


def _btf_of(kernel: bytes) -> bytes:
    """The largest part that begins like BTF: the section .BTF."""
    best, at = b"", -1
    while (at := kernel.find(_BTF_HEAD, at + 1)) >= 0:
        _, types_len, strings_at, strings_len = struct.unpack_from("<4I", kernel, at + 8)
        end = at + 24 + strings_at + strings_len
        if types_len <= strings_at and end <= len(kernel) and end - at > len(best):
            best = kernel[at:end]
    return best


def _main(arguments: list[str]) -> None:
    found = {name: dict(offsets) for name, offsets in recorded().items()} if _RECORDED.exists() else {}
    for argument in arguments:
        name, _, path = argument.partition("=")
        found[name] = offsets_in(Path(path).read_bytes())
    _RECORDED.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", encoding="ascii")


if __name__ == "__main__":
    _main(sys.argv[1:])
