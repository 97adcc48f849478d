# SPDX-License-Identifier: Apache-2.0
"""Another program is attached at the root alone (no BPF_F_ALLOW_MULTI): eBPF can't hold, and iptables takes over."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from imds_guard.kernel.bpf import syscall
from imds_guard.kernel.bpf.attr import AttachType
from imds_guard.kernel.cgroup import open_cgroup
from tests.kernel.guards import load_stranger
from vagrant.guest.world import (
    EXPECT,
    IPV4,
    IPV6,
    LOCK,
    ONE,
    STRANGER,
    assert_denied,
    command,
    done,
    everywhere,
    left,
    reach,
)

pytestmark = pytest.mark.skipif(not {"ebpf", "iptables"} <= EXPECT, reason="one backend alone works here")

_PROG_ATTACH, _PROG_DETACH = 8, 9  # enum bpf_cmd in include/uapi/linux/bpf.h
CONFIG = f'[lock.web]\nendpoints = ["{IPV4}", "{IPV6}"]\nusers = [{ONE}]\n'


@pytest.fixture
def exclusive() -> Iterator[None]:
    """A connect4 program of somebody else, attached at the root without BPF_F_ALLOW_MULTI."""
    kind = AttachType.CGROUP_INET4_CONNECT
    program = load_stranger(kind)
    with open_cgroup() as root:
        attach = struct.pack("=5I", root.fd, program, kind, 0, 0)
        result, error, _ = syscall.invoke(_PROG_ATTACH, attach)
        assert result == 0, os.strerror(error)
        try:
            yield
        finally:
            result, error, _ = syscall.invoke(_PROG_DETACH, attach)
            assert result == 0, os.strerror(error)
            os.close(program)


def _assert_iptables_holds() -> None:
    assert json.loads(done("status", "--json"))["backend"] == "iptables"
    assert reach(ONE) == everywhere("connected")
    assert_denied("iptables", reach(STRANGER))
    done("stop")
    assert left() == []
    assert reach(STRANGER) == everywhere("connected")


@pytest.mark.usefixtures("exclusive")
def test_start_takes_iptables_and_says_why() -> None:
    """The eBPF backend is tried first, and its refusal is a warning."""
    started = command("start", "--user", str(ONE), *LOCK)
    assert started.returncode == 0, started
    assert "imds-guard is active (iptables)" in started.stdout
    assert "ebpf" in started.stderr, started
    _assert_iptables_holds()


@pytest.mark.usefixtures("exclusive")
def test_boot_takes_iptables_and_says_why(tmp_path: Path) -> None:
    """The emergency lock and the configuration's policy, one after the other."""
    config = tmp_path / "config.toml"
    config.write_text(CONFIG, encoding="utf-8")
    started = command("start", "--boot", "--config", str(config))
    assert started.returncode == 0, started
    assert "imds-guard is active (iptables)" in started.stdout
    assert "ebpf" in started.stderr, started
    _assert_iptables_holds()


@pytest.mark.usefixtures("exclusive")
def test_boot_with_an_unusable_configuration_puts_the_emergency_lock_on_with_iptables(tmp_path: Path) -> None:
    """The exit status is that of the configuration."""
    config = tmp_path / "config.toml"
    config.write_text(f"colour = 1\n{CONFIG}", encoding="utf-8")
    assert command("start", "--boot", "--config", str(config)).returncode == 78
    found = json.loads(command("status", "--json").stdout)
    assert (found["backend"], found["emergency"]) == ("iptables", True)
    assert_denied("iptables", reach(STRANGER))
    done("stop")
    assert left() == []


def test_without_it_ebpf_holds_again() -> None:
    """Nothing of the fallback stays."""
    done("start", "--user", str(ONE), *LOCK)
    assert json.loads(done("status", "--json"))["backend"] == "ebpf"
    done("stop")
    assert left() == []
