# SPDX-License-Identifier: Apache-2.0
"""The architectures of guests: their names, and the machine that QEMU makes for each."""

from __future__ import annotations

import os
from dataclasses import dataclass

from vagrant.matrix.errors import MatrixError


@dataclass(frozen=True)
class Architecture:
    """An architecture by Debian's name, and QEMU's options for a guest of it."""

    name: str
    uname: str
    """The output of uname -m."""

    qemu: str
    """The program that emulates it."""

    machine: str
    cpu: str
    """The processor, where QEMU emulates it."""

    console: str
    """The device of the first serial line, for the kernel's messages."""

    output: str
    """The device of the second serial line, for the output of the job."""

    second_line: tuple[str, ...]
    """Options for the second serial line."""


_AMD64 = Architecture(
    name="amd64", uname="x86_64", qemu="qemu-system-x86_64", machine="pc",
    # Without erms and fsrm kernel and C library copy words. QEMU before 10 emulates "rep movsb" one byte at a time:
    # loading libbcc takes half as long again. Without la57 page tables have one level less.
    cpu="max,-erms,-fsrm,-la57",
    console="ttyS0", output="ttyS1", second_line=("-serial", "chardev:output"),
)  # fmt: skip
_ARM64 = Architecture(
    name="arm64", uname="aarch64", qemu="qemu-system-aarch64", machine="virt,gic-version=max",
    # The core of Graviton2 and of Ampere Altra. It has no pointer authentication, which QEMU emulates slowly.
    cpu="neoverse-n1",
    # The machine "virt" has one PL011. A second serial line is a 16550A on the PCI bus.
    console="ttyAMA0", output="ttyS0", second_line=("-device", "pci-serial,chardev=output"),
)  # fmt: skip

ARCHITECTURES = {one.name: one for one in (_AMD64, _ARM64)}
"""Debian's name -> the architecture."""

POINTER_AUTHENTICATION = "max,pauth-impdef=on"
"""An arm64 processor with PAC and BTI. QEMU computes the architected signatures (QARMA5) much slower than its own."""


def native() -> Architecture:
    """The architecture of this machine. Raises MatrixError when no guest can be of it."""
    machine = os.uname().machine
    for one in ARCHITECTURES.values():
        if one.uname == machine:
            return one
    raise MatrixError(
        f"this machine is {machine}; ./run matrix needs one of {', '.join(one.uname for one in ARCHITECTURES.values())}"
    )
