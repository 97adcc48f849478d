# SPDX-License-Identifier: Apache-2.0
"""The row that a guest runs, its commands, and who can connect.

IMDS_GUARD_EXPECT lists the backends that must work. IMDS_GUARD_ROW is set only in the guests of vagrant/run.py.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from imds_guard.kernel.children import run_in_child
from imds_guard.kernel.credentials import become

EXPECT = frozenset(os.environ.get("IMDS_GUARD_EXPECT", "").split(","))
PRIVATE_MOUNTS = "private-mounts" in os.environ.get("IMDS_GUARD_SETUP", "").split()
BACKENDS = ("ebpf", "iptables")
CHOSEN = next((name for name in BACKENDS if name in EXPECT), None)
REFUSALS: dict[str, frozenset[str]] = {
    "ebpf": frozenset({"EPERM"}),
    "iptables": frozenset({"ECONNREFUSED"}),
}

IPV4, IPV6 = "169.254.169.254", "fd00:ec2::254"
HAS_IPV6 = os.path.exists("/proc/sys/net/ipv6")
SERVICES = (IPV4, f"::ffff:{IPV4}", IPV6) if HAS_IPV6 else (IPV4,)
LOCK = ("--ip", IPV4, "--ip", IPV6)
ONE, TWO, STRANGER = 41_001, 41_002, 41_003
STAFF, OTHERS = 51_001, 51_002
MANY = range(50_000, 50_040)
"""More supplementary groups than 32, where a loop could end too early. The kernel sorts all of them before STAFF."""
ACTIVE, DEGRADED, UNSUPPORTED = 0, 1, 69
INACTIVE = 4 if "refuse-bpf" in os.environ.get("IMDS_GUARD_SETUP", "").split() else 3
"""Where bpf(2) is refused, status can't tell what is attached: 4."""
PATIENCE_S = 900
"""bcc takes 20 s on an emulated processor, and ten times that on a busy host."""

_PRIVATE_BPFFS = 'mount -t bpf bpf /sys/fs/bpf; exec "$@"'


def program() -> str:
    """The path of the installed command."""
    path = shutil.which("imds-guard", path="/usr/local/bin:/usr/bin")
    assert path is not None, "the wheel installed no imds-guard in /usr/local/bin"
    return path


def environment() -> dict[str, str]:
    """The environment of the installed command: without the PYTHONPATH of the tests."""
    return {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}


def command(*arguments: str, within: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Runs the installed imds-guard, ``within`` another program if given."""
    return subprocess.run(
        [*within, program(), *arguments],
        cwd="/",
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def in_private_mounts(*arguments: str) -> subprocess.CompletedProcess[str]:
    """command() in a mount namespace with a bpffs of its own, as in a unit with PrivateMounts=."""
    return command(*arguments, within=("unshare", "--mount", "sh", "-ec", _PRIVATE_BPFFS, "sh"))


def done(*arguments: str) -> str:
    """Runs a command, which must succeed, and returns its output."""
    result = command(*arguments)
    assert result.returncode == 0, result
    return result.stdout


def reach(uid: int, *groups: int) -> list[str]:
    """The outcome of a connect to each of SERVICES, by a new process of this user with these supplementary groups."""

    def inside() -> list[str]:
        become((uid,) * 3, (OTHERS,) * 3, groups)
        return [_outcome(address) for address in SERVICES]

    return run_in_child(inside, timeout_s=PATIENCE_S)


def _outcome(address: str) -> str:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as one:
        one.settimeout(20)
        try:
            one.connect((address, 80))
        except OSError as error:
            return errno.errorcode[error.errno or errno.ETIMEDOUT]
    return "connected"


def everywhere(outcome: str) -> list[str]:
    """This outcome for each of SERVICES."""
    return [outcome] * len(SERVICES)


def assert_denied(backend: str, outcomes: list[str]) -> None:
    """Asserts that every outcome is a denial by this backend."""
    assert [outcome in REFUSALS[backend] for outcome in outcomes] == [True] * len(SERVICES), outcomes


_ADD = {IPV4: f"addr replace {IPV4}/32 dev lo", IPV6: f"-6 addr replace {IPV6}/128 dev lo nodad"}


@contextmanager
def listeners() -> Iterator[None]:
    """Listeners at the metadata addresses, on lo. No packet can leave this namespace."""
    assert "IMDS_GUARD_ROW" in os.environ, "this locks the whole machine: run it only in the guests of vagrant/run.py"
    assert [name for _, name in socket.if_nameindex()] == ["lo"], "an interface beside lo: a connect could leave"
    addresses = (IPV4, IPV6) if HAS_IPV6 else (IPV4,)
    for arguments in (*(_ADD[address] for address in addresses), "link set lo up"):
        subprocess.run(["ip", *arguments.split()], check=True)  # noqa: S607  (the guest's own)
    with ExitStack() as stack:
        for address in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            listener = stack.enter_context(socket.socket(family))
            listener.bind((address, 80))
            listener.listen(512)  # the kernel completes connections, which nobody accepts (listen(2))
        yield


def left() -> list[str]:
    """The pins, chains, rules and tables of imds-guard that exist, by the commands that are installed."""
    found = [name for name in os.listdir("/sys/fs/bpf") if "imds" in name]
    for tables in ("iptables-save", "ip6tables-save") if HAS_IPV6 else ("iptables-save",):
        if shutil.which(tables):
            said = subprocess.run([tables], capture_output=True, text=True, check=True).stdout
            found += [line for line in said.splitlines() if "imds" in line.lower()]
    nft = shutil.which("nft")
    if nft is not None:
        said = subprocess.run([nft, "list", "tables"], capture_output=True, text=True, check=False).stdout
        found += [line for line in said.splitlines() if "imds" in line]
    return found
