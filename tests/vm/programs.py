# SPDX-License-Identifier: Apache-2.0
"""The instructions of the hooks in each form, by the loader's own functions."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

from imds_guard.backends.ebpf import abi, program
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.features import FEATURES, defines_of
from imds_guard.backends.ebpf.program import BPF_LOOP, DIRECT_READS, Defines

_WHOLE = defines_of(FEATURES)
FORMS: dict[str, Defines] = {
    "plain": _WHOLE,
    "better": DIRECT_READS + BPF_LOOP + _WHOLE,
    "direct": DIRECT_READS + _WHOLE,
    "loop": BPF_LOOP + _WHOLE,
}
"""plain: for Linux 5.10; better: what newer kernels get; direct, loop: one of the two at a time, as for the kernels in
between. All have the code of every feature."""
BARE_FORMS: dict[str, Defines] = {"bare-plain": (), "bare-better": DIRECT_READS + BPF_LOOP}
"""For policies that need no feature."""
ALL_FORMS = {**FORMS, **BARE_FORMS}

HOOKS = tuple(abi.HOOKS)
ADDRESS_HOOKS = tuple(hook for hook in HOOKS if hook not in (abi.EGRESS, *abi.GETPEERNAME))
GUARDING_HOOKS = (*ADDRESS_HOOKS, abi.EGRESS)
"""The others let everything through."""


class Code(NamedTuple):
    """One hook in one form: instructions of 8 bytes each, and where its functions begin."""

    instructions: bytes
    functions: tuple[tuple[str, int], ...]


@functools.cache
def compiled(form: str, offsets: Defines | None = None) -> Mapping[str, Code]:
    """Hook -> its code, for the running kernel's offsets or for others. Map n has file descriptor n."""
    made = program.compile_hooks(HOOKS, ALL_FORMS[form], offsets)
    whole = {hook: program.complete(hook, made, list(map(int, Map)), hook) for hook in HOOKS}
    return {hook: Code(one.instructions, one.functions) for hook, one in whole.items()}


def reads_directly(form: str) -> bool:
    """Whether plain loads from kernel memory are part of the form."""
    return set(DIRECT_READS) <= set(ALL_FORMS[form])
