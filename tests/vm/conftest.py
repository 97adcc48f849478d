# SPDX-License-Identifier: Apache-2.0
"""The machine, once for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from imds_guard.backends.ebpf import program
from imds_guard.errors import Unsupported
from imds_guard.kernel import compiler
from tests.tools import missing
from tests.vm.machine import Machine
from tests.vm.programs import BARE_FORMS


def need_compiled_hooks() -> None:
    """Skips the test where the hooks can't be compiled: no bcc, or no BTF."""
    try:
        compiler.require_bcc()
        program.kernel_offsets()
    except Unsupported as reason:
        missing(str(reason))


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """Every form of every hook. Each test loads its own policy."""
    need_compiled_hooks()
    with Machine() as made:
        yield made


@pytest.fixture(scope="module")
def bare() -> Iterator[Machine]:
    """The forms for policies without filters."""
    need_compiled_hooks()
    with Machine(tuple(BARE_FORMS)) as made:
        yield made
