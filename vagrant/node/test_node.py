# SPDX-License-Identifier: Apache-2.0
"""The node image as a pod. The order of the tests matters: each starts with the state that the one before has left."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vagrant.node.pod import MEMORY_MIB
from vagrant.node.scene import (
    CALL,
    CLIENT,
    CLIENTS,
    CONNECTED,
    DENIED,
    IPV4,
    IPV6,
    JOB,
    MAIN,
    READERS,
    STRANGER,
    STRANGERS,
    Storm,
    container,
    down,
    in_image,
    journal,
    pins,
    play,
    reach,
    reach_in,
    run,
    services,
    status,
    until,
)  # fmt: skip

ACTIVE, DEGRADED, INACTIVE = 0, 1, 3
ANOTHER = 41_004
OTHER_POLICY = f"""\
[lock.default]
endpoints = ["{IPV4}", "{IPV6}"]
users = ["metadata-client", {ANOTHER}]
"""
UNUSABLE = "[lock.default\n"


@pytest.fixture(scope="module", autouse=True)
def node() -> Iterator[None]:
    """The services of the node, and the image in podman's store."""
    run("podman", "load", "--input", str(JOB / "image.tar"))
    os.makedirs("/run/imds-guard", mode=0o700)
    Path("/run/xtables.lock").touch()
    with services():
        yield


def test_the_node_has_nothing_of_ours() -> None:
    """Neither imds-guard, bcc, iptables nor nft; and the root can't be written."""
    assert [name for name in ("imds-guard", "iptables", "iptables-nft", "nft") if shutil.which(name)] == []
    assert importlib.util.find_spec("bcc") is None
    with pytest.raises(OSError, match="Read-only file system"):
        Path("/etc/imds-guard-was-here").touch()


def test_before_the_pod_everybody_connects() -> None:
    """Without this control the denials below would show nothing."""
    assert reach(STRANGER, STRANGERS) == CONNECTED
    assert status() == INACTIVE
    with container("--network=host") as name:
        assert reach_in(name, CLIENT) == CONNECTED


def test_a_container_apart_from_the_node_is_refused() -> None:
    """It would lock by iptables, with the names of the image."""
    for option, advice in (("--pid=private", "hostPID: true"), ("--network=none", "hostNetwork: true")):
        done = in_image("imds-guard-node", "lock", ok=False, more=(option,))
        assert (done.returncode, advice in done.stderr) == (78, True), done
    assert status() == INACTIVE


def test_the_pod_locks_the_node() -> None:
    """The names of the configuration are accounts of the node, which the image does not know."""
    play()
    assert reach(STRANGER, STRANGERS) == DENIED
    assert reach(0, 0) == DENIED
    assert reach(CLIENT, CLIENTS) == CONNECTED
    assert reach(STRANGER, STRANGERS, READERS) == CONNECTED


def test_status_names_the_accounts_of_the_node() -> None:
    """Asked in the running container, as kubectl exec does."""
    done = run("podman", "exec", MAIN, "imds-guard", "status", "--json")
    found = json.loads(done.stdout)
    assert found["backend"] == "ebpf"
    (lock,) = found["policy"]["locks"]
    assert lock["allow"]["users"] == [{"id": CLIENT, "name": "metadata-client"}]
    assert lock["allow"]["groups"] == [{"id": READERS, "name": "metadata-readers"}]


def test_a_pod_on_the_network_of_the_node_is_denied() -> None:
    """Whatever its user ID."""
    with container("--network=host") as name:
        assert [reach_in(name, uid) for uid in (CLIENT, 0)] == [DENIED, DENIED]


def test_a_pod_with_a_network_of_its_own_is_denied() -> None:
    """Its network namespace has a metadata service of its own, which a process of the node reaches."""
    with container("--network=none") as name:
        pid = run("podman", "inspect", "--format", "{{.State.Pid}}", name).stdout.strip()
        within = ("nsenter", f"--net=/proc/{pid}/ns/net")
        with services(*within):
            assert [reach_in(name, uid) for uid in (CLIENT, 0)] == [DENIED, DENIED]
            as_client = ("setpriv", f"--reuid={CLIENT}", f"--regid={CLIENTS}", "--clear-groups")
            said = run(*within, *as_client, "python3", *CALL).stdout
            assert said.split() == CONNECTED


def test_the_metrics_are_written() -> None:
    """By the main container, into a folder of the node."""
    file = Path("/run/node-exporter/imds_guard.prom")
    until(file.exists, "the file of the metrics")
    assert "imds_guard_active 1.0" in file.read_text(encoding="utf-8").splitlines()


def test_the_main_container_repairs() -> None:
    """A pin of a link that is removed is an opened hook: verify --repair attaches it again."""
    link = next(path for path in Path("/sys/fs/bpf").rglob("*connect4*") if "imds" in str(path))
    link.unlink()
    until(lambda: reach(STRANGER, STRANGERS) == DENIED and status() == ACTIVE, "the repair")


def test_the_pod_is_replaced_without_a_gap() -> None:
    """Deleted and made again with another policy, as an upgrade does, while a stranger tries all the time."""
    with Storm() as storm:
        down()
        assert reach(ANOTHER, STRANGERS) == DENIED
        play(OTHER_POLICY)
    assert set(storm.outcomes) == {"EPERM"}, storm.outcomes
    assert storm.outcomes["EPERM"] > 100, storm.outcomes
    assert reach(ANOTHER, STRANGERS) == CONNECTED
    assert reach(STRANGER, STRANGERS, READERS) == DENIED


def test_the_main_container_ends_at_once() -> None:
    """On SIGTERM, with 0, and long before podman kills it."""
    began = time.monotonic()
    run("podman", "stop", "--time=60", MAIN)
    assert time.monotonic() - began < 30
    assert run("podman", "inspect", "--format", "{{.State.ExitCode}}", MAIN).stdout.strip() == "0"


def test_without_a_pod_the_lock_stays() -> None:
    """Nothing of ours runs on the node."""
    down()
    assert run("pgrep", "-f", "imds-guard", ok=False).stdout == ""
    assert reach(STRANGER, STRANGERS) == DENIED
    assert status() == ACTIVE


def test_an_unusable_configuration_leaves_what_was_in_force() -> None:
    """The init container ends with 0, so nothing is started again and again; the sentence is in the log."""
    play(UNUSABLE)
    assert reach(STRANGER, STRANGERS) == DENIED
    assert reach(ANOTHER, STRANGERS) == CONNECTED
    assert "this is not TOML" in journal()
    down()


def test_unlock_opens() -> None:
    """And leaves nothing in the kernel."""
    in_image("imds-guard-node", "unlock")
    assert reach(STRANGER, STRANGERS) == CONNECTED
    assert pins() == []
    assert status() == INACTIVE


def test_an_unusable_configuration_with_nothing_in_force_is_the_emergency_lock() -> None:
    """Root connects, nobody else; status says that it is degraded."""
    play(UNUSABLE)
    assert reach(STRANGER, STRANGERS) == DENIED
    assert reach(CLIENT, CLIENTS) == DENIED
    assert reach(0, 0)[:2] == CONNECTED[:2]
    assert status() == DEGRADED
    down()
    in_image("imds-guard-node", "unlock")


def test_what_locking_costs() -> None:
    """The memory of a container that locks a node on which nothing is locked; the time goes to the results."""
    start = f"imds-guard start --user {CLIENT} --ip {IPV4} >&2"
    measured = "cat /sys/fs/cgroup/memory.peak; busybox grep usage_usec /sys/fs/cgroup/cpu.stat"
    said = in_image("sh", "-ec", f"{start}; {measured}").stdout.split()
    Path("/results/cost.txt").write_text(" ".join(said), encoding="ascii")
    assert int(said[0]) < MEMORY_MIB * 1024 * 1024 * 3 // 4
    in_image("imds-guard-node", "unlock")


def test_the_fallback_uses_the_iptables_of_the_image() -> None:
    """Rules in the network namespace of the node, without a program of the node."""
    lock = ("--ip", IPV4, "--ip", IPV6)
    in_image("imds-guard", "start", "--backend", "iptables", "--user", "metadata-client", *lock)
    assert set(reach(STRANGER, STRANGERS)) == {"ECONNREFUSED"}
    assert reach(CLIENT, CLIENTS) == CONNECTED
    assert status() == ACTIVE
    in_image("imds-guard-node", "unlock")
    assert reach(STRANGER, STRANGERS) == CONNECTED


def test_nothing_is_written_outside_run_and_bpffs() -> None:
    """Besides what podman and the journal write about any container, all in /var."""
    since = "/proc/1/environ"
    own = ("/var/lib/containers", "/var/log", "/var/lib/imds-guard-matrix-boots", "/var/lib/systemd")
    argv = ["find", "/var", "/etc", "/usr", "-xdev", "-type", "f", "-newer", since]
    found = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
    assert [path for path in found if not path.startswith(own)] == []
    assert [name for name in os.listdir("/run/imds-guard") if not name.endswith(".lock")] == []
