# SPDX-License-Identifier: Apache-2.0
"""The RPM, installed, upgraded and erased by rpm in a root of its own, and the lock meanwhile.

The root has this machine's /usr below its own. The lock is one of iptables, in a network namespace. A seccomp filter
refuses bpf(2), so that nothing is asked of the machine's own eBPF.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from imds_guard import __version__
from tests import command
from tests.command import ONE, SERVICE
from tests.tools import missing, need

ROOT = Path(__file__).resolve().parents[2]
NAME = f"imds-guard-{__version__}-1"
NO_BPF = ROOT / "vagrant" / "guest" / "refuse_bpf.py"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a root of its own needs root")

_ROOT_FOLDER = """
set -eu
mount -t tmpfs tmpfs $root
mkdir -p $root/upper $root/work $root/usr $root/var/lib/rpm $root/run $root/proc $root/dev $root/tmp $root/packages
mkdir -p $root/etc/systemd/system/sysinit.target.wants $root/etc/systemd/system/networking.service.requires
mount -t overlay -o lowerdir=/usr,upperdir=$root/upper,workdir=$root/work overlay $root/usr
for name in bin lib lib64 sbin; do ln -s usr/$name $root/$name; done
cp -r /etc/alternatives /etc/passwd /etc/group /etc/ld.so.cache /etc/nsswitch.conf $root/etc
mount --rbind /dev $root/dev
mount --rbind /proc $root/proc
mount --bind $packages $root/packages
printf '#!/bin/sh\\necho "$*" >>/systemctl-calls\\nexit $(cat /systemctl-status)\\n' >$root/usr/sbin/systemctl
chmod 755 $root/usr/sbin/systemctl
echo 0 >$root/systemctl-status
touch $root/systemctl-calls
ip link set lo up
"""
"""rpm searches /sbin first, so this systemctl is the one that the scripts call. It notes what it was asked."""

_MACHINE = f"""
lock() {{ imds-guard start --backend iptables --user {ONE} --ip {SERVICE} >/dev/null 2>&1; }}
locked() {{ iptables-save | grep -q 'IMDS-GUARD.*{SERVICE}' && echo locked || echo open; }}
install() {{ rpm --install --nodeps /packages/old/*.rpm 2>/dev/null; }}
upgrade() {{ rpm --upgrade --nodeps /packages/new/*.rpm 2>/dev/null; }}
"""
"""Functions for the commands inside. --nodeps: Debian's rpm does not know the packages that this one needs."""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders ``old`` and ``new``, each with a package of this tree; the release of the second one is higher."""
    need("rpmbuild", "rpm", "iptables", "ip")
    importable = subprocess.run(["/usr/bin/python3", "-Ic", "import click, psutil"], check=False, capture_output=True)
    if importable.returncode != 0:
        missing("the system's Python has no click or no psutil")
    folder = tmp_path_factory.mktemp("rpm")
    for name, options in (("old", ()), ("new", ("--define", "dist .next"))):
        argv = (str(ROOT / "packaging" / "build-rpm"), str(folder / name), "--nodeps", *options)
        built = command.run(argv)
        assert built.status == 0, built
    return folder


def in_root(packages: Path, script: str, *enter: str, before: str = "") -> list[str]:
    """The lines that a script prints in a new root, network and mount namespace. ``enter`` is the way into the root."""
    folder = packages / "root"
    folder.mkdir(exist_ok=True)
    outside = f"root={folder}\npackages={packages}\n{_ROOT_FOLDER}\n{before}\n"
    inside = f"set -u\n{_MACHINE}\n{script}"
    outside += f'exec {" ".join(enter)} chroot $root sh -c "$1"'
    done = subprocess.run(
        ["unshare", "--mount", "--net", sys.executable, str(NO_BPF), "sh", "-c", outside, "sh", inside],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": command.SOURCES},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=command.TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def on_the_machine(packages: Path, script: str, *, systemd: bool = True) -> list[str]:
    """As in_root(), where process 1 has this root: it is the machine's. ``systemd``: whether that is running."""
    before = "mkdir -p $root/run/systemd/system" if systemd else ""
    script = f"mount -t proc proc /proc\n{script}"
    return in_root(packages, script, "unshare", "--pid", "--fork", before=before)


either_init = pytest.mark.parametrize("systemd", [True, False], ids=["systemd", "no-systemd"])


@either_init
def test_installation_locks_nothing_and_switches_nothing_on(packages: Path, systemd: bool) -> None:
    script = "install; locked; find /etc/systemd /etc/imds-guard -not -type d; cat /systemctl-calls"
    assert on_the_machine(packages, script, systemd=systemd) == ["open", *(["daemon-reload"] if systemd else [])]


def test_the_command_runs_on_the_systems_python(packages: Path) -> None:
    """Whatever its version: the module is in no folder of one version."""
    (line,) = in_root(packages, "install; imds-guard --version")
    assert line.startswith("imds-guard, version ")
    assert [line for line in in_root(packages, "rpm -qlp /packages/old/*.rpm") if "/python3" in line] == []


@either_init
def test_an_upgrade_never_opens_the_lock(packages: Path, systemd: bool) -> None:
    """Not for a moment: whatever reads or writes rules is noted, and nothing of the scripts does."""
    script = """
    install; lock; >/systemctl-calls
    iptables-save >/before
    printf '#!/bin/sh\\necho imds-guard "$@" >>/systemctl-calls\\n' >/usr/sbin/imds-guard
    chmod 755 /usr/sbin/imds-guard
    upgrade
    rpm -q imds-guard; locked
    iptables-save >/after; sed -i 's/^#.*//' /before /after; cmp /before /after && echo same
    cat /systemctl-calls
    """
    calls = ["try-reload-or-restart imds-guard.service", "try-restart imds-guard-watch.service"]
    calls.append("try-restart imds-guard-filter.service")
    assert on_the_machine(packages, script, systemd=systemd) == [
        *(f"{NAME}.next.noarch", "locked", "same"),
        *(["daemon-reload", *calls, "daemon-reload"] if systemd else []),
    ]


def test_the_new_version_that_can_not_take_over_is_named(packages: Path) -> None:
    script = "install; lock; echo 1 >/systemctl-status; rpm --upgrade --nodeps /packages/new/*.rpm 2>&1; locked"
    lines = on_the_machine(packages, script)
    assert [line for line in lines if line.startswith("imds-guard: ")] == [
        "imds-guard: taking over the new version failed; what was locked stays locked: see imds-guard status",
        "imds-guard: restarting the log of denials failed: see systemctl status imds-guard-watch",
        "imds-guard: restarting the filter failed, so its callers stay denied: see systemctl status imds-guard-filter",
    ]
    assert lines[-1] == "locked"


_SWITCHED_ON = """
touch /etc/imds-guard/config.toml /run/there.service
ln -s /usr/lib/systemd/system/imds-guard.service /etc/systemd/system/sysinit.target.wants/
ln -s /run/there.service /etc/systemd/system/sysinit.target.wants/imds-guard-watch.service
ln -s /usr/lib/systemd/system/imds-guard-required.service /etc/systemd/system/networking.service.requires/
"""
"""The watch's unit is of another installation."""


@either_init
def test_erasing_opens_the_lock_and_leaves_the_configuration(packages: Path, systemd: bool) -> None:
    script = f"""
    install; lock; locked; {_SWITCHED_ON} >/systemctl-calls
    rpm --erase imds-guard 2>/dev/null; echo $?; locked
    find /usr /etc /run -xdev -name '*imds?guard*' | sort; find /etc/imds-guard /etc/systemd | sort
    grep -v is-active /systemctl-calls || :
    """
    units = "imds-guard-watch.service imds-guard-verify.timer imds-guard-verify.service"
    units += " imds-guard-metrics.timer imds-guard-metrics.service"
    units += " imds-guard-filter.service imds-guard-rules@*.service imds-guard.service"
    lines = on_the_machine(packages, script, systemd=systemd)
    assert lines == [
        *("locked", "0", "open"),
        *("/etc/imds-guard", "/etc/systemd/system/sysinit.target.wants/imds-guard-watch.service"),
        *("/etc/imds-guard", "/etc/imds-guard/config.toml", "/etc/systemd", "/etc/systemd/system"),
        "/etc/systemd/system/sysinit.target.wants",
        "/etc/systemd/system/sysinit.target.wants/imds-guard-watch.service",
        *(["daemon-reload", f"stop {units}", "daemon-reload"] if systemd else []),
    ]


def test_the_account_of_the_filter_comes_and_goes_with_the_package(packages: Path) -> None:
    """It has no home, no shell, and a group of its own."""
    script = """
    cut -d: -f1 /etc/passwd | grep -c imds-guard
    install; grep imds-guard /etc/passwd | cut -d: -f5-; grep -c imds-guard /etc/group
    rpm --erase imds-guard 2>/dev/null; grep -c imds-guard /etc/passwd /etc/group || :
    """
    assert on_the_machine(packages, script) == [
        *("0", "filter of imds-guard:/:/sbin/nologin", "1"),
        *("/etc/passwd:0", "/etc/group:0"),
    ]


def _with_status(status: int) -> str:
    """Erases where ``imds-guard stop --all`` ends with this status, and a sentence."""
    return f"""
    install; lock
    printf '#!/bin/sh\\necho "asked: $*"\\nexit {status}\\n' >/usr/sbin/imds-guard; chmod 755 /usr/sbin/imds-guard
    rpm --erase imds-guard 2>&1; rpm -q imds-guard; rm /usr/sbin/imds-guard; locked
    """


def test_erasing_is_refused_when_the_lock_could_not_be_opened(packages: Path) -> None:
    """Nothing else could open it afterwards."""
    lines = on_the_machine(packages, _with_status(1))
    assert "asked: stop --all" in lines
    assert "imds-guard: the lock could not be opened, so the package stays: nothing else could open it" in lines
    assert lines[-2:] == [f"{NAME}.noarch", "locked"]


@pytest.mark.parametrize("status", [69, 77])
def test_erasing_goes_on_where_no_lock_could_be(packages: Path, status: int) -> None:
    lines = on_the_machine(packages, _with_status(status))
    assert lines[-2] == "package imds-guard is not installed"
    assert [line for line in lines if "asked" in line] == []


def test_erasing_in_a_chroot_leaves_the_machines_lock_alone(packages: Path) -> None:
    """As by ``rpm --root`` when an image is made."""
    script = "install; lock; rpm --erase imds-guard 2>/dev/null; echo $?; locked; cat /systemctl-calls"
    assert in_root(packages, script) == ["0", "locked"]


def test_rpm_with_a_root_installs_upgrades_and_erases(packages: Path) -> None:
    before = """
    for step in '--install old' '--upgrade new'; do
      rpm --root $root --nodeps ${step% *} $packages/${step#* }/*.rpm 2>/dev/null
      rpm --root $root -q imds-guard
    done
    rpm --root $root --erase imds-guard 2>/dev/null; echo $?
    """
    script = "ls -d /usr/share/imds-guard /usr/bin/imds-guard 2>/dev/null; cat /systemctl-calls"
    expected = [f"{NAME}.noarch", f"{NAME}.next.noarch", "0"]
    assert in_root(packages, script, before=before) == expected
