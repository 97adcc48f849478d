# SPDX-License-Identifier: Apache-2.0
"""The node of the test: its commands, who connects with which result, and containers on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Callable

from vagrant.node.pod import CONFIG
from vagrant.waiting import wait_until

JOB = Path("/job")
FIRST, PLAYED = Path("/run/first.yaml"), Path("/run/pod.yaml")
"""The objects that were given to podman. JSON is YAML."""
MAIN = "imds-guard-guard"
"""Podman's name for the container "guard" of the pod "imds-guard"."""
IPV4, IPV6 = "169.254.169.254", "fd00:ec2::254"
CLIENT, CLIENTS = 41_001, 51_003
"""The account metadata-client. Its group has another ID."""
STRANGER, STRANGERS = 41_003, 51_002
READERS = 51_001
"""The group metadata-readers."""
CONNECTED, DENIED = ["connected"] * 3, ["EPERM"] * 3
PATIENCE_S = 300

_CALL = """
import errno, socket, sys
for address in sys.argv[1:]:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as one:
        one.settimeout(20)
        code = one.connect_ex((address, 80))
        print(errno.errorcode[code] if code else "connected", flush=True)
"""
_LISTEN = """
import signal, socket
held = []
for family, address in ((socket.AF_INET, "169.254.169.254"), (socket.AF_INET6, "fd00:ec2::254")):
    held.append(socket.socket(family))
    held[-1].bind((address, 80))
    held[-1].listen(512)  # the kernel completes connections, which nobody accepts (listen(2))
print("listening", flush=True)
signal.pause()
"""
_STORM = f"""
import signal
going = True
def end(*_):
    global going
    going = False
signal.signal(signal.SIGTERM, end)
print("begun", flush=True)
counts = {{}}
import errno, socket
while going:
    for address in ("{IPV4}", "{IPV6}"):
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as one:
            one.settimeout(20)
            code = one.connect_ex((address, 80))
        word = errno.errorcode[code] if code else "connected"
        counts[word] = counts.get(word, 0) + 1
import json
print(json.dumps(counts), flush=True)
"""
SERVICES = (IPV4, f"::ffff:{IPV4}", IPV6)
CALL = ("-I", "-S", "-c", _CALL, *SERVICES)


def run(*argv: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a program of the node. With ``ok`` it must succeed."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert not ok or done.returncode == 0, (argv, done.returncode, done.stdout[-3000:], done.stderr[-3000:])
    return done


def reach(uid: int, gid: int, *groups: int) -> list[str]:
    """The outcomes of connects to SERVICES by a process of the node."""
    argv = [sys.executable, *CALL]
    said = subprocess.run(
        argv, user=uid, group=gid, extra_groups=groups, capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    return said.stdout.split()


def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for a condition of the node."""
    wait_until(condition, lambda: f"it never came: {what}", PATIENCE_S)


class Storm:
    """A stranger who connects in a loop during the ``with`` block. ``outcomes`` are set at its end."""

    def __enter__(self) -> Storm:
        self.outcomes: dict[str, int] = {}
        argv = [sys.executable, "-I", "-S", "-c", _STORM]
        self._process = subprocess.Popen(argv, user=STRANGER, group=STRANGERS, extra_groups=(), stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"begun\n"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self.outcomes = json.loads(self._process.communicate(timeout=PATIENCE_S)[0])


@contextmanager
def services(*within: str) -> Iterator[None]:
    """Listeners at the metadata addresses on lo, of the node or ``within`` another network namespace (nsenter(1))."""
    for arguments in (f"addr replace {IPV4}/32 dev lo", f"-6 addr replace {IPV6}/128 dev lo nodad", "link set lo up"):
        run(*within, "ip", *arguments.split())
    links = json.loads(run(*within, "ip", "-json", "link").stdout)
    assert [link["ifname"] for link in links] == ["lo"], "an interface beside lo: a connect could leave"
    with subprocess.Popen([*within, sys.executable, "-I", "-S", "-c", _LISTEN], stdout=subprocess.PIPE) as listener:
        try:
            assert listener.stdout is not None
            assert listener.stdout.readline() == b"listening\n"
            yield
        finally:
            listener.kill()


# --- the image and its pod ------------------------------------------------------------------------------------------


def image() -> str:
    """NAME:VERSION of the image that was loaded."""
    listed = run("podman", "images", "--format", "{{.Repository}}:{{.Tag}}", "localhost/imds-guard-node")
    return listed.stdout.strip()


def in_image(*argv: str, ok: bool = True, more: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Runs a program of the image as the pod's containers run, with the node's PIDs and network.

    ``more`` are options of podman run, in place of those with the same name.
    """
    usual = ["--privileged", "--pid=host", "--network=host", "--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp"]
    usual += [f"--volume={path}:{path}" for path in ("/run/imds-guard", "/run/xtables.lock", "/sys/fs/bpf")]
    given = {option.partition("=")[0] for option in more}
    options = [option for option in usual if option.partition("=")[0] not in given]
    return run("podman", "run", "--rm", *options, *more, "--entrypoint", argv[0], image(), *argv[1:], ok=ok)


def status() -> int:
    """The exit status of imds-guard status, asked in a container of its own."""
    return in_image("imds-guard", "status", ok=False).returncode


def play(config: str = CONFIG) -> None:
    """Starts the pod with this configuration in its ConfigMap, as a kubelet does: first its init container, to its end.

    The init container is a pod of its own here: podman 5.4 gives hostPID to the other containers alone.
    """
    objects = json.loads((JOB / "pod.json").read_text(encoding="utf-8"))
    (config_map,) = (one for one in objects if one["kind"] == "ConfigMap")
    (pod,) = (one for one in objects if one["kind"] == "Pod")
    config_map["data"]["config.toml"] = config
    init = pod["spec"].pop("initContainers")
    first = {
        **pod,
        "metadata": {"name": "first"},
        "spec": {**pod["spec"], "containers": init, "restartPolicy": "Never"},
    }
    _write(FIRST, config_map, first)
    _write(PLAYED, config_map, pod)
    run("podman", "kube", "play", str(FIRST))
    ended = [run("podman", "wait", f"first-{one['name']}").stdout.strip() for one in init]
    print(journal())  # pytest shows it where a test fails
    assert ended == ["0"] * len(init), ended
    run("podman", "kube", "down", "--force", str(FIRST))
    run("podman", "kube", "play", str(PLAYED))


def _write(path: Path, *objects: dict[str, Any]) -> None:
    path.write_text("".join(f"---\n{json.dumps(one)}\n" for one in objects), encoding="ascii")


def journal() -> str:
    """What the containers have printed, among other things."""
    lines = run("journalctl", "--boot", "--output=cat", "--no-pager", "--lines=80").stdout.splitlines()
    return "\n".join(line for line in lines if " m=+" not in line)  # podman's events


def down() -> None:
    """Removes the pod, as a DaemonSet does before it makes the next one."""
    run("podman", "kube", "down", "--force", str(PLAYED))


@contextmanager
def container(*options: str) -> Iterator[str]:
    """A container that sleeps, without a privilege: a pod of somebody. Yields its name."""
    name = "somebody"
    run("podman", "run", "--detach", "--name", name, *options, "--entrypoint", "/usr/bin/sleep", image(), "3600")
    with ExitStack() as stack:
        stack.callback(run, "podman", "rm", "--force", "--time=0", name)
        yield name


def reach_in(name: str, uid: int) -> list[str]:
    """The outcomes of connects to SERVICES in a container."""
    return run("podman", "exec", "--user", str(uid), name, "/usr/bin/python3", *CALL).stdout.split()


def pins() -> list[str]:
    """The names of ours in bpffs."""
    return [name for name in os.listdir("/sys/fs/bpf") if "imds" in name]
