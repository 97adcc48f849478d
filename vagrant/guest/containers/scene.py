# SPDX-License-Identifier: Apache-2.0
"""The machine of the container suite: the metadata service, the image of the containers, commands and outcomes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

from vagrant.guest import world
from vagrant.waiting import wait_until

IPV4, IPV6 = world.IPV4, world.IPV6
ALLOWED, STRANGER, OTHERS = world.ONE, world.STRANGER, world.OTHERS
ACCOUNTS = {"root": 0, "allowed": ALLOWED, "stranger": STRANGER}
"""The accounts of the machine and of the image. The policy lists the ID of "allowed"."""
ROOT = Path("/srv/busybox")
IMAGE = Path("/srv/busybox.tar")
PATIENCE_S = world.PATIENCE_S
POD = "pod"
"""A network namespace whose packets the machine forwards."""

_CLIENT = """\
#!/bin/busybox sh
# client LINGER ADDRESS USER...: prints what each USER gets from port 80 there, a line each; "self" is whoever runs it.
# Then it stays for LINGER seconds, so that its cgroup can be looked up. (wget of Debian 12's static busybox crashes.)
linger=$1 address=$2
shift 2
get="/bin/busybox nc -w 90 $address 80"
for user; do
    if [ "$user" = self ]; then said=$($get 2>&1 </dev/null)
    else said=$(/bin/busybox su -s /bin/sh "$user" -c "$get" 2>&1 </dev/null); fi
    echo "${said:-nothing}" | /bin/busybox tail -n 1
done
exec /bin/busybox sleep "$linger"
"""
_SERVICE = f"""\
import socket, threading
def serve(family, address):
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, 80))
        listener.listen(512)
        ready.release()
        while True:
            one, _ = listener.accept()
            with one:
                one.settimeout(90)
                try:
                    one.recv(4096)
                    one.sendall(b"metadata\\n")
                except OSError:
                    pass
ready = threading.Semaphore(0)
for pair in ((socket.AF_INET, "{IPV4}"), (socket.AF_INET6, "{IPV6}")):
    threading.Thread(target=serve, args=pair).start()
for _ in range(2):
    ready.acquire()
print("listening", flush=True)
"""


def run(*argv: str, ok: bool = True, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a program of the guest. With ``ok`` it must succeed."""
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=PATIENCE_S, check=False, stdin=subprocess.DEVNULL, env=env
    )
    assert not ok or done.returncode == 0, (argv, done.returncode, done.stdout[-3000:], done.stderr[-3000:])
    return done


def as_user(*argv: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
    """run() by the systemd of the user "allowed", with the cgroup and environment of a login."""
    by_systemd = ("systemd-run", "--user", "--machine=allowed@.host", "--quiet", "--collect", "--wait", "--pipe")
    return run(*by_systemd, *argv, ok=ok)


def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for a condition."""
    wait_until(condition, lambda: f"it never came: {what}", PATIENCE_S)


# --- the client -----------------------------------------------------------------------------------------------------


def client(*users: str, to: str = IPV4, linger_s: int = 0) -> list[str]:
    """The command that connects as each of ``users``, in a container or below ROOT. words() reads its output."""
    return ["/client", str(linger_s), to, *users]


def words(output: str) -> list[str]:
    """For each line of a client: "connected", or the name of the errno that its message stands for."""
    return [_word(line) for line in output.splitlines()]


def _word(line: str) -> str:
    if line == "metadata":
        return "connected"
    if line.endswith("timed out"):
        return "ETIMEDOUT"
    _, _, message = line.rpartition(": ")
    return next((errno.errorcode[number] for number in errno.errorcode if os.strerror(number) == message), line)


# --- the machine ----------------------------------------------------------------------------------------------------


def lock(backend: str, *options: str) -> None:
    """Starts imds-guard with this backend, one user, one group and more options; or gives it that policy."""
    policy = ("--user", str(ALLOWED), "--group", str(world.STAFF), *world.LOCK)
    world.done("start", "--backend", backend, *policy, *options)


@contextmanager
def locked(backend: str, *options: str) -> Iterator[None]:
    """imds-guard is started with this backend, one user and one group; afterwards nothing of it is left."""
    lock(backend, *options)
    try:
        yield
    finally:
        world.done("stop")
        assert world.left() == []


class Watch:
    """``imds-guard watch`` during the ``with`` block, and the events that it has printed."""

    def __enter__(self) -> Watch:
        self._output = tempfile.NamedTemporaryFile()
        argv = [world.program(), "watch", "--json"]
        self._process = subprocess.Popen(argv, stdout=self._output, env=world.environment(), cwd="/")
        until(lambda: "began" in self._events("event"), "the line with which watch begins")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE_S)
        self._output.close()

    def _all(self) -> list[dict[str, Any]]:
        lines = Path(self._output.name).read_text(encoding="ascii").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def _events(self, key: str) -> list[Any]:
        return [event.get(key) for event in self._all()]

    def denied(self, after: int) -> list[dict[str, Any]]:
        """The denials among the events after the first ``after``."""
        return [event for event in self._all()[after:] if event["event"] == "denied"]

    def __len__(self) -> int:
        return len(self._all())


@contextmanager
def metadata_service() -> Iterator[None]:
    """The service, behind a veth, and POD behind another. Nothing leaves the guest: it has no network card."""
    cards = [path.parent.name for path in Path("/sys/class/net").glob("*/device")]
    assert cards == [], f"{cards} are network cards: a connect could leave"
    _behind_a_veth("imds", 99)
    _behind_a_veth(POD, 98)
    for address, via in ((IPV4, "10.99.0.2"), (IPV6, "fd99::2")):
        run("ip", "-netns", "imds", "address", "add", address, "dev", "lo", *(["nodad"] if ":" in address else []))
        run("ip", "route", "add", address, "via", via)
    # pasta takes the interface of the default route as its model.
    run("ip", "route", "add", "default", "via", "10.99.0.2")
    for switch in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        Path("/proc/sys/net", switch).write_text("1", encoding="ascii")
    argv = ["ip", "netns", "exec", "imds", sys.executable, "-I", "-S", "-c", _SERVICE]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as service:
        try:
            assert service.stdout is not None
            assert service.stdout.readline() == b"listening\n"
            yield
        finally:
            service.kill()


def _behind_a_veth(name: str, number: int) -> None:
    """A network namespace: 10.NUMBER.0.2 and fdNUMBER::2, with the machine as its router."""
    inside = ("ip", "-netns", name)
    run("ip", "netns", "add", name)
    run("ip", "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
    for of, device, host in ((("ip",), f"to-{name}", 1), (inside, "eth0", 2)):
        run(*of, "address", "add", f"10.{number}.0.{host}/24", "dev", device)
        run(*of, "address", "add", f"fd{number}::{host}/64", "dev", device, "nodad")
        run(*of, "link", "set", device, "up")
    run(*inside, "link", "set", "lo", "up")
    run(*inside, "route", "add", "default", "via", f"10.{number}.0.1")
    run(*inside, "route", "add", "default", "via", f"fd{number}::1")


def make_bridge(name: str, number: int) -> None:
    """A bridge of the machine with the address 10.NUMBER.0.1."""
    run("ip", "link", "add", name, "type", "bridge")
    run("ip", "address", "add", f"10.{number}.0.1/24", "dev", name)
    run("ip", "link", "set", name, "up")


def make_image() -> None:
    """ROOT and IMAGE: busybox with links to it, the client, and the accounts."""
    for folder in ("bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "usr", "var"):
        (ROOT / folder).mkdir(parents=True)
    shutil.copy2("/bin/busybox", ROOT / "bin/busybox")
    for name in ("sh", "sleep"):
        (ROOT / "bin" / name).symlink_to("busybox")
    (ROOT / "client").write_text(_CLIENT, encoding="ascii")
    (ROOT / "client").chmod(0o755)
    accounts = {name: (uid, OTHERS if uid else 0) for name, uid in ACCOUNTS.items()}
    passwd = "".join(f"{name}:x:{uid}:{gid}::/:/bin/sh\n" for name, (uid, gid) in accounts.items())
    group = f"root:x:0:\nothers:x:{OTHERS}:\n"
    for file, text in (("passwd", passwd), ("group", group), ("os-release", "ID=busybox\n")):
        (ROOT / "etc" / file).write_text(text, encoding="ascii")
    run("tar", "-C", str(ROOT), "-cf", str(IMAGE), ".")


def make_accounts() -> None:
    """The accounts of the machine, with sub-IDs for a rootless runtime (subuid(5))."""
    run("groupadd", "-g", str(OTHERS), "others")
    for name in ("allowed", "stranger"):
        run("useradd", "-m", "-u", str(ACCOUNTS[name]), "-g", "others", "-s", "/bin/sh", name)
    run("useradd", "--system", "--user-group", "remapped")
    for file in ("/etc/subuid", "/etc/subgid"):
        # lxc asks newuidmap for those of root, and dockerd looks up those of its account.
        text = "root:200000:65536\nallowed:300000:65536\nremapped:400000:65536\n"
        Path(file).write_text(text, encoding="ascii")


def start(unit: str) -> None:
    """Starts a unit of the distribution. What it says is in the message when it fails."""
    done = run("systemctl", "start", unit, ok=False)
    if done.returncode != 0:
        log = run("journalctl", "--boot", "--no-pager", "--lines=40", f"--unit={unit}").stdout
        raise AssertionError((unit, done.stderr, log))
