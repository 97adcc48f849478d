# SPDX-License-Identifier: Apache-2.0
"""How a container of each runtime and mode is made. The client runs in it.

A mode is a function that gets the client's command, makes what it needs, and removes it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Callable, NamedTuple

from vagrant.guest.containers.scene import IPV4, IPV6, POD, ROOT, as_user, run

Act = Callable[[Sequence[str]], str]
"""Runs the command in a container, and returns its output."""


class Mode(NamedTuple):
    """A way to make a container. ``fixture`` starts its runtime."""

    fixture: str
    act: Act
    to: str = IPV4
    alone: bool = False
    """Each caller needs a container of its own, with the account as its user."""


MODES: dict[tuple[str, str], Mode] = {}
"""(runtime, mode) of cells.toml -> how it is made."""
_NUMBERS = count(1)


def mode(runtime: str, name: str, fixture: str, to: str = IPV4) -> Callable[[Act], Act]:
    """Registers a function as a mode."""

    def register(act: Act) -> Act:
        MODES[runtime, name] = Mode(fixture, act, to)
        return act

    return register


# --- docker ---------------------------------------------------------------------------------------------------------


def _docker(*options: str) -> Act:
    return lambda argv: run("docker", "run", "--rm", *options, "client", *argv).stdout


for _name, _options in {
    "default": (),
    "host network": ("--network=host",),
    "privileged": ("--privileged",),
    "host PIDs": ("--pid=host",),
    "host network and PIDs": ("--network=host", "--pid=host", "--privileged"),
}.items():
    mode("docker", _name, "docker")(_docker(*_options))
for _name in ("default", "host network"):
    MODES["docker", f"{_name}, containers allowed"] = MODES["docker", _name]


def _in_new_network(argv: Sequence[str], *options: str) -> str:
    """As docker compose up does it: a network with a bridge of its own, and a container in it."""
    with ExitStack() as stack:
        run("docker", "network", "create", *options, "later")
        stack.callback(run, "docker", "network", "rm", "later")
        return _docker("--network=later")(argv)


mode("docker", "new network", "docker")(_in_new_network)


@mode("docker", "new IPv6 network", "docker", to=IPV6)
def _docker_ipv6(argv: Sequence[str]) -> str:
    return _in_new_network(argv, "--ipv6", "--subnet=fd96::/64")


@mode("docker", "restarted", "docker")
def _docker_restarted(argv: Sequence[str]) -> str:
    with ExitStack() as stack:
        run("docker", "run", "--detach", "--name=again", "client", "/bin/sleep", "3600")
        stack.callback(run, "docker", "rm", "--force", "again")
        run("docker", "restart", "--time=0", "again")
        return run("docker", "exec", "again", *argv).stdout


@mode("docker", "userns-remap", "docker_remapped")
def _docker_remapped(argv: Sequence[str]) -> str:
    return run("docker", "--host=unix:///run/remapped.sock", "run", "--rm", "client", *argv).stdout


# --- podman ---------------------------------------------------------------------------------------------------------


def _podman(*options: str) -> Act:
    return lambda argv: run("podman", "run", "--rm", *options, "localhost/client", *argv).stdout


for _name, _options in {
    "default": (),
    "host network": ("--network=host",),
    "host PIDs": ("--pid=host",),
    "user namespace": ("--uidmap=0:200000:65536", "--gidmap=0:200000:65536"),
}.items():
    mode("podman", _name, "podman")(_podman(*_options))


@mode("podman", "Quadlet", "podman")
def _quadlet(argv: Sequence[str]) -> str:
    with ExitStack() as stack:
        file = Path("/etc/containers/systemd/web.container")
        file.parent.mkdir(exist_ok=True)
        file.write_text("[Container]\nImage=localhost/client\nExec=/bin/sleep 3600\nPodmanArgs=--stop-timeout=0\n")
        run("systemctl", "daemon-reload")
        run("systemctl", "start", "web.service")
        stack.callback(run, "systemctl", "stop", "web.service")
        return run("podman", "exec", "systemd-web", *argv).stdout


def _rootless(*options: str) -> Act:
    return lambda argv: as_user("podman", "run", "--rm", *options, "localhost/client", *argv).stdout


for _name, _options in {
    "pasta": ("--network=pasta",),
    "slirp4netns": ("--network=slirp4netns",),
    "host network": ("--network=host",),
}.items():
    mode("podman-rootless", _name, "podman_rootless")(_rootless(*_options))


# --- containerd, systemd-nspawn, lxc --------------------------------------------------------------------------------


def _ctr(*options: str, namespace: str = "default") -> Act:
    def act(argv: Sequence[str]) -> str:
        # A name is used once: the next container would have to wait until the task of the first is gone.
        name = f"web{next(_NUMBERS)}"
        return run("ctr", "-n", namespace, "run", "--rm", *options, "--rootfs", str(ROOT), name, *argv).stdout

    return act


_OWN = f"--with-ns=network:/var/run/netns/{POD}"
mode("ctr", "own network", "containerd")(_ctr(_OWN))
mode("ctr", "host network", "containerd")(_ctr("--net-host"))
mode("ctr", "namespace k8s.io", "containerd")(_ctr(_OWN, namespace="k8s.io"))
mode("ctr", "crun", "containerd")(_ctr("--net-host", "--runc-binary=crun"))


def _nspawn(*options: str) -> Act:
    usual = ("--quiet", "--pipe", "--as-pid2", "--machine=web", f"--directory={ROOT}")
    return lambda argv: run("systemd-nspawn", *usual, *options, *argv).stdout


for _name, _options in {
    "host network": (),
    "own network": (f"--network-namespace-path=/run/netns/{POD}",),
    "user namespace": ("--private-users=200000:65536", "--private-users-ownership=off"),
}.items():
    mode("nspawn", _name, "image")(_nspawn(*_options))


def _lxc(*settings: str) -> Act:
    def act(argv: Sequence[str]) -> str:
        name = f"web{next(_NUMBERS)}"
        folder = Path("/var/lib/lxc", name)
        folder.mkdir(parents=True)
        usual = [f"lxc.rootfs.path = dir:{ROOT}", f"lxc.uts.name = {name}", "lxc.init.cmd = /bin/sleep 3600"]
        usual.append("lxc.mount.auto = proc:mixed")
        (folder / "config").write_text("\n".join([*usual, *settings]) + "\n", encoding="ascii")
        with ExitStack() as stack:
            started = run("lxc-start", f"--name={name}", f"--logfile={folder}/log", "--logpriority=INFO", ok=False)
            assert started.returncode == 0, (started, (folder / "log").read_text(encoding="utf-8")[-4000:])
            stack.callback(run, "lxc-stop", f"--name={name}", "--kill")
            return run("lxc-attach", f"--name={name}", "--", *argv).stdout

    return act


_BRIDGED = (
    "lxc.net.0.type = veth", "lxc.net.0.link = br-lxc", "lxc.net.0.flags = up", "lxc.net.0.name = eth0",
    "lxc.net.0.ipv4.address = 10.97.0.2/24", "lxc.net.0.ipv4.gateway = 10.97.0.1",
)  # fmt: skip
_IDMAP = ("lxc.idmap = u 0 200000 65536", "lxc.idmap = g 0 200000 65536")
mode("lxc", "bridge", "lxc")(_lxc(*_BRIDGED))
mode("lxc", "host network", "lxc")(_lxc("lxc.net.0.type = none"))
mode("lxc", "user namespace", "lxc")(_lxc(*_BRIDGED, *_IDMAP))


# --- units of systemd -----------------------------------------------------------------------------------------------


def _unit(*properties: str) -> Act:
    def act(argv: Sequence[str]) -> str:
        program, linger, address, user = argv
        account = f"--property=User={'' if user == 'root' else user}"
        options = ("--wait", "--pipe", "--quiet", "--collect", account, *(f"--property={one}" for one in properties))
        return run("systemd-run", *options, f"{ROOT}{program}", linger, address, "self").stdout

    return act


for _name, _options in {
    "plain": (),
    "PrivateUsers=": ("PrivateUsers=yes",),
    "PrivatePIDs=": ("PrivatePIDs=yes",),
    "NetworkNamespacePath=": (f"NetworkNamespacePath=/run/netns/{POD}",),
}.items():
    MODES["systemd", _name] = Mode("image", _unit(*_options), alone=True)


def _dynamic_user(argv: Sequence[str]) -> str:
    """An account that exists is taken, and another name gets a number of systemd's (systemd.exec(5))."""
    *before, user = argv
    return _unit("DynamicUser=yes")([*before, "somebody-new" if user == "stranger" else user])


MODES["systemd", "DynamicUser="] = Mode("image", _dynamic_user, alone=True)
