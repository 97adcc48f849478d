# SPDX-License-Identifier: Apache-2.0
"""The hooks as they are compiled for the oldest kernels, run on a kernel that normally gets a better form.

The forms differ in how they read credentials and how they search lists of groups, so only rows about these are run.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from imds_guard.backends.ebpf import program
from tests.conformance import cases_filter, cases_who
from tests.conformance.bench import EXPECTED_BACKENDS, Bench, sorted_by_policy
from tests.conformance.enforcers import Ebpf
from tests.conformance.model import Case
from tests.conformance.test_backends import check_row

ROWS = [*cases_who.GROUPS, *cases_who.DENY_LISTS, *cases_who.USER_NAMESPACES, *cases_filter.CASES]


class PlainEbpf(Ebpf):
    """The eBPF backend with the programs that every kernel accepts."""

    defines = program.PLAIN


@pytest.fixture(scope="module")
def bench(as_root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The plain form. Skips where it is the only form: test_backends.py runs it there."""
    if not program.better_form():
        if "ebpf" in EXPECTED_BACKENDS:
            pytest.fail("a kernel of v5.17 or later is expected here, and knows neither bpf_loop() nor the task's type")
        pytest.skip("eBPF is not to be had, or this kernel has no better form: test_backends.py has tried this one")
    with PlainEbpf(tmp_path_factory.mktemp("plain")) as enforcer:
        one = Bench("ebpf", enforcer)
        yield one
        one.close()


@pytest.mark.parametrize("case", sorted_by_policy(ROWS), ids=lambda case: case.id)
def test_row(case: Case, bench: Bench, lacking: dict[str, str | None]) -> None:
    """The plain form gives the same outcome for the same reason, and the same policy reads back."""
    check_row(case, bench, lacking)
