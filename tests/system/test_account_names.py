# SPDX-License-Identifier: Apache-2.0
"""Names of accounts that are not ASCII, in each locale, and names of digits alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests import command, own_names
from tests.command import ONE, SERVICE, STRANGER, TWO, Guard, Result

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making cgroups and attaching programs needs root")

USER, TEAM = "Jörg", "日本"
"""The first one is in ISO-8859-1, and in EUC-JP; the second one in EUC-JP alone."""
DIGITS = str(TWO)
"""The name of an account whose ID is another one."""
OTHER_ID = 41_777

PASSWD = f"root:x:0:0::/:/bin/sh\n{USER}:x:{ONE}:{STRANGER}::/:\n{DIGITS}:x:{OTHER_ID}:{OTHER_ID + 1}::/:\n"
GROUP = f"root:x:0:\n{TEAM}:x:51001:\n{DIGITS}:x:{OTHER_ID + 2}:\n"
SERVICES = [own_names.FILES_FIRST, own_names.THROUGH_THE_C_LIBRARY]

PLAIN = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""Otherwise Python takes UTF-8 in the first two locales (PEP 538, PEP 540)."""


@pytest.fixture
def guard() -> Iterator[Guard]:
    with command.guard() as one:
        yield one


@pytest.fixture(scope="module")
def running() -> Iterator[Guard]:
    """A running guard, which no test may change."""
    with command.guard() as one:
        one.start("--user", str(ONE), "--group", "51001", "--ip", SERVICE)
        yield one


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "passwd").write_text(PASSWD, encoding="utf-8")
    (tmp_path / "group").write_text(GROUP, encoding="utf-8")
    (tmp_path / "nsswitch.conf").write_text(own_names.FILES_FIRST, encoding="ascii")
    return tmp_path


def run(folder: Path, words: Sequence[str], environment: dict[str, str]) -> Result:
    """Runs ``imds-guard`` with the accounts in ``folder``. Without -I, which ignores PLAIN."""
    return command.run(own_names.within(folder, command.argv(words, interpreter=("-s",))), environment)


# --- locales ----------------------------------------------------------------------------------------------------------


def each_command(guard: Guard, config: Path) -> list[tuple[str, ...]]:
    """Every command that reads or prints a name, in an order in which each has something to do."""
    cgroup = ("--cgroup", guard.sandbox.cgroup)
    return [
        ("start", *cgroup, "--user", USER, "--group", TEAM, "--ip", SERVICE),
        ("start", *cgroup, "--config", str(config)),
        ("start", "--boot", *cgroup, "--config", str(config)),
        ("status", *cgroup),
        ("status", *cgroup, "--json"),
        ("check", *cgroup, "--config", str(config)),
        ("explain", *cgroup, "--user", USER, SERVICE),
        ("export", *cgroup, "--format", "nftables"),
        ("verify", *cgroup, "--config", str(config), "--repair"),
        ("report", *cgroup),
        ("watch", *cgroup, "--once"),
        ("metrics", *cgroup),
        ("revoke", *cgroup, "--user", USER, "--save", "--config", str(config), "--without-root"),
        ("allow", *cgroup, "--user", USER, "--save", "--config", str(config), "--without-root"),
        ("stop", *cgroup),
    ]


@pytest.mark.parametrize(
    ("locale", "service"),
    [
        ("POSIX", own_names.THROUGH_THE_C_LIBRARY),
        ("de_DE.ISO-8859-1", own_names.THROUGH_THE_C_LIBRARY),
        ("ja_JP.EUC-JP", own_names.FILES_FIRST),
    ],
    ids=["posix", "iso-8859-1", "euc-jp"],
)
def test_each_command_in_each_locale(guard: Guard, folder: Path, locale: str, service: str) -> None:
    """Names of the file, of the command line (in UTF-8, as a script has them) and of the name service are the same."""
    (folder / "nsswitch.conf").write_text(service, encoding="ascii")
    environment = {**own_names.make_locale(folder, locale), **PLAIN}
    config = folder / "config.toml"
    text = f'[lock.x]\nendpoints = ["{SERVICE}"]\nusers = ["{USER}"]\ngroups = ["{TEAM}"]\n'
    config.write_text(text, encoding="utf-8")
    for words in each_command(guard, config):
        done = run(folder, words, environment)
        assert done.status == 0, (words, done)
        assert "Traceback" not in done.stderr
        if words[0] == "watch":
            continue
        if words[0] != "stop":
            assert guard.reach(ONE) == ("EPERM" if words[0] == "revoke" else "connected"), words
            assert guard.reach(STRANGER) == "EPERM", words
    assert f'{{ name = "{USER}", id = {ONE} }}' in config.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("locale", "shown"),
    [
        ("C", b"user J\\xf6rg (41001), group \\u65e5\\u672c (51001)"),
        ("C.UTF-8", f"user {USER} (41001), group {TEAM} (51001)".encode()),
        ("de_DE.ISO-8859-1", b"user J\xf6rg (41001), group \\u65e5\\u672c (51001)"),
        ("ja_JP.EUC-JP", f"user {USER} (41001), group {TEAM} (51001)".encode("euc_jp")),
    ],
)
def test_a_name_on_a_terminal(running: Guard, folder: Path, locale: str, shown: bytes) -> None:
    """In the encoding of the locale; a character that it lacks is an escape."""
    environment = {**own_names.make_locale(folder, locale), **PLAIN}
    done = run(folder, running.arguments("status"), environment)
    assert shown in done.stdout.encode("utf-8", "surrogateescape"), done


@pytest.mark.parametrize("service", SERVICES, ids=["files", "c-library"])
@pytest.mark.parametrize(
    ("locale", "typed", "in_file"),
    [
        ("de_DE.ISO-8859-1", b"J\xf6rg", "utf-8"),
        ("de_DE.ISO-8859-1", b"J\xf6rg", "iso-8859-1"),
        ("de_DE.ISO-8859-1", USER.encode(), "utf-8"),
        ("ja_JP.EUC-JP", USER.encode("euc_jp"), "utf-8"),
        ("ja_JP.EUC-JP", USER.encode("euc_jp"), "euc_jp"),
        ("C.UTF-8", b"J\xf6rg", "iso-8859-1"),
        ("POSIX", b"J\xf6rg", "iso-8859-1"),
    ],
)
def test_a_name_that_was_typed(
    running: Guard, folder: Path, locale: str, typed: bytes, in_file: str, service: str
) -> None:
    """As the bytes of the terminal, or in UTF-8, which names in files have on most machines."""
    (folder / "nsswitch.conf").write_text(service, encoding="ascii")
    (folder / "passwd").write_bytes(PASSWD.encode(in_file))
    environment = {**own_names.make_locale(folder, locale), **PLAIN}
    done = run(folder, running.arguments("explain", "--json", "--user", os.fsdecode(typed), SERVICE), environment)
    assert done.values["caller"]["fsuid"] == ONE, done


def test_a_cgroup_in_the_file_is_utf_8(guard: Guard, folder: Path) -> None:
    """Also where paths have another encoding in the locale."""
    cgroup = os.path.join(guard.sandbox.cgroup, USER)
    os.mkdir(cgroup)
    config = folder / "config.toml"
    config.write_text(f'cgroup = "{cgroup}"\n[lock.x]\nendpoints = ["{SERVICE}"]\nusers = ["root"]\n', encoding="utf-8")
    environment = {**own_names.make_locale(folder, "de_DE.ISO-8859-1"), **PLAIN}
    try:
        for words in (("start",), ("allow", "--cgroup", cgroup, "--user", USER, "--save", "--without-root")):
            done = run(folder, (*words, "--config", str(config)), environment)
            assert done.status == 0, done
        assert f'cgroup = "{cgroup}"' in config.read_text(encoding="utf-8")
    finally:
        assert run(folder, ("stop", "--cgroup", cgroup), environment).status == 0
        os.rmdir(cgroup)


# --- digits -----------------------------------------------------------------------------------------------------------

UTF_8 = {"LC_ALL": "C.UTF-8"}
NOTE = f"'{DIGITS}' was taken as the {{}} of that name, with the ID {{}}; for the {{}} ID {TWO} write 0{DIGITS}"


@pytest.mark.parametrize("service", SERVICES, ids=["files", "c-library"])
def test_a_name_of_digits_on_the_command_line(guard: Guard, folder: Path, service: str) -> None:
    """The account wins, as in chown(1) and iptables(8), with a note that says how to write the ID."""
    (folder / "nsswitch.conf").write_text(service, encoding="ascii")
    words = guard.arguments("start", "--ip", SERVICE, "--user", DIGITS, "--group", DIGITS)
    started = run(folder, words, UTF_8)
    assert started.status == 0, started
    assert NOTE.format("user", OTHER_ID, "user") in started.stderr
    assert NOTE.format("group", OTHER_ID + 2, "group") in started.stderr
    assert [guard.reach(uid) for uid in (OTHER_ID, TWO)] == ["connected", "EPERM"]
    assert guard.reach(STRANGER, groups=[OTHER_ID + 2]) == "connected"
    for words in (("explain", "--user", DIGITS, SERVICE), ("revoke", "--user", DIGITS), ("allow", "--user", DIGITS)):
        done = run(folder, guard.arguments(*words), UTF_8)
        assert NOTE.format("user", OTHER_ID, "user") in done.stderr, done
        assert guard.reach(OTHER_ID) == ("EPERM" if words[0] == "revoke" else "connected")
    explained = run(folder, guard.arguments("explain", "--user", DIGITS, SERVICE), UTF_8)
    assert f"fsuid {DIGITS} ({OTHER_ID}), fsgid {OTHER_ID + 1}" in explained.stdout
    locked = command.argv(("--cgroup", guard.sandbox.cgroup, "192.0.2.2", DIGITS), entry="ip_lockdown")
    done = command.run(own_names.within(folder, locked), UTF_8)
    assert NOTE.format("user", OTHER_ID, "user") in done.stderr, done


def test_an_id_with_a_zero_in_front_is_no_name(guard: Guard, folder: Path) -> None:
    started = run(folder, guard.arguments("start", "--ip", SERVICE, "--user", f"0{DIGITS}"), UTF_8)
    assert (started.status, "was taken" in started.stderr) == (0, False), started
    assert [guard.reach(uid) for uid in (OTHER_ID, TWO)] == ["EPERM", "connected"]


@pytest.mark.parametrize("boot", [(), ("--boot",)], ids=["start", "boot"])
@pytest.mark.parametrize("service", SERVICES, ids=["files", "c-library"])
def test_a_name_of_digits_in_the_file(guard: Guard, folder: Path, service: str, boot: tuple[str, ...]) -> None:
    """Quoted it is a name; a bare number is an ID. Saving keeps both."""
    (folder / "nsswitch.conf").write_text(service, encoding="ascii")
    config = folder / "config.toml"
    lists = f'users = ["{DIGITS}"]\ngroups = [{DIGITS}, "{ONE}"]\n'
    config.write_text(f'[lock.x]\nendpoints = ["{SERVICE}"]\n{lists}', encoding="ascii")
    started = run(folder, guard.arguments("start", *boot, "--config", str(config)), UTF_8)
    assert started.status == 0, started
    assert started.stderr.count(NOTE.format("user", OTHER_ID, "user")) == 1
    assert [guard.reach(uid) for uid in (OTHER_ID, TWO)] == ["connected", "EPERM"]
    assert [guard.reach(STRANGER, groups=[gid]) for gid in (TWO, ONE, OTHER_ID + 2)] == ["connected"] * 2 + ["EPERM"]
    saved = ("allow", "--user", "root", "--group", "0", "--save", "--config", str(config))
    done = run(folder, guard.arguments(*saved), UTF_8)
    assert done.status == 0, done
    text = config.read_text(encoding="utf-8")
    assert f'"{DIGITS}"' in text.partition("groups")[0]
    assert f"[{DIGITS}, " in text.partition("groups")[2]
    before = guard.status()["policy"]
    assert run(folder, guard.arguments("start", "--config", str(config)), UTF_8).status == 0
    assert guard.status()["policy"] == before


def test_a_stored_name_of_digits(guard: Guard, folder: Path) -> None:
    """--save writes it with its ID, and the next start reads that."""
    config = folder / "config.toml"
    lock = f'[lock.x]\nendpoints = ["{SERVICE}"]\nusers = [{{ name = "{DIGITS}", id = {OTHER_ID} }}]\n'
    config.write_text(lock, encoding="ascii")
    started = run(folder, guard.arguments("start", "--config", str(config)), UTF_8)
    assert (started.status, "saved" in started.stderr) == (0, False), started
    config.write_text(lock.replace(DIGITS, "99999"), encoding="ascii")
    gone = run(folder, guard.arguments("start", "--config", str(config)), UTF_8)
    assert (gone.status, "is not known now; the saved ID is used" in gone.stderr) == (0, True), gone
    assert guard.reach(OTHER_ID) == "connected"
