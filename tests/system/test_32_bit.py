# SPDX-License-Identifier: Apache-2.0
"""A 32-bit Python on a 64-bit kernel: Debian's for i386, in a root of its own.

It has other numbers for system calls, and aligns 64-bit fields otherwise. What must be compiled is refused to it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imds_guard.backends.ebpf.program import source_folder
from tests import command
from tests.command import ONE, SERVICE, STAFF, STRANGER, TIMEOUT_S, TWO, Guard, Result
from tests.tools import missing, need
from vagrant.matrix import table

_PACKAGES = "python3-minimal,python3,libpython3-stdlib,python3-click,python3-psutil,iptables"
_IMPATIENT = ("--aptopt=Acquire::http::Timeout 20", "--aptopt=Acquire::Retries 2")
_PYTHON = "/usr/bin/python3"

_INSIDE = """
mount --rbind /proc $root/proc
mount --rbind /sys $root/sys
mount --rbind /run $root/run
$more
mount --bind $sources $root/tree/src
mount --bind $programs $root/tree/bpf
PATH=/usr/sbin:/usr/bin:/sbin:/bin exec chroot $root /usr/bin/python3 -I -c \
    'import sys; sys.path.insert(0, "/tree/src"); from imds_guard.cli import main; main()' "$@"
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a root of its own needs root")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Debian for i386 with Python and iptables, unpacked and not configured: about 70 MB."""
    if os.uname().machine != "x86_64":
        pytest.skip("Debian for i386 runs on x86_64 alone")
    need("mmdebstrap")
    folder = tmp_path_factory.mktemp("i386") / "root"
    archive = table.load().archive
    source = f"deb [signed-by={archive.keyring}] {archive.mirror} bookworm main"
    options = ("--quiet", "--variant=extract", "--architectures=i386", f"--include={_PACKAGES}", *_IMPATIENT)
    made = subprocess.run(
        ["mmdebstrap", *options, "bookworm", str(folder), source], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        missing(f"no Debian for i386 could be made: {made.stderr.strip().splitlines()[-1]}")
    for name in ("iptables", "ip6tables"):
        for suffix in ("", "-save", "-restore"):
            (folder / "usr" / "sbin" / f"{name}{suffix}").symlink_to("xtables-nft-multi")
    for name in ("proc", "sys", "run", "tree/src", "tree/bpf"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n", encoding="ascii")
    (folder / "etc" / "group").write_text("root:x:0:\n", encoding="ascii")
    if subprocess.run(["chroot", str(folder), _PYTHON, "-c", ""], check=False, stderr=subprocess.DEVNULL).returncode:
        missing("the kernel runs no 32-bit programs (CONFIG_IA32_EMULATION)")
    yield folder
    shutil.rmtree(folder)


def run(root: Path, *arguments: str, more: str = "") -> Result:
    """imds-guard in the 32-bit Python, in a mount namespace that ends with it."""
    script = (
        f"set -eu; root={root}; sources={command.SOURCES}; programs={source_folder()}\n{_INSIDE.replace('$more', more)}"
    )
    return command.run(("unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *arguments))


@pytest.fixture
def guard() -> Iterator[Guard]:
    with command.guard() as one:
        yield one


def who(guard: Guard) -> list[int]:
    return [uid for uid in (0, ONE, TWO, STRANGER) if guard.reach(uid) == "connected"]


def programs(guard: Guard) -> list[str]:
    """The lines of status that name the attached programs with their IDs."""
    return [line for line in guard("status").stdout.splitlines() if "[ours]" in line]


LOCK = ("--user", str(ONE), "--group", str(STAFF), "--ip", SERVICE)


def test_ebpf_is_refused_with_a_sentence(root: Path, guard: Guard) -> None:
    done = run(root, *guard.arguments("start", *LOCK))
    assert done.status == 69
    assert "this Python is a 32-bit program (on x86_64)" in done.sentence
    assert "run it with a 64-bit Python; the iptables backend can serve instead" in done.sentence
    assert who(guard) == [0, ONE, TWO, STRANGER]


def test_a_guard_in_force_is_read_changed_and_removed(root: Path, guard: Guard) -> None:
    """Else a 32-bit Python would say of a lock in force that there is none."""
    guard.start(*LOCK)
    assert run(root, *guard.arguments("status")).stdout == guard("status").stdout
    assert run(root, *guard.arguments("allow", "--user", str(TWO))).status == 0
    assert who(guard) == [ONE, TWO]
    assert guard.reach(STRANGER, gid=STAFF) == "connected"
    assert f"--user {STRANGER}" in run(root, *guard.arguments("report")).stdout
    assert run(root, *guard.arguments("stop")).status == 0
    assert who(guard) == [0, ONE, TWO, STRANGER]


def test_the_same_lock_again_keeps_the_running_programs(root: Path, guard: Guard) -> None:
    """Nothing must be compiled for that. iptables would be the weaker lock."""
    guard.start(*LOCK)
    before = programs(guard)
    assert run(root, *guard.arguments("start", "--user", str(TWO), "--ip", SERVICE)).status == 0
    assert (programs(guard), who(guard)) == (before, [TWO])


def test_iptables_takes_over(root: Path, guard: Guard) -> None:
    """It tries its rules as other users, and changes IDs by number for that."""
    own_run = f"mount -t tmpfs tmpfs {root}/run"

    def inside(*words: str) -> Result:
        return guard.sandbox.call(lambda: run(root, *words, more=own_run), timeout_s=TIMEOUT_S)

    done = inside("start", *LOCK)
    assert (done.status, "imds-guard is active (iptables)" in done.stdout) == (0, True), done
    assert "could be made to try" not in done.stdout + done.stderr
    assert who(guard) == [ONE]
    assert guard.reach(STRANGER, gid=STAFF) == "connected"
    assert inside("stop").status == 0
    assert who(guard) == [0, ONE, TWO, STRANGER]
