# SPDX-License-Identifier: Apache-2.0
"""Changes of policy while somebody who may not connects all the time.

As tests/kernel/test_races.py, with as many changes as an emulated processor has time for. The widened hook idles
between reading the generation and using it: a change that does not wait for it lets the caller through. It takes a
second processor, or a kernel that takes the only one away from a hook.
"""

from __future__ import annotations

import os
from pathlib import Path

from imds_guard.backends.ebpf import EbpfBackend
from tests.kernel import guards
from tests.kernel.guards import FAST, NEW_POLICY, OLD_POLICY, STRANGER, Storm

CHANGES, TRIES = 40, 200
DELAYED = (("IG_TEST_DELAY", 3000), *FAST)


def test_changes_wait_for_the_hooks_that_run() -> None:
    """Whoever is on neither policy's list never gets through."""
    preempted = "preempt=full" in Path("/proc/cmdline").read_text(encoding="ascii")
    assert os.cpu_count() != 1 or preempted, "a hook is not interrupted: this can't show what it is about"
    with guards.guarded_sandbox(DELAYED) as (sandbox, backend):
        assert isinstance(backend, EbpfBackend)
        backend.apply(OLD_POLICY)
        storm = Storm(sandbox, STRANGER)
        os.nice(-15)  # the changes would come last
        for number in range(CHANGES):
            backend.change(OLD_POLICY if number % 2 else NEW_POLICY)
        storm.wait_for(TRIES, within_s=600)
        connected, refused, other = storm.counts()
    assert (connected, other) == (0, 0), f"the denied caller got through {connected} times of {refused + connected}"
