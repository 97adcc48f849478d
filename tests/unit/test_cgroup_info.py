# SPDX-License-Identifier: Apache-2.0
"""The unit and the container in the path of a cgroup."""

from __future__ import annotations

import pytest

from imds_guard.watch.cgroup_info import CgroupInfo, parse_path

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
        (f"/lxc.payload.web/docker/{HEX}", None, f"docker:{SHORT}"),
    ],
)
def test_unit_and_container_of_a_path(path: str, unit: str | None, container: str | None) -> None:
    assert parse_path(path) == CgroupInfo(path, unit, container)
