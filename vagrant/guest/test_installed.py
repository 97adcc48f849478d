# SPDX-License-Identifier: Apache-2.0
"""The installed command as somebody types it, at the root of cgroup2, in a network namespace that has nothing but lo.

IMDS_GUARD_EXPECT says what must work; IMDS_GUARD_ROW is set in the guests of vagrant/run.py and nowhere else.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack
from typing import Dict, FrozenSet, Iterator, List

import pytest

EXPECT = frozenset(os.environ.get("IMDS_GUARD_EXPECT", "").split(","))
BACKENDS = ("ebpf", "iptables")
TAKEN = next((name for name in BACKENDS if name in EXPECT), None)
REFUSALS: Dict[str, FrozenSet[str]] = {
    "ebpf": frozenset({"EPERM"}),
    "iptables": frozenset({"ECONNREFUSED"}),
}

IPV4, IPV6 = "169.254.169.254", "fd00:ec2::254"
SERVICES = (IPV4, f"::ffff:{IPV4}", IPV6)
LOCK = ("--ip", IPV4, "--ip", IPV6)
ONE, TWO, STRANGER = 41_001, 41_002, 41_003
STAFF, OTHERS = 51_001, 51_002
ACTIVE, INACTIVE, UNSUPPORTED = 0, 3, 69
PATIENCE_S = 240
"""bcc takes 20 s of an emulated processor, and more while the host has other work."""

_CONNECT = """
import errno, socket, sys
for address in sys.argv[1:]:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as one:
        one.settimeout(20)
        try:
            one.connect((address, 80))
            print("connected")
        except OSError as error:
            print(errno.errorcode[error.errno or errno.ETIMEDOUT])
"""


def command(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs imds-guard without this run's PYTHONPATH: the wheel and the distribution's packages are all it has."""
    path = shutil.which("imds-guard", path="/usr/local/bin:/usr/bin")
    assert path is not None, "the wheel put no imds-guard into /usr/local/bin"
    return subprocess.run(
        [path, *words],
        cwd="/",
        env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def done(*words: str) -> str:
    """What a command printed that must end well."""
    result = command(*words)
    assert result.returncode == 0, result
    return result.stdout


def reach(uid: int, *groups: int) -> List[str]:
    """How a connect to each of SERVICES ends, for a fresh process of this user in these supplementary groups."""
    argv = [sys.executable, "-I", "-c", _CONNECT, *SERVICES]
    ended = subprocess.run(
        argv,
        user=uid,
        group=OTHERS,
        extra_groups=groups,
        stdout=subprocess.PIPE,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    return ended.stdout.split()


def everywhere(outcome: str) -> List[str]:
    """That outcome at each of SERVICES."""
    return [outcome] * len(SERVICES)


def assert_denied(backend: str, outcomes: List[str]) -> None:
    """Every one of the outcomes is a denial by this backend."""
    assert [outcome in REFUSALS[backend] for outcome in outcomes] == [True] * len(SERVICES), outcomes


@pytest.fixture(scope="session", autouse=True)
def services() -> Iterator[None]:
    """Listeners at the metadata addresses, on the lo of a namespace where no packet can leave."""
    assert "IMDS_GUARD_ROW" in os.environ, "this locks the whole machine: it is for the guests of vagrant/run.py"
    assert [name for _, name in socket.if_nameindex()] == ["lo"], "an interface beside lo: a connect could get out"
    for words in (f"addr add {IPV4}/32 dev lo", f"-6 addr add {IPV6}/128 dev lo nodad", "link set lo up"):
        subprocess.run(["ip", *words.split()], check=True)  # noqa: S607  (the guest's own)
    with ExitStack() as stack:
        for family, address in ((socket.AF_INET, IPV4), (socket.AF_INET6, IPV6)):
            listener = stack.enter_context(socket.socket(family))
            listener.bind((address, 80))
            listener.listen(512)  # the kernel answers for us: nobody accepts what it has completed (listen(2))
        assert reach(STRANGER) == everywhere("connected")
        yield


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that must work here; afterwards nothing is locked."""
    name: str = request.param
    if name not in EXPECT:
        pytest.skip(f"{name} is not expected to work here")
    yield name
    command("stop")


def test_what_runs_is_the_wheel() -> None:
    """Without PYTHONPATH the module comes from where pip puts it."""
    argv = [sys.executable, "-I", "-c", "import imds_guard; print(imds_guard.__file__)"]
    found = subprocess.run(argv, cwd="/", capture_output=True, text=True, check=True).stdout
    assert found.startswith("/usr/local/lib/python3"), found
    assert done("--version").startswith("imds-guard, version ")


def test_check_tells_what_works() -> None:
    """The backend that start takes is the one that kernels.toml names, and each refusal has its reason."""
    result = command("check", "--json")
    found = json.loads(result.stdout)
    assert found["taken"] == TAKEN, found
    assert {one["name"]: one["works"] for one in found["backends"]} == {name: name in EXPECT for name in BACKENDS}, (
        found
    )
    assert [one["name"] for one in found["backends"] if not one["works"] and not one["reason"]] == []
    assert result.returncode == (0 if TAKEN else UNSUPPORTED)


def test_what_can_not_work_is_refused() -> None:
    """By name, and for "auto" where neither works: status 69, one sentence, and everybody still connects."""
    refused = [name for name in BACKENDS if name not in EXPECT]
    for name in [*refused, *([] if TAKEN else ["auto"])]:
        result = command("start", "--backend", name, "--user", str(ONE), *LOCK)
        assert (result.returncode, result.stdout) == (UNSUPPORTED, ""), result
        assert result.stderr.startswith("imds-guard: "), result
        assert result.stderr.count("\n") == 1, result
        assert reach(STRANGER) == everywhere("connected")


def test_from_start_to_stop(backend: str) -> None:
    """Users and supplementary groups, at each of the addresses, through allow and revoke; in the end nothing is left.

    One test and not five: every start of eBPF compiles, and that is most of what a row takes.
    """
    # What start takes by itself is not named, so that the choice is tested, too.
    chosen = () if backend == TAKEN else ("--backend", backend)
    group = () if backend == "iptables" and "groups" not in EXPECT else ("--group", str(STAFF))
    assert command("status").returncode == INACTIVE
    assert f"imds-guard is active ({backend})" in done("start", *chosen, "--user", str(ONE), *group, *LOCK)
    assert json.loads(done("status", "--json"))["backend"] == backend
    assert reach(ONE) == everywhere("connected")
    if group:
        assert reach(STRANGER, 7, STAFF, 99) == everywhere("connected")
    assert_denied(backend, reach(STRANGER, 7, 99))
    assert_denied(backend, reach(0))
    done("allow", "--user", str(TWO))
    assert reach(TWO) == everywhere("connected")
    done("revoke", "--user", str(ONE))
    assert_denied(backend, reach(ONE))
    assert reach(TWO) == everywhere("connected")
    assert command("status").returncode == ACTIVE
    done("stop")
    assert command("status").returncode == INACTIVE
    assert reach(STRANGER) == everywhere("connected")
    assert _left() == []


def _left() -> List[str]:
    """Pins of ours, and chains and rules of ours, in what iptables commands are here."""
    found = [name for name in os.listdir("/sys/fs/bpf") if "imds" in name]
    for tables in ("iptables-save", "ip6tables-save"):
        if shutil.which(tables):
            said = subprocess.run([tables], capture_output=True, text=True, check=True).stdout
            found += [line for line in said.splitlines() if "imds" in line.lower()]
    return found
