# SPDX-License-Identifier: Apache-2.0
"""No character that a process chose reaches a terminal, a log, JSON or a metric raw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Iterator

import pytest

from imds_guard.kernel.credentials import become
from tests import command
from tests.command import ONE, SERVICE, STRANGER, Guard, argv
from tests.system.test_report import of, samples

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups and attaching programs needs root")

NAMES = {
    "escape": b"a\x1b[2J\x1b]0;x\x07",
    "quotes": b"\"'`$(id)\\",
    "new-line": b"a\nverdict=x",
    "carriage-return": b"a\rb\tc\x7f\x08",
    "invalid-utf-8": b"a\xff\xfe\xc3(",
    "c1-control": b"a\xc2\x9b2J",
    "right-to-left": "a\u202eb\u2066".encode(),
    "label": b'",uid="0"} 1 #',
}
"""At most 15 bytes each: TASK_COMM_LEN."""
_SAFE = frozenset("\n")
_CLIENT = """
import ctypes, os, socket
ctypes.CDLL(None).prctl(15, bytes.fromhex(os.environ["NAME"]), 0, 0, 0)  # PR_SET_NAME
while True:
    socket.socket().connect_ex((os.environ["TO"], 80))
    os.write(1, b".")
    if not os.read(0, 1):
        break
"""


@pytest.fixture
def guard() -> Iterator[Guard]:
    with command.guard() as one:
        yield one


def live_under(name: bytes) -> None:
    """Becomes a program with this name, and with it in the command line, whose connect is denied."""
    become(uids=(STRANGER,) * 3, gids=(51_999,) * 3, groups=())
    environment = {"NAME": name.hex(), "TO": SERVICE}
    arguments: list[str | bytes] = [sys.executable, "-ISc", _CLIENT, name, b"--" + name]
    os.execve(sys.executable, arguments, environment)


def output_of(guard: Guard, *arguments: str) -> str:
    """Everything that a command prints. It must be text that moves no cursor and reorders nothing."""
    done = subprocess.run(argv(guard.arguments(*arguments)), capture_output=True, check=False, timeout=120)
    assert done.returncode in (0, 1, 3), done
    text = (done.stdout + done.stderr).decode()
    unsafe = {one for one in text if unicodedata.category(one).startswith(("C", "Zl", "Zp")) and one not in _SAFE}
    assert unsafe == set(), (arguments, text)
    assert not any(line.startswith("verdict=") for line in text.splitlines()), (arguments, text)
    return text


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_what_a_process_chose_is_escaped_in_every_output(guard: Guard, name: bytes) -> None:
    guard.start("--user", str(ONE), "--ip", SERVICE)
    out, hold = os.pipe(), os.pipe()

    def live() -> None:
        os.dup2(out[1], 1)
        os.dup2(hold[0], 0)
        live_under(name)

    pid = guard.sandbox.spawn(live)
    os.close(hold[0])
    try:
        assert os.read(out[0], 1) == b"."
        watched = output_of(guard, "watch", "--once")
        assert f"pid={pid} " in watched
        assert "comm=" in watched
        assert "cmdline=" in watched
        assert "not-listed" in output_of(guard, "report")
        found = json.loads(output_of(guard, "report", "--json"))
        assert [row["uid"] for row in found["rows"]] == [STRANGER]
        assert found["rows"][0]["comm"].startswith(name[:1].decode())
        os.write(hold[1], b"!")
        assert os.read(out[0], 1) == b"."
        events = map(json.loads, output_of(guard, "watch", "--once", "--json").splitlines())
        (event,) = (one for one in events if one["event"] == "denied")
        assert (event["pid"], event["uid"]) == (pid, STRANGER)
        for options in ((), ("--json",)):
            output_of(guard, "status", *options)
            assert "not-listed" in output_of(guard, "explain", "--pid", str(pid), SERVICE, *options)
        counted = samples(output_of(guard, "metrics"))
        assert of(counted, "report_denials", lock="default", reason="not-listed") == 2
        output_of(guard, "start", "--user", str(ONE), "--ip", SERVICE)
    finally:
        for fd in (*out, hold[1]):
            os.close(fd)
