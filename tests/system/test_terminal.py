# SPDX-License-Identifier: Apache-2.0
"""Every help text, table and error on a terminal of 80 columns: no line is wider, and a few words have a colour.

A line that nobody could break may be wider: a URL, a path, a command to paste.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import unicodedata
from collections.abc import Iterator, Sequence

import pytest

from imds_guard.backends.ebpf.pins import link_pin
from tests import command
from tests.command import NEIGHBOUR, ONE, SERVICE, SERVICE_V6, STRANGER, TWO, Guard
from tests.kernel.guards import folder_of
from tests.tree import every_command

COLUMNS, ROWS = 80, 24
TIMEOUT_S = 120


def shown(words: Sequence[str], entry: str = "main", **environment: str) -> str:
    """What a command shows on a terminal, both streams, whatever its exit status."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("=4H", ROWS, COLUMNS, 0, 0))
    plain = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    with subprocess.Popen(
        command.argv(words, entry=entry),
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={**plain, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **environment},
    ) as process:
        os.close(theirs)
        text = b"".join(_parts(ours))
        process.wait(TIMEOUT_S)
    os.close(ours)
    return text.decode().replace("\r\n", "\n")


def _parts(fd: int) -> Iterator[bytes]:
    while True:
        try:
            part = os.read(fd, 1 << 16)
        except OSError:  # EIO: the command has closed it
            return
        if not part:
            return
        yield part


def width(line: str) -> int:
    """The columns of a line. Characters of East Asia take two."""
    return sum(2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in line)


def unbreakable(line: str) -> bool:
    """A line of one word, and a command to paste."""
    text = line.strip()
    return " " not in text or text.startswith(("imds-guard ", "sudo imds-guard ", "systemctl "))


COLOUR = re.compile(r"\x1b\[3[123]m([a-z]+)\x1b\[39m")


def check(text: str) -> None:
    """Raises where a line is too wide, or something is neither plain text nor a word in colour."""
    text = COLOUR.sub(r"\1", text)
    assert text.strip(), "nothing was shown"
    assert "Traceback" not in text
    assert [line for line in text.splitlines() if width(line) > COLUMNS and not unbreakable(line)] == []
    assert {one for one in text if unicodedata.category(one) == "Cc"} <= {"\n"}, text


@pytest.mark.parametrize("name", ["", *sorted(every_command())])
def test_help(name: str) -> None:
    text = shown([*([name] if name else []), "--help"])
    assert text.startswith("Usage: imds-guard")
    check(text)


def test_help_of_ip_lockdown() -> None:
    check(shown(["--help"], "ip_lockdown"))


ERRORS: tuple[tuple[str, ...], ...] = (
    ("nonsense",),
    ("statsu",),
    ("start", "--grup", "x"),
    ("start", "--group", "no-such-group-of-this-machine"),
    ("start", "--user", "no-such-user-of-this-machine-with-a-name-that-is-much-longer-than-a-terminal-is-wide-x"),
    ("start", "--user", "root", "--ip", "169.254.169.254:80,sctp"),
    ("start", "--user", "root", "--ip", "fd00::1:80:90:100:110:120:130:140:150"),
    ("start", "--user", "root", "--preset", "asw"),
    ("start", "--user", "root", "--mode", "off"),
    ("start", "--user", "root", "--config", "/nonexistent"),
    ("start", "--user", "root", "--cgroup", "/nonexistent/with/a/path/that/is/much/longer/than/any/terminal/is/wide/x"),
    ("start", "--config", "/nonexistent/with/a/path/that/is/much/longer/than/any/terminal/is/wide/config.toml"),
    ("start", "--nobody", "--user", "root"),
    ("allow",),
    ("allow", "--user", "root", "--for", "forever"),
    ("revoke", "--timer", "x", "--user", "root"),
    ("explain", "--pid", "1"),
    ("explain", "--user", "root"),
    ("export", "--format", "nonsense"),
    ("check", "--config", "/dev/null"),
    ("metrics", "--textfile", "/tmp/not-a-prom-file"),
    ("stop", "--cgroup", "/nonexistent"),
    ("status", "--cgroup", "/nonexistent"),
    ("watch", "--cgroup", "/nonexistent"),
    ("verify", "--cgroup", "/nonexistent", "--config", "/nonexistent"),
)


@pytest.mark.parametrize("words", ERRORS, ids=" ".join)
def test_an_error(words: tuple[str, ...]) -> None:
    check(shown(words))


@pytest.mark.parametrize(
    "words",
    [
        ("status", "--cgroup", "/nonexistent\x1b[31mred"),
        ("start", "--config", "/tmp/\x1b]0;title\x07no"),
        ("start", "--user", "root", "--cgroup", "/nonexistent\r\x9b2J"),
        ("check", "--config", "/nonexistent\nimds-guard: active"),
        ("start", "--user", "\x1b[2Jnobody"),
        ("\x1b[2J",),
    ],
    ids=repr,
)
def test_an_error_does_not_move_the_cursor(words: tuple[str, ...]) -> None:
    """Names of cgroups and files come from others, too. A line end must not begin a sentence of ours."""
    text = shown(words)
    check(text)
    assert not text.splitlines()[-1].startswith("imds-guard: active")


@pytest.fixture(scope="module")
def guard() -> Iterator[Guard]:
    """A guard with long names, many entries and denials to show."""
    if os.geteuid() != 0:
        pytest.skip("making cgroups and attaching programs needs root")
    with command.guard() as one:
        addresses = [word for address in (SERVICE, NEIGHBOUR, SERVICE_V6) for word in ("--ip", address)]
        more = [word for number in range(30) for word in ("--user", str(10**9 + number))]
        assert one.start("--user", str(ONE), *more, *addresses, "--deny-user", str(TWO)).status == 0
        for uid in (STRANGER, TWO, 0):
            for address in (SERVICE, SERVICE_V6):
                one.reach(uid, address)
        yield one


TABLES: tuple[tuple[str, ...], ...] = (
    ("status",),
    ("report",),
    ("verify", "--config", "/nonexistent"),
    ("explain", "--user", "root", SERVICE),
    ("explain", "--user", "nobody", f"[{SERVICE_V6}]:80"),
    ("allow", "--user", str(STRANGER), "--dry-run"),
    ("allow", "--user", str(STRANGER), "--ip", SERVICE),
    ("revoke", "--user", str(ONE)),
    ("mode", "audit", "--dry-run"),
    ("start", "--user", str(ONE), "--ip", SERVICE, "--dry-run"),
)


@pytest.mark.parametrize("words", TABLES, ids=" ".join)
def test_an_answer(words: tuple[str, ...], guard: Guard) -> None:
    check(shown(guard.arguments(*words)))


def test_the_check_of_this_machine() -> None:
    check(shown(["check", "--user", "root"]))


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a network namespace and a cgroup")
def test_the_demonstration() -> None:
    check(shown(["demo"]))


FOR_PROGRAMS = {
    "export",
    "metrics",
    "filter",
    "ip-lockdown",
    "install-service",
    "uninstall-service",
    "endpoints",
    "demo",
}
"""Rules, metrics and a service, or a test of their own here; the two that install units change the machine."""


def test_no_command_is_forgotten() -> None:
    """Each has an answer or an error here, beside its help."""
    assert set(every_command()) - {words[0] for words in (*TABLES, *ERRORS)} <= FOR_PROGRAMS


def test_the_built_in_endpoints() -> None:
    check(shown(["endpoints"]))


# --- colour ----------------------------------------------------------------------------------------------------------


def coloured(text: str) -> list[tuple[str, str]]:
    """The words in colour, with the numbers of their colours."""
    return re.findall(r"\x1b\[(3[123])m([a-z]+)\x1b\[39m", text)


GREEN, YELLOW, RED = "32", "33", "31"


def test_how_it_stands_has_a_colour(guard: Guard) -> None:
    assert coloured(shown(guard.arguments("status")))[0] == (GREEN, "active")
    assert coloured(shown(guard.arguments("explain", "--user", "root", NEIGHBOUR))) == [(RED, "denied")]
    with command.guard() as other:
        assert coloured(shown(other.arguments("status"))) == [(RED, "inactive")]
        other.start("--user", "root", "--ip", SERVICE)
        assert coloured(shown(other.arguments("explain", "--user", "root", SERVICE))) == [(GREEN, "allowed")]
        os.unlink(link_pin(folder_of(other.sandbox.cgroup).path, "connect6"))
        assert coloured(shown(other.arguments("status")))[:2] == [(YELLOW, "degraded"), (YELLOW, "fault")]


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": ""}], ids=str)
def test_nobody_gets_colour_who_wants_none(environment: dict[str, str], guard: Guard) -> None:
    for words in (("status",), ("explain", "--user", "root", NEIGHBOUR), ("report",)):
        text = shown(guard.arguments(*words), **environment)
        assert "\x1b" not in text
        check(text)


def test_an_empty_no_color_is_none(guard: Guard) -> None:
    """https://no-color.org: "when present and not an empty string"."""
    assert coloured(shown(guard.arguments("status"), NO_COLOR=""))


def test_a_file_or_a_pipe_gets_no_colour(guard: Guard) -> None:
    assert "\x1b" not in guard("status").stdout
