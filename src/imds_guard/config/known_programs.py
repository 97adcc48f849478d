# SPDX-License-Identifier: Apache-2.0
"""The key ``known_programs``: other people's BPF programs that are no fault."""

from __future__ import annotations

import re
from collections.abc import Iterable

from imds_guard.config.table import Table

_NAME = re.compile("[A-Za-z0-9_.]{1,128}", re.ASCII)
KERNEL_NAME_BYTES = 15
"""Loaders give the kernel the beginning of a longer name. The characters: bpf_obj_name_cpy(), kernel/bpf/syscall.c."""


def known_programs(top: Table) -> tuple[str, ...]:
    """The names in the list, as they are written. Raises BadPolicy for one that no program can have."""
    key = "known_programs"
    names = top.strings(key)
    for name in names:
        if not _NAME.fullmatch(name):
            top.fail(
                key,
                f"{key} contains {name!r}: names of BPF programs are letters, digits, dots and underscores; "
                "imds-guard status shows them",
                name,
            )
    return tuple(names)


def is_known(program: str, known: Iterable[str]) -> bool:
    """Whether the list has a program of this name. ``program`` is the kernel's name, the first 15 characters."""
    return bool(program) and any(program == name[:KERNEL_NAME_BYTES] for name in known)
