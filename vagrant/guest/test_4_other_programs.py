# SPDX-License-Identifier: Apache-2.0
"""Other people's BPF programs at the root of cgroup2: one that allows no other, and one that redirects."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imds_guard.kernel import bpf
from imds_guard.kernel.bpf.attr import Command
from imds_guard.kernel.bpf.syscall import invoke
from tests.adversary.rewriters import rewriting
from vagrant.guest.world import (
    ACTIVE,
    DEGRADED,
    IPV4,
    IPV6,
    LOCK,
    ONE,
    STRANGER,
    UNSUPPORTED,
    assert_denied,
    command,
    done,
    everywhere,
    reach,
)

CONNECT4 = int(bpf.AttachType.CGROUP_INET4_CONNECT)
FILE = Path("/etc/imds-guard/config.toml")
PASSING = struct.pack("=BBhi", 0xB7, 0, 0, 1) + struct.pack("=BBhi", 0x95, 0, 0, 0)  # r0 = 1; exit
EXCLUSIVE, MULTI = 0, 2  # BPF_F_ALLOW_MULTI (include/uapi/linux/bpf.h)
WHO = ("--user", str(ONE), *LOCK)


@contextmanager
def attached(name: str, flags: int, code: bytes = PASSING) -> Iterator[None]:
    """A program at connect4 of the root, by BPF_PROG_ATTACH. A link is never exclusive."""
    program = bpf.prog_load(code, name, CONNECT4)
    root = os.open("/sys/fs/cgroup", os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert invoke(Command.PROG_ATTACH, struct.pack("=IIII", root, program, CONNECT4, flags))[1] == 0
        try:
            yield
        finally:
            assert invoke(Command.PROG_DETACH, struct.pack("=IIII", root, program, CONNECT4, 0))[1] == 0
    finally:
        os.close(root)
        os.close(program)


@contextmanager
def configured(first_line: str) -> Iterator[None]:
    """A configuration at its usual place, with this line first."""
    FILE.parent.mkdir(exist_ok=True)
    text = f'{first_line}\n[lock.metadata]\nendpoints = ["{IPV4}", "{IPV6}"]\nusers = [{ONE}]\n'
    FILE.write_text(text, encoding="utf-8")
    try:
        yield
    finally:
        FILE.unlink()


def test_check_names_one_that_allows_no_other() -> None:
    """And finds that eBPF works when the program is gone."""
    with attached("hermit", EXCLUSIVE):
        found = json.loads(done("check", "--json"))
        ebpf, iptables = found["backends"]
        assert (found["taken"], ebpf["works"], iptables["works"]) == ("iptables", False, True)
        assert "program hermit (id " in ebpf["reason"]
        assert "which user 0 loaded, is attached to /sys/fs/cgroup without BPF_F_ALLOW_MULTI" in ebpf["reason"]
    assert json.loads(done("check", "--json"))["taken"] == "ebpf"


def test_start_names_it() -> None:
    """eBPF alone is refused with 69 and changes nothing. What "auto" does: test_4_exclusive.py."""
    with attached("hermit", EXCLUSIVE):
        refused = command("start", "--backend", "ebpf", *WHO)
        assert (refused.returncode, refused.stdout) == (UNSUPPORTED, ""), refused
        assert "program hermit (id " in refused.stderr
        assert reach(STRANGER) == everywhere("connected")
        started = command("start", *WHO)
        assert started.returncode == 0, started
        assert "ebpf can't be used: looking at the hook connect4" in started.stderr
        assert "program hermit (id " in started.stderr
        done("stop")


def test_boot_that_may_take_ebpf_alone_leaves_the_emergency_lock() -> None:
    """It is put on with the backend that works."""
    with attached("hermit", EXCLUSIVE), configured('backend = "ebpf"'):
        booted = command("start", "--boot")
        assert booted.returncode == UNSUPPORTED, booted
        assert "program hermit" in booted.stderr
        assert "emergency lock" in booted.stderr
        assert_denied("iptables", reach(ONE))
        assert_denied("iptables", reach(STRANGER))
        assert reach(0) == everywhere("connected")
        done("stop")


def test_a_redirection_at_the_root_is_named_and_no_way_around_where_ours_can_be_first() -> None:
    """As agents do that send requests for metadata to a proxy of their own. One that is known is no fault."""
    proxy = rewriting(IPV4, "127.0.0.1")
    with attached("to_the_proxy_of_", MULTI, proxy), configured('known_programs = ["to_the_proxy_of_root"]'):
        started = command("start", *WHO)
        assert started.returncode == 0, started
        assert "to_the_proxy_of" not in started.stderr, "the configuration knows it"
        FILE.write_text(
            FILE.read_text(encoding="utf-8").replace("known_programs", "# known_programs"), encoding="utf-8"
        )
        status = command("status")
        assert status.returncode == DEGRADED
        if "to_the_proxy_of (id" in status.stdout and "runs behind ours" in status.stdout:
            assert_denied("ebpf", reach(STRANGER))
        else:
            assert "runs before ours at connect4 and may rewrite addresses" in " ".join(status.stdout.split())
            assert reach(STRANGER)[0] != "EPERM", "it is not named for nothing"
        assert "to_the_proxy_of" in command("start", *WHO).stderr
        FILE.write_text(
            FILE.read_text(encoding="utf-8").replace("# known_programs", "known_programs"), encoding="utf-8"
        )
        assert command("status").returncode == ACTIVE
    done("stop")
