# SPDX-License-Identifier: Apache-2.0
"""The first boot with the user data of examples/cloud-init, which test_5_cloud_init.py has laid out."""

from __future__ import annotations

import grp
import json
import subprocess
from pathlib import Path

from vagrant.guest import world
from vagrant.guest.service import UNIT, VERIFY, WATCH, show
from vagrant.guest.test_5_service import EBPF
from vagrant.guest.world import ACTIVE, PATIENCE_S, STRANGER, command, done, everywhere, reach

RESULT, OUTPUT = Path("/run/cloud-init/result.json"), Path("/var/log/cloud-init-output.log")


@EBPF
def test_cloud_init_ran_to_its_end(backend: str) -> None:
    """Without an error: one of the lines of runcmd would be one."""
    waited = subprocess.run(
        ["/usr/bin/cloud-init", "status", "--wait", "--long"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    output = OUTPUT.read_text(encoding="utf-8", errors="replace")
    assert "status: done" in waited.stdout, (waited.stdout, output)
    found = json.loads(RESULT.read_text(encoding="utf-8"))["v1"]
    assert (found["errors"], "DataSourceNoCloud" in found["datasource"]) == ([], True), (found, output)
    assert "imds-guard: active (ebpf)" in output


@EBPF
def test_root_and_the_group_pass_and_nobody_else(backend: str) -> None:
    """As the file says that cloud-init wrote, with the group that it made."""
    assert command("status").returncode == ACTIVE
    world.assert_denied("ebpf", reach(STRANGER))
    assert reach(STRANGER, grp.getgrnam("canAccessIP").gr_gid) == everywhere("connected")
    assert reach(0) == everywhere("connected")


@EBPF
def test_it_locks_at_every_boot_from_then_on(backend: str) -> None:
    """By the units that the user data enables; verify finds the configuration in force."""
    units = (UNIT, WATCH, VERIFY)
    assert [(show(unit, "ActiveState"), show(unit, "UnitFileState")) for unit in units] == [("active", "enabled")] * 3
    done("verify")
