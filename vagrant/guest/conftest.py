# SPDX-License-Identifier: Apache-2.0
"""Each backend is started once by the installed command; what is tried on it follows; then it is stopped.

One start and not one a test: every start of eBPF compiles, and an emulated processor takes 20 s for that.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest

from vagrant.guest import world

if "IMDS_GUARD_ROW" not in os.environ:
    raise pytest.UsageError("these tests lock the whole machine: they are for the guests of vagrant/run.py")


@pytest.fixture(scope="session", autouse=True)
def services() -> Iterator[None]:
    """Somebody listens where the metadata services would be."""
    with world.listeners():
        yield


@pytest.fixture(scope="session", params=world.BACKENDS)
def backend(request: pytest.FixtureRequest, services: None) -> Iterator[str]:
    """Each backend that must work here, started with a user and a group; afterwards nothing is locked."""
    name: str = request.param
    if name not in world.EXPECT:
        pytest.skip(f"{name} is not expected to work here")
    assert world.reach(world.STRANGER) == world.everywhere("connected")
    # What start takes by itself is not named, so that the choice is tested, too.
    chosen = () if name == world.TAKEN else ("--backend", name)
    words = ("start", *chosen, "--user", str(world.ONE), "--group", str(world.STAFF), *world.LOCK)
    with _somebody_elses_rule() if name == "iptables" else nullcontext():
        started = world.in_private_mounts(*words) if world.PRIVATE_MOUNTS else world.command(*words)
        assert started.returncode == 0, started
        assert f"imds-guard is active ({name})" in started.stdout
        yield name
        if world.left():  # a test failed before the one that stops
            world.command("stop")


@contextmanager
def _somebody_elses_rule() -> Iterator[None]:
    """A rule that accepts everything, there before ours: rules that are appended lose to it."""
    rule = ["OUTPUT", "-p", "tcp", "-j", "ACCEPT"]
    for program in ("iptables", "ip6tables"):
        subprocess.run([program, "-w", "-A", *rule], check=True)
    yield
    for program in ("iptables", "ip6tables"):
        subprocess.run([program, "-w", "-D", *rule], check=True)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First what needs no backend, then all that is about one, then all that is about the other."""
    items.sort(key=_place)


def _place(item: pytest.Item) -> tuple[int, str]:
    """By backend, then by the number in the file's name: pytest's own order goes by fixtures."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return (1 + world.BACKENDS.index(params["backend"]) if "backend" in params else 0, item.path.name)
