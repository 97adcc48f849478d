# SPDX-License-Identifier: Apache-2.0
"""A refusal is one sentence on stderr and the right exit status; the guard that runs is unchanged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from imds_guard.commands import look
from imds_guard.present import status as status_text
from tests import command
from tests.command import NEIGHBOUR, ONE, SERVICE, STAFF, TWO, Guard

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups and attaching programs needs root")

USAGE, OTHER, UNKNOWN, NO_PERMISSION, BAD = 2, 1, 4, 77, 78


class Running(NamedTuple):
    """A guard that runs, and its status before the test."""

    guard: Guard
    before: Any

    def assert_unchanged(self) -> None:
        """``status --json`` is the same as before, with the programs' IDs and the generation."""
        assert status_values(self.guard) == self.before


def status_values(guard: Guard) -> Any:
    """The values of ``status --json``, without starting another Python."""
    return status_text.status_values(look.status(guard.sandbox.cgroup))


@pytest.fixture(scope="module")
def guard_of_all() -> Iterator[Running]:
    """One guard for every refusal, and its first status."""
    with command.guard() as guard:
        guard.start()
        yield Running(guard, guard.status())


@pytest.fixture
def running(guard_of_all: Running) -> Running:
    return Running(guard_of_all.guard, status_values(guard_of_all.guard))


WHO = ("--user", str(ONE))

ARGUMENTS: dict[str, tuple[int, tuple[str, ...], str]] = {
    # names and numbers
    "unknown group": (
        BAD,
        ("start", "--group", "nobody-has-this"),
        "there is no group 'nobody-has-this'. To make one: start with --create-group, or groupadd ",
    ),
    "unknown user": (BAD, ("start", "--user", "nobody-has-this"), "there is no user 'nobody-has-this'. To make one"),
    "unknown denied group": (BAD, ("start", *WHO, "--deny-group", "nobody-has-this"), "there is no group"),
    "unknown denied user": (BAD, ("start", *WHO, "--deny-user", "nobody-has-this"), "there is no user"),
    "one of many": (BAD, ("start", "--user", "0", "--user", "nobody-has-this"), "there is no user 'nobody-has-this'"),
    "empty user": (BAD, ("start", "--user", ""), "an empty user name"),
    "blank user": (BAD, ("start", "--user", " "), "an empty user name"),
    "empty group": (BAD, ("start", "--group", ""), "an empty group name"),
    "empty denied user": (BAD, ("start", "--deny-user", ""), "an empty user name"),
    "negative user": (BAD, ("start", "--user=-1"), "there is no user '-1'"),
    "no user's number": (BAD, ("start", "--user", "4294967295"), "4294967295 is not a user ID"),
    "number beyond 32 bits": (BAD, ("start", "--group", "18446744073709551616"), "is not a group ID"),
    "endless number": (BAD, ("start", "--user", "9" * 5000), "99999999999999999999 is not a user ID"),
    "hexadecimal": (BAD, ("start", "--user", "0x10"), "there is no user '0x10'"),
    "Arabic digits": (BAD, ("start", "--user", "١٢"), "there is no user"),
    "name and newline": (BAD, ("start", "--user", "root\n"), r"there is no user 'root\n'"),
    "name that is no UTF-8": (BAD, ("start", "--user", "r\udcff"), r"there is no user 'r\udcff'"),
    # endpoints
    "unspecified address": (BAD, ("start", *WHO, "--ip", "0.0.0.0"), "'0.0.0.0' is not an endpoint"),
    "unspecified IPv6": (BAD, ("start", *WHO, "--ip", "::"), "'::' is not an endpoint"),
    "unspecified with a port": (BAD, ("start", *WHO, "--ip", "[::]:80"), "'[::]:80' is not an endpoint"),
    "mapped unspecified": (BAD, ("start", *WHO, "--ip", "::ffff:0.0.0.0"), "is not an endpoint"),
    "empty address": (BAD, ("start", *WHO, "--ip", ""), "'' is not an endpoint: it is empty"),
    "address and newline": (BAD, ("start", *WHO, "--ip", f"{SERVICE}\n"), "it contains white space"),
    "half an address": (BAD, ("start", *WHO, "--ip", "192.0.2"), "is not an IP address"),
    "octet too large": (BAD, ("start", *WHO, "--ip", "192.0.2.256"), "is not an IP address"),
    "leading zero": (BAD, ("start", *WHO, "--ip", "192.0.2.010"), "a leading zero"),
    "host name": (BAD, ("start", *WHO, "--ip", "metadata.google.internal"), "host names are not looked up"),
    "URL": (BAD, ("start", *WHO, "--ip", f"http://{SERVICE}/"), "is not an endpoint"),
    "scope": (BAD, ("start", *WHO, "--ip", "fe80::1%lo"), "leave out the scope"),
    "prefix too long": (BAD, ("start", *WHO, "--ip", f"{SERVICE}/33"), "is not a prefix length"),
    "bits beyond the prefix": (BAD, ("start", *WHO, "--ip", f"{SERVICE}/24"), "has bits set after its prefix"),
    "no port": (BAD, ("start", *WHO, "--ip", f"{SERVICE}:"), "is not a port"),
    "port too large": (BAD, ("start", *WHO, "--ip", f"{SERVICE}:65536"), "is not a port"),
    "endless port": (BAD, ("start", *WHO, "--ip", f"{SERVICE}:{'9' * 5000}"), "is not a port"),
    "ports backwards": (BAD, ("start", *WHO, "--ip", f"{SERVICE}:90-80"), "runs backwards"),
    "no port is left": (BAD, ("start", *WHO, "--ip", f"{SERVICE}:!0-65535"), "no port is left"),
    "unknown protocol": (BAD, ("start", *WHO, "--ip", f"{SERVICE}:80,icmp"), "is not a protocol"),
    "IPv6 with ports": (BAD, ("start", *WHO, "--ip", "fd00:ec2::254:80"), "needs brackets"),
    "open bracket": (BAD, ("start", *WHO, "--ip", "[2001:db8::1"), "is not an endpoint"),
    "DNS of the WireServer": (BAD, ("start", *WHO, "--ip", "168.63.129.16:53"), "where Azure serves DNS"),
    "unknown preset": (BAD, ("start", *WHO, "--preset", "azur"), "there is no preset 'azur'; did you mean azure?"),
    "empty preset": (BAD, ("start", *WHO, "--preset", ""), "there is no preset ''"),
    # options that do not go together, or are none
    "nobody and somebody": (USAGE, ("start", *WHO, "--nobody"), "--nobody contradicts --user and --group"),
    "where without who": (USAGE, ("start", "--ip", SERVICE), "nobody would be allowed: name a --group or a --user"),
    "file and options": (USAGE, ("start", *WHO, "--config", "/dev/null"), "--config contradicts options that say who"),
    "file and --nobody": (USAGE, ("start", "--nobody", "--config", "/dev/null"), "--config contradicts"),
    "iptables in a cgroup": (USAGE, ("start", *WHO, "--backend", "iptables"), "--cgroup goes with the eBPF backend"),
    "forwarded in a cgroup": (USAGE, ("start", *WHO, "--forwarded", "drop"), "it does not go with --cgroup"),
    "unknown option": (USAGE, ("start", "--frobnicate"), "No such option: --frobnicate"),
    "unknown mode": (USAGE, ("start", *WHO, "--mode", "loud"), "'loud' is not one of 'enforce', 'audit'"),
    "unknown backend": (USAGE, ("start", *WHO, "--backend", "nftables"), "'nftables' is not one of"),
    "unknown word for containers": (USAGE, ("start", *WHO, "--containers", "maybe"), "'maybe' is not one of"),
    "option without its value": (USAGE, ("start", "--user"), "(see imds-guard"),
    "a word too many": (USAGE, ("stop", "now"), "(see imds-guard stop --help)"),
    "unknown command": (USAGE, ("restart",), "there is no command 'restart'; did you mean start?"),
    "no file": (BAD, ("start", "--config", "/nonexistent/config.toml"), "could not be read: ENOENT"),
    "a folder for a file": (BAD, ("start", "--config", "/tmp"), "could not be read: it is not a regular file"),
    "an empty name of a file": (BAD, ("start", "--config", ""), "could not be read: ENOENT"),
    # allow, revoke, explain, export, check
    "allow nobody": (USAGE, ("allow",), "name a --group or a --user"),
    "revoke nobody": (USAGE, ("revoke", "--ip", SERVICE), "name a --group or a --user"),
    "allow an unknown group": (BAD, ("allow", "--group", "nobody-has-this"), "there is no group"),
    "allow where nothing is locked": (USAGE, ("allow", *WHO, "--ip", NEIGHBOUR), f"no lock contains {NEIGHBOUR}"),
    "revoke where nothing is locked": (USAGE, ("revoke", *WHO, "--ip", NEIGHBOUR), f"no lock contains {NEIGHBOUR}"),
    "allow at an empty address": (BAD, ("allow", "--user", str(TWO), "--ip", ""), "'' is not an endpoint"),
    "allow at the unspecified address": (BAD, ("allow", "--user", str(TWO), "--ip", "0.0.0.0"), "is not an endpoint"),
    "revoke an endless number": (BAD, ("revoke", "--user", "9" * 50), "is not a user ID"),
    "a mode that is none": (USAGE, ("mode", "off"), "'off' is not one of"),
    "a timer and a user": (USAGE, ("revoke", "--timer", "a", *WHO), "--timer says by itself what to revoke"),
    "explain nobody": (USAGE, ("explain", SERVICE), "name either --pid or --user"),
    "explain two": (USAGE, ("explain", "--pid", "1", "--user", "root", SERVICE), "name either --pid or --user"),
    "explain nothing": (USAGE, ("explain", "--user", "root"), "Missing argument"),
    "explain a prefix": (USAGE, ("explain", "--user", "root", "192.0.2.0/24"), "a connect goes to one address"),
    "explain a host name": (BAD, ("explain", "--user", "root", "localhost"), "host names are not looked up"),
    "explain an unknown user": (BAD, ("explain", "--user", "nobody-has-this", SERVICE), "there is no user"),
    "explain an empty user": (BAD, ("explain", "--user", "", SERVICE), "an empty user name"),
    "explain no account": (BAD, ("explain", "--user", str(ONE), SERVICE), "no account has the user ID"),
    "explain process 0": (USAGE, ("explain", "--pid", "0", SERVICE), "0 is not in the range"),
    "explain no process": (UNKNOWN, ("explain", "--pid", "9" * 30, SERVICE), "there is no process"),
    "explain no number": (USAGE, ("explain", "--pid", "self", SERVICE), "'self' is not a valid integer"),
    "check what is wrong": (BAD, ("check", "--user", "nobody-has-this"), "there is no user"),
    "check without who": (USAGE, ("check", "--ip", SERVICE), "nobody would be allowed"),
    "export to nowhere": (USAGE, ("export", "--format", "cisco"), "'cisco' is not one of"),
    "export to nothing": (USAGE, ("export",), "Missing option '--format'"),
}


@needs_root
@pytest.mark.parametrize("case", sorted(ARGUMENTS))
def test_a_bad_argument_changes_nothing(running: Running, case: str) -> None:
    status, arguments, part = ARGUMENTS[case]
    name, *rest = arguments
    result = running.guard(name, *rest)
    assert result.status == status, result
    assert part in result.sentence
    running.assert_unchanged()


FILES: dict[str, tuple[str, str]] = {
    "unknown key": (
        'enforcing = true\n[lock.web]\nendpoints = ["192.0.2.1"]\nusers = [1]\n',
        ":1: unknown key 'enforcing'",
    ),
    "unknown key of a lock": (
        '[lock.web]\nendpoints = ["192.0.2.1"]\nuser = [1]\n',
        ":3: unknown key 'user' in lock 'web'",
    ),
    "wrong type": ('[lock.web]\nendpoints = ["192.0.2.1"]\nusers = "root"\n', ":3: users = 'root' must be a list"),
    "wrong word": ('mode = "off"\n[lock.web]\nendpoints = ["192.0.2.1"]\nusers = [1]\n', ":1: mode = 'off' must be"),
    "unknown user": ('[lock.web]\nendpoints = ["192.0.2.1"]\nusers = ["nobody-has-this"]\n', ":3: there is no user"),
    "bad address": (
        '[lock.web]\nusers = [1]\nendpoints = [\n"192.0.2.1",\n"198.51"]\n',
        ":5: '198.51' is not an endpoint",
    ),
    "two locks on one endpoint": (
        '[lock.web]\nendpoints = ["192.0.2.1:80"]\nusers = [1]\n\n[lock.api]\nendpoints = ["192.0.2.1"]\nusers = [2]\n',
        ":5: locks 'api' and 'web' both lock 192.0.2.1/32 tcp port 80",
    ),
    "nobody is allowed": ('[lock.web]\nendpoints = ["192.0.2.1"]\n', ":1: lock 'web' allows nobody"),
    "empty name of a lock": ('[lock.""]\nendpoints = ["192.0.2.1"]\nusers = [1]\n', "'' is not a lock name"),
    "a name with a newline": ('[lock."a\\nb"]\nendpoints = ["192.0.2.1"]\nusers = [1]\n', r"'a\nb' is not a lock name"),
    "no lock": ('mode = "enforce"\n', "no lock is described"),
    "empty file": ("", "no lock is described"),
    "not TOML": ("lock web\n", ""),
    "a number that is none": ('[lock.web]\nendpoints = ["192.0.2.1"]\nusers = [-1]\n', ":3: "),
    "relative cgroup": ('cgroup = "web"\n[lock.web]\nendpoints = ["192.0.2.1"]\nusers = [1]\n', ":1: cgroup = 'web'"),
}


@needs_root
@pytest.mark.parametrize("command_name", ["start", "check"])
@pytest.mark.parametrize("case", sorted(FILES))
def test_a_bad_file_changes_nothing(running: Running, tmp_path: Path, case: str, command_name: str) -> None:
    """The sentence names the file and the line."""
    text, part = FILES[case]
    file = tmp_path / "config.toml"
    file.write_text(text)
    result = running.guard(command_name, "--config", str(file))
    assert result.status == BAD, result
    assert str(file) in result.sentence
    assert part in result.sentence
    running.assert_unchanged()


@needs_root
def test_a_file_that_is_not_utf8_changes_nothing(running: Running, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(b"\x7fELF\xff\x00")
    result = running.guard("start", "--config", str(file))
    assert result.status == BAD
    assert "is not UTF-8" in result.sentence
    running.assert_unchanged()


@needs_root
@pytest.mark.parametrize("name", ["start", "stop", "status", "allow", "revoke", "explain", "check"])
def test_a_path_that_is_no_cgroup(running: Running, name: str) -> None:
    """Another file system, a path that is not there, an empty path. For status and explain that is "could not tell"."""
    words = {"start": WHO, "allow": WHO, "revoke": WHO, "explain": ("--user", "root", SERVICE)}.get(name, ())
    for path, part in (("/tmp", "it is not in a cgroup2"), ("/nonexistent", "ENOENT"), ("", "ENOENT")):
        result = command.imds_guard_command(name, *words, "--cgroup", path)
        assert result.status == (UNKNOWN if name in ("status", "explain") else OTHER), result
        assert part in result.sentence
    running.assert_unchanged()


@needs_root
def test_too_many_users_are_refused_before_anything_is_written(running: Running, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'[lock.web]\nendpoints = ["{SERVICE}"]\nusers = {list(range(300_000))}\n')
    result = running.guard("start", "--config", str(file))
    assert result.status in (69, BAD), result
    assert len(result.sentence) < 500
    running.assert_unchanged()


@needs_root
def test_a_policy_that_can_not_be_saved_is_in_force_and_the_error_says_so() -> None:
    """The file's folder can't be created: it is in /proc."""
    with command.guard() as guard:
        guard.start()
        saving = ("--save", "--without-root", "--config", "/proc/imds-guard/config.toml")
        result = guard("allow", "--user", str(TWO), *saving)
        assert result.status == OTHER, result
        assert result.sentence.startswith("saving the policy, which is in force until the next boot: ")
        assert "could not be written: ENOENT" in result.sentence
        assert guard.reach(TWO) == "connected"


@needs_root
def test_after_all_of_this_the_guard_still_guards(guard_of_all: Running) -> None:
    """The policy and the programs are the same, and it denies whom it should."""
    running = guard_of_all
    assert running.guard.status() == running.before
    assert [running.guard.reach(ONE), running.guard.reach(TWO)] == ["connected", "EPERM"]
    assert running.guard.reach(TWO, groups=(STAFF,)) == "connected"


# --- users other than root ------------------------------------------------------------------------------------------

NEEDS_ROOT: dict[str, tuple[str, ...]] = {
    "start": WHO,
    "stop": (),
    "status": (),
    "allow": WHO,
    "revoke": WHO,
    "check": (),
    "explain": ("--user", "root", SERVICE),
    "export": ("--format", "iptables"),
    "demo": (),
}

BECOME_NOBODY = (
    "import os, imds_guard.present.answers, imds_guard.commands.demo\n"  # imported while root
    "os.setgroups([]); os.setresgid(65533, 65533, 65533); os.setresuid(65534, 65534, 65534)"
)


@needs_root
@pytest.mark.parametrize("name", sorted(NEEDS_ROOT))
def test_only_root_may(running: Running, name: str) -> None:
    words = NEEDS_ROOT[name] if name == "demo" else ("--cgroup", running.guard.sandbox.cgroup, *NEEDS_ROOT[name])
    result = command.run(command.argv((name, *words), before=BECOME_NOBODY))
    assert result.status == NO_PERMISSION, result
    assert result.sentence == f"{name} needs root: run it with sudo"
    running.assert_unchanged()


@needs_root
def test_ip_lockdown_needs_root_too() -> None:
    result = command.run(command.argv((SERVICE, "root"), entry="ip_lockdown", before=BECOME_NOBODY))
    assert (result.status, result.sentence) == (77, "ip-lockdown needs root: run it with sudo")


@needs_root
@pytest.mark.parametrize("words", [("--help",), ("start", "--help"), ("endpoints",), ("--version",)])
def test_everyone_may_read(words: tuple[str, ...]) -> None:
    assert command.run(command.argv(words, before=BECOME_NOBODY)).answer


@needs_root
def test_a_wrong_option_is_reported_before_a_missing_privilege() -> None:
    """It would be wrong for root as well."""
    result = command.run(command.argv(("start", "--frobnicate"), before=BECOME_NOBODY))
    assert (result.status, "No such option" in result.sentence) == (USAGE, True)


def test_no_command_at_all() -> None:
    result = command.imds_guard_command()
    assert result.status == USAGE
    assert result.sentence == "Missing command (see imds-guard --help)"
