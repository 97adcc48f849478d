# SPDX-License-Identifier: Apache-2.0
"""The installed command, at the root of cgroup2, in a network namespace with nothing but lo."""

from __future__ import annotations

import json
import subprocess
import sys

from vagrant.guest.world import (
    BACKENDS,
    CHOSEN,
    EXPECT,
    INACTIVE,
    LOCK,
    MANY,
    ONE,
    STAFF,
    STRANGER,
    TWO,
    UNSUPPORTED,
    assert_denied,
    command,
    done,
    everywhere,
    reach,
)  # fmt: skip


def test_the_installed_module_is_that_of_the_wheel() -> None:
    """Without PYTHONPATH the module is imported from the folder of pip."""
    argv = [sys.executable, "-I", "-c", "import imds_guard; print(imds_guard.__file__)"]
    found = subprocess.run(argv, cwd="/", capture_output=True, text=True, check=True).stdout
    assert found.startswith("/usr/local/lib/python3"), found


def test_check_reports_which_backends_work() -> None:
    """start chooses the backend that kernels.toml names, and each refusal has a reason."""
    result = command("check", "--json")
    found = json.loads(result.stdout)
    assert found["taken"] == CHOSEN, found
    assert {one["name"]: one["works"] for one in found["backends"]} == {name: name in EXPECT for name in BACKENDS}, (
        found
    )
    assert [one["name"] for one in found["backends"] if not one["works"] and not one["reason"]] == []
    assert result.returncode == (0 if CHOSEN else UNSUPPORTED)


def test_a_backend_that_can_not_work_is_refused() -> None:
    """Named, and by "auto" where neither works: status 69, one sentence, and everybody still connects."""
    refused = [name for name in BACKENDS if name not in EXPECT]
    for name in [*refused, *([] if CHOSEN else ["auto"])]:
        result = command("start", "--backend", name, "--user", str(ONE), *LOCK)
        assert (result.returncode, result.stdout) == (UNSUPPORTED, ""), result
        assert result.stderr.startswith("imds-guard: "), result
        assert result.stderr.count("\n") == 1, result
        assert reach(STRANGER) == everywhere("connected")
        assert command("status").returncode == INACTIVE


def test_who_gets_through(backend: str) -> None:
    """The user and the supplementary group connect to each address; nobody else does, nor does root."""
    assert json.loads(done("status", "--json"))["backend"] == backend
    assert reach(ONE) == everywhere("connected")
    assert reach(STRANGER, *MANY, STAFF) == everywhere("connected")
    assert_denied(backend, reach(STRANGER, *MANY))
    assert_denied(backend, reach(0))


def test_allow_and_revoke(backend: str) -> None:
    """The running policy gets another user and loses the first."""
    done("allow", "--user", str(TWO))
    assert reach(TWO) == everywhere("connected")
    done("revoke", "--user", str(ONE))
    assert_denied(backend, reach(ONE))
    assert reach(TWO) == everywhere("connected")
