# SPDX-License-Identifier: Apache-2.0
"""The hooks decide right on kernels that lay their structs out otherwise, those of another architecture included."""

from __future__ import annotations

from pathlib import Path

import pytest

from imds_guard.backends.ebpf import program
from imds_guard.kernel import btf, compiler
from tests.vm import layouts
from tests.vm.decisions import differences, scene_of
from tests.vm.machine import Machine
from tests.vm.programs import compiled
from tests.vm.test_decisions import FIXED_SEED

KERNELS = {offsets: name for name, offsets in layouts.recorded().items()}
"""Those of equal layouts once."""


@pytest.fixture(autouse=True)
def _needs_a_compiler() -> None:
    if not compiler.has_bcc():
        pytest.skip("the hooks can't be compiled without bcc")


@pytest.mark.parametrize("kernel", KERNELS.values())
def test_the_hooks_decide_right_as_another_kernel_lays_tasks_out(kernel: str) -> None:
    form = "plain" if kernel.startswith("5.10") else "better"
    with Machine(forms=[form], offsets=layouts.recorded()[kernel]) as machine:
        for number in range(2):
            assert next(differences(scene_of(FIXED_SEED, number), machine), None) is None


def test_the_offsets_of_another_kernel_do_not_work() -> None:
    """Tasks as Linux 5.10 has them, and the program for 6.12: the machine tells the two from each other."""
    old, new = (layouts.recorded()[name] for name in ("5.10-debian-x86_64", "6.12-debian-x86_64"))
    with Machine(forms=["plain"], offsets=old) as machine:
        for hook, code in compiled("plain", new).items():
            machine.set_instructions("plain", hook, code.instructions)
        assert any(next(differences(scene_of(FIXED_SEED, number), machine), None) for number in range(2))


@pytest.mark.skipif(not Path(btf.PATH).exists(), reason="this kernel has no BTF")
def test_an_image_has_the_offsets_that_the_running_kernel_shows() -> None:
    """As in an uncompressed image: BTF, between other bytes, and something shorter that begins like it."""
    shorter = bytes.fromhex("9feb010018000000") + bytes(16)
    image = b"MZ" + bytes(4096) + shorter + Path(btf.PATH).read_bytes() + bytes(512) + shorter
    assert tuple(layouts.offsets_in(image).items()) == program.kernel_offsets()
