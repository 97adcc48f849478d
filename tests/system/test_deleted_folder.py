# SPDX-License-Identifier: Apache-2.0
"""Every command works in a folder that was deleted: a shell, or a job, may stand in one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests import command
from tests.command import ONE, SERVICE, STRANGER, TWO, Guard
from tests.kernel.guards import traces
from tests.system.test_privilege import CHANGE, LOOK, NOTHING, argv

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups and attaching programs needs root")

IN_A_DELETED_FOLDER = 'folder=$(mktemp -d) && cd "$folder" && rmdir "$folder" && exec "$@"'


def run(guard: Guard, name: str) -> command.Result:
    return command.run(("sh", "-ec", IN_A_DELETED_FOLDER, "sh", *argv(guard, name)))


@pytest.fixture(scope="module")
def running() -> Iterator[Guard]:
    with command.guard() as one:
        one.start("--user", str(ONE), "--ip", SERVICE)
        yield one


@pytest.mark.parametrize("name", LOOK)
def test_a_command_that_reads(running: Guard, name: str) -> None:
    done = run(running, name)
    assert done.status == 0, done


def test_the_commands_that_change_something() -> None:
    allowed = {"start": [ONE], "ip-lockdown": [0, ONE], "allow": [0, ONE, TWO], "revoke": [0, TWO]}
    with command.guard() as guard:
        for name in CHANGE:
            done = run(guard, name)
            assert (done.status, "warning: ebpf can't be used" in done.stderr) == (0, False), (name, done)
            if name in allowed:
                reached = [uid for uid in (0, ONE, TWO, STRANGER) if guard.reach(uid) == "connected"]
                assert reached == allowed[name], name
        assert traces(guard.sandbox.cgroup) == NOTHING
