# SPDX-License-Identifier: Apache-2.0
"""What a cgroup's path says of a unit and a container, and what is known of a process."""

from __future__ import annotations

import os
import sys
import time

import pytest

from imds_guard.watch import process_info as describe
from imds_guard.watch.process_info import NOTHING, home_in

HEX = "0123456789ab" + "c" * 52
SHORT = HEX[:12]
USER = "/user.slice/user-1000.slice/user@1000.service"


@pytest.mark.parametrize(
    ("path", "unit", "container"),
    [
        ("/", None, None),
        ("/system.slice/nginx.service", "nginx.service", None),
        ("/system.slice/nginx.service/worker", "nginx.service", None),
        ("/system.slice/system-getty.slice/getty@tty1.service", "getty@tty1.service", None),
        ("/user.slice/user-1000.slice/session-3.scope", "session-3.scope", None),
        (f"{USER}/app.slice/evil.service", "user@1000.service", None),
        (f"/system.slice/docker-{HEX}.scope", f"docker-{HEX}.scope", f"docker:{SHORT}"),
        (f"/docker/{HEX}", None, f"docker:{SHORT}"),
        (f"/docker/{HEX}/init.scope", "init.scope", f"docker:{SHORT}"),
        (f"{USER}/user.slice/libpod-{HEX}.scope/container", "user@1000.service", f"podman:{SHORT}"),
        (f"/libpod_parent/libpod-{HEX}", None, f"podman:{SHORT}"),
        (
            f"/kubepods.slice/kubepods-pod1.slice/cri-containerd-{HEX}.scope",
            f"cri-containerd-{HEX}.scope",
            f"containerd:{SHORT}",
        ),
        (f"/kubepods.slice/kubepods-pod1.slice/crio-{HEX}.scope", f"crio-{HEX}.scope", f"cri-o:{SHORT}"),
        (f"/kubepods/burstable/pod1/{HEX}", None, f"kubernetes:{SHORT}"),
        ("/machine.slice/machine-web.scope", "machine-web.scope", "nspawn:web"),
        ("/machine.slice/systemd-nspawn@web.service/payload", "systemd-nspawn@web.service", "nspawn:web"),
        ("/lxc.payload.web/system.slice/cron.service", "cron.service", "lxc:web"),
        ("/lxc/web", None, "lxc:web"),
    ],
)
def test_unit_and_container_of_a_path(path: str, unit: str | None, container: str | None) -> None:
    home = home_in(path)
    assert (home.path, home.unit, home.container) == (path, unit, container)


def test_a_running_process_has_its_program() -> None:
    program = describe.program_of(os.getpid(), time.time())
    assert program.exe == os.path.realpath(sys.executable)
    assert program.command_line is not None


def test_a_process_that_began_later_is_another_one() -> None:
    """Its number was given again."""
    assert describe.program_of(os.getpid(), time.time() - 10**6) == NOTHING


def test_a_process_that_is_gone_has_nothing() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    assert describe.program_of(pid, time.time()) == NOTHING


def test_a_time_since_boot_is_a_time_of_day() -> None:
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert abs(describe.wall_clock(now) - time.time()) < 0.5
    assert abs(describe.wall_clock(now - 5_000_000_000) - time.time() + 5) < 0.5


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "1970-01-01T00:00:00.000Z"), (1_795_247_999.9999, "2026-11-21T07:59:59.999Z")]
)
def test_times_are_in_utc(seconds: float, text: str) -> None:
    assert describe.iso_time(seconds) == text


def test_octets_that_are_no_text_are_shown_as_numbers() -> None:
    assert describe.lenient(os.fsdecode(b"/tmp/\xff\xc3\xa4")) == "/tmp/\\xff\u00e4"


def test_names_are_remembered_and_unknown_ones_are_numbers() -> None:
    names = describe.Names()
    assert [names.user(0), names.group(0), names.user(4_000_000_123)] == ["root", "root", "4000000123"]
