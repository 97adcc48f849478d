# SPDX-License-Identifier: Apache-2.0
"""Fixtures that start a runtime once, when the first test wants it. __init__.py says how to use them.

``services`` and ``backend`` take the place of those in vagrant/guest/conftest.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from vagrant.guest import world
from vagrant.guest.containers import scene
from vagrant.guest.containers.scene import Watch


@pytest.fixture(scope="session", autouse=True)
def services() -> Iterator[None]:
    """The metadata service, and the accounts of the machine."""
    scene.make_accounts()
    with scene.metadata_service():
        yield


@pytest.fixture(scope="session")
def network(services: None) -> None:
    """The metadata service in a network namespace of its own. Every test of this folder has it."""


@pytest.fixture(scope="session", params=world.BACKENDS)
def backend(request: pytest.FixtureRequest, services: None) -> Iterator[str]:
    """Each backend, started by the installed command. Afterwards nothing is locked."""
    name: str = request.param
    with scene.locked(name):
        yield name


@pytest.fixture(scope="session")
def watch(backend: str) -> Iterator[Watch | None]:
    """``imds-guard watch``, under eBPF."""
    if backend != "ebpf":
        yield None
        return
    with Watch() as watch:
        yield watch


@pytest.fixture(scope="session")
def image(services: None) -> Path:
    """The image of the containers as a tar."""
    scene.make_image()
    return scene.IMAGE


@pytest.fixture(scope="session")
def docker(image: Path) -> None:
    """dockerd, with the image "client"."""
    Path("/etc/docker").mkdir(exist_ok=True)
    # The guest's root is an overlay, on which no other overlay can be.
    Path("/etc/docker/daemon.json").write_text(json.dumps({"storage-driver": "vfs"}), encoding="ascii")
    scene.start("docker.service")
    scene.run("docker", "import", str(image), "client")


@pytest.fixture(scope="session")
def docker_remapped(docker: None, image: Path) -> None:
    """A second dockerd with userns-remap, at /run/remapped.sock, with a bridge that it does not make itself."""
    scene.make_bridge("br-remapped", 96)
    Path("/etc/docker/remapped.json").write_text("{}", encoding="ascii")
    dockerd = (
        "/usr/sbin/dockerd", "--config-file=/etc/docker/remapped.json", "--host=unix:///run/remapped.sock",
        "--pidfile=/run/remapped.pid", "--exec-root=/run/docker-remapped", "--data-root=/var/lib/docker-remapped",
        "--storage-driver=vfs", "--userns-remap=remapped", "--bridge=br-remapped", "--iptables=false",
        "--containerd=/run/containerd/containerd.sock", "--containerd-namespace=remapped",
        "--containerd-plugins-namespace=plugins.remapped",
    )  # fmt: skip
    unit = Path("/run/systemd/system/docker-remapped.service")
    unit.write_text(
        f"[Service]\nType=notify\nTimeoutStartSec=infinity\nExecStart={' '.join(dockerd)}\n", encoding="ascii"
    )
    scene.run("systemctl", "daemon-reload")
    scene.start(unit.name)
    scene.run("docker", "--host=unix:///run/remapped.sock", "import", str(image), "client")


@pytest.fixture(scope="session")
def podman(image: Path) -> None:
    """The image "client" in the store of root."""
    Path("/etc/containers").mkdir(exist_ok=True)
    storage = {"driver": "vfs", "runroot": "/run/containers/storage", "graphroot": "/var/lib/containers/storage"}
    lines = ["[storage]", *(f'{key} = "{value}"' for key, value in storage.items())]
    Path("/etc/containers/storage.conf").write_text("\n".join(lines) + "\n", encoding="ascii")
    scene.run("podman", "import", str(image), "localhost/client")


@pytest.fixture(scope="session")
def podman_rootless(image: Path) -> None:
    """The image "client" in the store of the user "allowed", whose systemd runs."""
    # pasta and slirp4netns open it. On other machines udev makes it, for everybody; no udev runs here.
    scene.run("modprobe", "tun")
    Path("/dev/net/tun").chmod(0o666)
    folder = Path("/home/allowed/.config/containers")
    folder.mkdir(parents=True)
    (folder / "storage.conf").write_text('[storage]\ndriver = "vfs"\n', encoding="ascii")
    scene.run("chown", "-R", "allowed:others", "/home/allowed")
    scene.run("loginctl", "enable-linger", "allowed")
    scene.until(Path(f"/run/user/{scene.ALLOWED}/bus").exists, "the bus of the user's systemd")
    scene.as_user("podman", "import", str(image), "localhost/client")


@pytest.fixture(scope="session")
def containerd(image: Path) -> None:
    """containerd, for ctr run --rootfs."""
    scene.start("containerd.service")


@pytest.fixture(scope="session")
def lxc(image: Path) -> None:
    """A bridge for containers."""
    scene.make_bridge("br-lxc", 97)
