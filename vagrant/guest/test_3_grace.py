# SPDX-License-Identifier: Apache-2.0
"""Changes of policy while somebody who may not connects all the time, on more than one processor.

As tests/kernel/test_races.py, with as many changes as an emulated processor has time for. The widened hook idles
between reading the generation and using it: a change that does not wait for it lets the caller through.
"""

from __future__ import annotations

import os

from imds_guard.backends.ebpf import EbpfBackend
from tests.kernel import guards
from tests.kernel.guards import FAST, NEW_POLICY, OLD_POLICY, STRANGER, Storm

CHANGES, TRIES = 40, 200
WIDENED = (("IG_WIDEN", 3000), *FAST)


def test_changes_wait_for_the_hooks_that_run() -> None:
    """Whoever is on neither policy's list never gets through."""
    assert os.cpu_count() != 1, "a hook is not interrupted: one processor can't show what this is about"
    with guards.guarded_sandbox(WIDENED) as (sandbox, backend):
        assert isinstance(backend, EbpfBackend)
        backend.apply(OLD_POLICY)
        storm = Storm(sandbox, STRANGER)
        for number in range(CHANGES):
            backend.change(OLD_POLICY if number % 2 else NEW_POLICY)
        storm.wait_for(TRIES, within_s=600)
        connected, refused, other = storm.counts()
    assert (connected, other) == (0, 0), f"the denied caller got through {connected} times of {refused + connected}"
