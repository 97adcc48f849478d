# SPDX-License-Identifier: Apache-2.0
"""The unit and the container in the path of a cgroup."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from imds_guard.watch.cgroup_info import _RUNTIMES, CgroupInfo, parse_path

HEX = "0123456789ab" + "c" * 52
SHORT = HEX[:12]
BUILD = "k3x9mwz0q1r2s3t4u5v6w7x8y"
TASK = "0123456789abcdef" * 2
VIRTUAL = "machine-qemu\\x2d1\\x2dvm.scope"
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
        (f"/docker/buildkit/{BUILD}", None, f"buildkit:{BUILD}"),
        (f"/system.slice/docker-{BUILD}.scope", f"docker-{BUILD}.scope", f"buildkit:{BUILD}"),
        (f"/ecs/{TASK}/{HEX}", None, f"ecs:{SHORT}"),
        (f"/ecs/{TASK}/{TASK}-3456", None, f"ecs:{TASK}-3456"),
        (
            f"/ecstasks.slice/ecstasks-{TASK}.slice/docker-{HEX}.scope",
            f"docker-{HEX}.scope",
            f"docker:{SHORT}",
        ),
        (f"/system.slice/nerdctl-{HEX}.scope", f"nerdctl-{HEX}.scope", f"nerdctl:{SHORT}"),
        (f"{USER}/user.slice/nerdctl-{HEX}.scope", "user@1000.service", f"nerdctl:{SHORT}"),
        (f"/system.slice/web.service/libpod-payload-{HEX}", "web.service", f"podman:{SHORT}"),
        (f"{USER}/app.slice/web.service/libpod-payload-{HEX}", "user@1000.service", f"podman:{SHORT}"),
        (f"/machine.slice/libpod-conmon-{HEX}.scope", f"libpod-conmon-{HEX}.scope", None),
        ("/default/web", None, "containerd:web"),
        (f"/default/{HEX}", None, f"containerd:{SHORT}"),
        (f"/k8s.io/{HEX}", None, f"containerd:{SHORT}"),
        (f"{USER}/default/web", "user@1000.service", None),
        ("/system.slice/crun-web.scope", "crun-web.scope", "crun:web"),
        (f"{USER}/user.slice/crun-web.scope/container", "user@1000.service", "crun:web"),
        ("/machine.slice/machine-web.scope/payload", "machine-web.scope", "nspawn:web"),
        ("/machine.slice/machine-web.scope/payload/system.slice/a.service", "machine-web.scope", "nspawn:web"),
        ("/machine.slice/machine-web.scope/supervisor", "machine-web.scope", None),
        (f"/machine.slice/{VIRTUAL}", VIRTUAL, None),
        (f"/machine.slice/{VIRTUAL}/libvirt/emulator", VIRTUAL, None),
        ("/machine.slice/machine-vm.scope", "machine-vm.scope", None),
        (
            "/machine.slice/machine-lxc\\x2d42\\x2dweb.scope",
            "machine-lxc\\x2d42\\x2dweb.scope",
            "libvirt-lxc:web",
        ),
        (f"/machine.slice/machine-web.scope/payload/docker/{HEX}", "machine-web.scope", f"docker:{SHORT}"),
        ("/machine.slice/systemd-nspawn@web.service/payload", "systemd-nspawn@web.service", "nspawn:web"),
        ("/lxc.payload.web/system.slice/cron.service", "cron.service", "lxc:web"),
        ("/lxc/web", None, "lxc:web"),
        ("/lxc.monitor.web", None, None),
        (f"/lxc.payload.web/docker/{HEX}", None, f"docker:{SHORT}"),
    ],
)
def test_unit_and_container_of_a_path(path: str, unit: str | None, container: str | None) -> None:
    assert parse_path(path) == CgroupInfo(path, unit, container)


def test_the_page_names_every_runtime() -> None:
    """The names in docs/operations.md are those of the table."""
    page = Path(__file__).resolve().parents[2] / "docs/operations.md"
    (line,) = re.findall(
        r"- `container=RUNTIME:NAME`(.*?)\. It is missing", page.read_text(encoding="utf-8"), re.DOTALL
    )
    shown = {"nspawn": "systemd-nspawn", "libvirt-lxc": "libvirt's LXC"}
    names = {runtime.name for runtime in _RUNTIMES}
    assert [name for name in sorted(names) if shown.get(name, name).lower() not in line.lower()] == []
