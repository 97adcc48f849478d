# SPDX-License-Identifier: Apache-2.0
"""Changes of policy while a denied caller connects all the time.

tests/kernel/test_races.py does the same with more changes. The delayed hook waits between reading the generation and
using it, so that a change which does not wait lets the caller through. This needs a second processor, or a kernel that
preempts a hook on the only one.
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
    """A caller whom neither policy lists never connects."""
    preempted = "preempt=full" in Path("/proc/cmdline").read_text(encoding="ascii")
    assert os.cpu_count() != 1 or preempted, "no hook is interrupted here, so this test would prove nothing"
    with guards.guarded_sandbox(DELAYED) as (sandbox, backend):
        assert isinstance(backend, EbpfBackend)
        backend.apply(OLD_POLICY)
        storm = Storm(sandbox, STRANGER)
        os.nice(-15)  # otherwise the storm would delay the changes
        for number in range(CHANGES):
            backend.change(OLD_POLICY if number % 2 else NEW_POLICY)
        storm.wait_for(TRIES, within_s=600)
        connected, refused, other = storm.counts()
    assert (connected, other) == (0, 0), f"the denied caller got through {connected} times of {refused + connected}"
