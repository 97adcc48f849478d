# SPDX-License-Identifier: Apache-2.0
"""The kernel's BTF is read once for all tests here: each would read it hundreds of times."""

from __future__ import annotations

import functools

import pytest

from imds_guard.backends.ebpf import program


@pytest.fixture(autouse=True, scope="session")
def _offsets_are_read_once() -> None:
    program.kernel_offsets = functools.cache(program.kernel_offsets)
