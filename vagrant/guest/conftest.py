# SPDX-License-Identifier: Apache-2.0
"""Each backend is started once by the installed command; then its tests run; then it is stopped.

Each start of eBPF compiles, which takes 20 s on an emulated processor.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest

from vagrant.guest import world

if "IMDS_GUARD_ROW" not in os.environ:
    raise pytest.UsageError("these tests lock the whole machine: run them only in the guests of vagrant/run.py")


@pytest.fixture(scope="session", autouse=True)
def services() -> Iterator[None]:
    """Listeners at the addresses of the metadata services."""
    with world.listeners():
        yield


@pytest.fixture(scope="session", params=world.BACKENDS)
def backend(request: pytest.FixtureRequest, services: None) -> Iterator[str]:
    """Each backend that must work here, started with a user and a group. Afterwards nothing is locked."""
    name: str = request.param
    if name not in world.EXPECT:
        pytest.skip(f"{name} is not expected to work here")
    assert world.reach(world.STRANGER) == world.everywhere("connected")
    # The backend that start chooses is not named, so that the choice is tested, too.
    chosen = () if name == world.CHOSEN else ("--backend", name)
    arguments = ("start", *chosen, "--user", str(world.ONE), "--group", str(world.STAFF), *world.LOCK)
    with _rule_of_somebody_else() if name == "iptables" else nullcontext():
        started = world.in_private_mounts(*arguments) if world.PRIVATE_MOUNTS else world.command(*arguments)
        assert started.returncode == 0, started
        assert f"imds-guard is active ({name})" in started.stdout
        yield name
        if world.left():  # a test failed before the one that stops
            world.command("stop")


@contextmanager
def _rule_of_somebody_else() -> Iterator[None]:
    """A rule that accepts everything, made before ours: rules that are appended after it have no effect."""
    rule = ["OUTPUT", "-p", "tcp", "-j", "ACCEPT"]
    for program in ("iptables", "ip6tables"):
        subprocess.run([program, "-w", "-A", *rule], check=True)
    yield
    for program in ("iptables", "ip6tables"):
        subprocess.run([program, "-w", "-D", *rule], check=True)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders the tests: those without a backend, then all tests of one backend, then all of the other."""
    items.sort(key=_position)


def _position(item: pytest.Item) -> tuple[int, str]:
    """By backend, then by the number in the name of the file. Pytest alone would order by fixtures."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return (1 + world.BACKENDS.index(params["backend"]) if "backend" in params else 0, item.path.name)
