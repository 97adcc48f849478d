# SPDX-License-Identifier: Apache-2.0
"""Forwarded packets beside a real dockerd, firewalld, ufw and nftables.service: they stay rejected, and answers pass.

The order of the tests matters: the last ones leave the machine without the rules of others.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from vagrant.guest import service, world
from vagrant.guest.containers.scene import IPV4, IPV6, POD, ROOT, client, lock, run, start, until, words

RULES = "imds-guard-rules@nftables.service"
CONFIG = Path("/etc/imds-guard/config.toml")
LINKS = Path("/etc/systemd/system/nftables.service.wants")

_PROBE = f"""\
import socket
with socket.socket() as one:
    one.settimeout(20)
    one.bind(("{IPV4}", 0))
    one.connect(("10.99.0.1", 8080))
    print(one.recv(10).decode().strip())
"""


def forwarded(*addresses: str) -> list[str]:
    """What the allowed user gets in another network namespace: the hook lets it connect, and the machine forwards."""
    found = []
    for address in addresses or (IPV4, IPV6):
        linger, to, user = client("allowed", to=address)[1:]
        found += words(run("ip", "netns", "exec", POD, str(ROOT / "client"), linger, to, user).stdout)
    return found


def state() -> str:
    """What status says of forwarded packets; "" where nothing is in force."""
    found = json.loads(world.command("status", "--json").stdout)
    return str(found.get("forwarded", {}).get("state", ""))


@pytest.fixture(scope="module")
def published(docker: None) -> Iterator[None]:
    """A container that greets whoever connects to port 8080 of the machine."""
    greet = "while true; do echo alive | /bin/busybox nc -l -p 80; done"
    run(
        "docker",
        "run",
        "--detach",
        "--name=published",
        "--restart=always",
        "--publish=8080:80",
        "client",
        "/bin/sh",
        "-c",
        greet,
    )
    yield
    run("docker", "rm", "--force", "published")


def probe() -> str:
    """A load balancer's probe: from the locked address to the published port."""
    return run("ip", "netns", "exec", "imds", sys.executable, "-I", "-S", "-c", _PROBE, ok=False).stdout.strip()


def test_without_a_lock_packets_are_forwarded(published: None) -> None:
    """Docker's policy of FORWARD is DROP: a rule of the machine's admin lets these pass."""
    for command in ("iptables", "ip6tables"):
        run(command, "-I", "DOCKER-USER", "-j", "ACCEPT", ok=command == "iptables")
    run("ip6tables", "-I", "FORWARD", "-j", "ACCEPT")
    assert forwarded() == ["connected"] * 2
    until(lambda: probe() == "alive", "an answer of the container")


def test_a_probe_of_a_published_port_is_answered(published: None, backend: str) -> None:
    """It comes from a locked address, and what answers it is forwarded to a locked port."""
    assert (forwarded(), state()) == (["ECONNREFUSED"] * 2, "rejected")
    until(lambda: probe() == "alive", "an answer of the container")


def _restart_docker() -> None:
    run("systemctl", "restart", "docker.service")


def _new_network() -> None:
    run("docker", "network", "create", "later")
    run("docker", "network", "rm", "later")


def _flush_filter() -> None:
    for command in ("iptables", "ip6tables"):
        run(command, "-F")
        run(command, "-P", "FORWARD", "ACCEPT")


def _firewalld() -> None:
    start("firewalld.service")
    for reload in ("--reload", "--complete-reload"):
        run("firewall-cmd", reload, ok=False)  # an emulated machine may take longer than D-Bus waits for a reply
        until(lambda: run("firewall-cmd", "--state", ok=False).stdout.strip() == "running", "the end of the reload")


def _ufw() -> None:
    run("systemctl", "stop", "firewalld.service")
    run("ufw", "--force", "enable")
    run("ufw", "reload")


def _no_ufw() -> None:
    run("ufw", "disable")
    for command in ("iptables", "ip6tables"):
        run(command, "-P", "FORWARD", "ACCEPT")
        run(command, "-F", "FORWARD")


NEIGHBOURS: dict[str, Callable[[], None]] = {
    "docker restart": _restart_docker,
    "docker network create": _new_network,
    "iptables -F": _flush_filter,
    "firewalld": _firewalld,
    "ufw": _ufw,
    "ufw disable": _no_ufw,
}


FLUSHES = {"iptables -F", "firewalld", "ufw"}
"""The fallback's rules go with these: Debian 12's firewalld flushes iptables when it starts and when it stops."""


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_packets_stay_rejected(docker: None, backend: str, neighbour: str) -> None:
    """After what others do to their rules, which come later. A firewall that rejects answers otherwise."""
    NEIGHBOURS[neighbour]()
    assert forwarded() == ["ECONNREFUSED"] * 2
    if backend == "iptables" and neighbour in FLUSHES and not state():
        lock(backend)
    assert state() == "rejected"


def test_a_flush_is_noticed_and_repaired(docker: None, backend: str) -> None:
    """``nft flush ruleset`` removes everybody's rules. Those of the fallback are the whole lock, which is saved."""
    lock(backend, "--save")
    run("nft", "flush", "ruleset")
    noticed = (world.DEGRADED, "open") if backend == "ebpf" else (world.INACTIVE, "")
    assert (world.command("status").returncode, state(), forwarded()) == (*noticed, ["connected"] * 2)
    world.done("verify", "--repair")
    assert (world.command("status").returncode, state(), forwarded()) == (
        world.ACTIVE,
        "rejected",
        ["ECONNREFUSED"] * 2,
    )
    assert json.loads(world.done("status", "--json"))["backend"] == backend
    CONFIG.unlink()
    run("systemctl", "restart", "docker.service")


# --- the units ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed() -> None:
    """The service with --verify, until the last of these tests. Nothing else is locked by then."""
    lock("ebpf", "--save")
    service.slow_down(service.UNIT)
    world.done("install-service", "--verify", "--without-root", "--now")


@pytest.mark.parametrize("verb", ["start", "reload", "restart"])
def test_rules_are_back_after_nftables_service(installed: None, verb: str) -> None:
    """Its file begins with a flush."""
    stamp = service.show(RULES, "InactiveExitTimestampMonotonic")
    service.systemctl(verb, "nftables.service")
    until(lambda: state() == "rejected", "the rules after nftables.service")
    assert service.show(RULES, "ActiveState") in ("active", "reloading")
    assert verb == "reload" or service.show(RULES, "InactiveExitTimestampMonotonic") != stamp


def test_a_stop_of_the_lock_lasts(installed: None) -> None:
    """Also where nftables is restarted afterwards."""
    service.systemctl("stop", service.UNIT)
    service.systemctl("restart", "nftables.service")
    until(lambda: service.show(RULES, "ActiveState") == "active", "the end of the unit")
    assert world.command("status").returncode == world.INACTIVE
    service.systemctl("start", service.UNIT)
    until(lambda: state() == "rejected", "the rules of a start")


def test_uninstall_leaves_no_link(installed: None) -> None:
    """The instances are disabled with their template. A timer that stayed would repair what the other tests break."""
    assert [path.name for path in LINKS.iterdir()] == [RULES]
    service.systemctl("stop", service.UNIT)
    world.done("uninstall-service")
    assert not LINKS.exists()
    service.systemctl("stop", "nftables.service")  # its end flushes all rules, and Debian 12's firewalld would end it
    world.done("stop")
    assert world.left() == []
    CONFIG.unlink()
