# SPDX-License-Identifier: Apache-2.0
"""verify and verify --repair after every kind of damage: the report, the state afterwards, and no gap between."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

import pytest

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.pins import link_pin
from imds_guard.kernel import bpf
from imds_guard.kernel.bpf.attr import F_BEFORE, Command, LinkCreate
from imds_guard.kernel.bpf.syscall import call
from imds_guard.kernel.cgroup import open_cgroup
from tests import command
from tests.command import ONE, SERVICE, SERVICE_V6, STAFF, STRANGER, TIMEOUT_S, TWO, Guard, Result
from tests.kernel.guards import Storm, folder_of, load_stranger
from tests.system.test_boot import NO_BPF

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making namespaces and cgroups needs root")

CONFIGURED = f"""
[lock.default]
endpoints = ["{SERVICE}"]
users = [{TWO}]
"""
FILTERED = f"""{CONFIGURED}
[filter.region]
locks = ["default"]
users = [{STRANGER}]
allow = ["GET /latest/**"]
"""
ABSENT = "/nonexistent/config.toml"


@pytest.fixture
def guard() -> Iterator[Guard]:
    """The service is locked for all but user ONE and group STAFF; the configuration allows user TWO instead."""
    with command.guard() as one:
        yield one


def who(guard: Guard) -> list[int]:
    """The user IDs that get through."""
    return [uid for uid in (0, ONE, TWO, STRANGER) if guard.reach(uid) == "connected"]


def repair(guard: Guard, path: str = ABSENT) -> Result:
    """``verify --repair`` with this configuration."""
    return guard("verify", "--repair", "--config", path)


def configured(folder: Path, text: str = CONFIGURED) -> str:
    """Writes a configuration and returns its path."""
    (folder / "config.toml").write_text(text, encoding="utf-8")
    return str(folder / "config.toml")


def poke(guard: Guard, number: Map, key: bytes, value: bytes) -> None:
    """Writes to a map as another tool could."""
    fd = bpf.pinned(os.path.join(folder_of(guard.sandbox.cgroup).path, number.pin_name))
    bpf.map_update(fd, key, value)
    os.close(fd)


# --- whole, and not active ------------------------------------------------------------------------------------------


def test_verify_of_a_whole_guard_says_so_and_changes_nothing(guard: Guard) -> None:
    guard.start()
    before = guard.status()
    for words in (("verify",), ("verify", "--repair")):
        done = guard(*words, "--config", ABSENT)
        assert (done.status, done.stdout, done.stderr) == (0, "imds-guard: active (ebpf)\n", "")
    assert guard.status() == before


def test_verify_exits_3_where_nothing_is_active(guard: Guard) -> None:
    """Repair does not start a guard that nobody configured."""
    for words in (("verify",), ("verify", "--repair")):
        done = guard(*words, "--config", ABSENT)
        assert (done.status, done.stdout, done.stderr) == (3, "imds-guard: inactive\n", "")
    assert who(guard) == [0, ONE, TWO, STRANGER]


def test_the_configuration_names_the_cgroup(guard: Guard, tmp_path: Path) -> None:
    """verify looks at the configuration's cgroup when no option names one."""
    path = configured(tmp_path, f'cgroup = "{guard.sandbox.cgroup}"' + CONFIGURED)
    words = ("verify", "--config", path)
    assert command.imds_guard_command(*words).status == 3
    guard.start()
    assert command.imds_guard_command(*words).stdout == "imds-guard: active (ebpf)\n"


def test_repair_of_nothing_puts_the_configurations_policy_in_force(guard: Guard, tmp_path: Path) -> None:
    done = repair(guard, configured(tmp_path))
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == (
        "repaired: nothing was in force: the configuration's policy was put in force"
    )
    assert who(guard) == [TWO]


def test_a_repair_that_may_not_start_leaves_nothing_in_force(guard: Guard, tmp_path: Path) -> None:
    """imds-guard-rules@.service: a restart of a firewall does not undo ``systemctl stop imds-guard``."""
    path = configured(tmp_path)
    done = guard("verify", "--repair", "--no-start", "--config", path)
    assert (done.status, done.stdout) == (3, "imds-guard: inactive\n")
    assert who(guard) == [0, ONE, TWO, STRANGER]


def test_repair_takes_a_usable_configuration_in_place_of_the_emergency_lock(guard: Guard, tmp_path: Path) -> None:
    """For example when the name service was not there yet at boot."""
    path = configured(tmp_path, "broken")
    assert guard("start", "--boot", "--config", path).status == 78
    left = repair(guard, path)
    assert left.status == 1
    assert "fault: emergency lock" in left.stdout
    assert "this is not TOML" in left.stderr
    configured(tmp_path)
    done = repair(guard, path)
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout.startswith("repaired: emergency lock")
    assert who(guard) == [TWO]


# --- eBPF -----------------------------------------------------------------------------------------------------------


def unlink_hook(guard: Guard) -> None:
    os.unlink(link_pin(folder_of(guard.sandbox.cgroup).path, "connect6"))


@pytest.mark.parametrize("hook", abi.GETPEERNAME)
def test_a_detached_hook_of_getpeername_is_repaired(guard: Guard, tmp_path: Path, hook: str) -> None:
    """Clients of filters would see the filter's address: a policy with filters is not whole without these hooks."""
    path = configured(tmp_path, FILTERED)
    assert guard("start", "--config", path).status == 0
    before = guard("verify", "--config", path).stdout
    os.unlink(link_pin(folder_of(guard.sandbox.cgroup).path, hook))
    seen = guard("verify", "--config", path)
    assert seen.status == 1
    assert f"the hook {hook} is not attached" in seen.stdout
    assert f"the hook {hook} is not attached" in guard("status").stdout
    assert f"repaired: the hook {hook} is not attached" in repair(guard, path).stdout
    assert guard("verify", "--config", path).stdout == before


def unpin_map(guard: Guard) -> None:
    os.unlink(os.path.join(folder_of(guard.sandbox.cgroup).path, "members"))


def add_a_stranger(guard: Guard) -> None:
    generation = guard.backend.state().generation
    poke(guard, Map.MEMBERS, abi.MEMBER.pack(generation, abi.USER, 0, STRANGER), abi.MEMBER_VALUE.pack(abi.ALLOW))


def wipe_settings(guard: Guard) -> None:
    generation = guard.backend.state().generation
    poke(guard, Map.SETTINGS, int(generation or 0).to_bytes(4, sys.byteorder), bytes(abi.SETTINGS.size))


def open_the_lock(guard: Guard) -> None:
    poke(guard, Map.CONFIG, bytes(4), abi.CONFIG.pack(0))


DAMAGE: dict[str, tuple[Callable[[Guard], None], str, list[int]]] = {
    "unlinked hook": (unlink_hook, "the hook connect6 is not attached", [ONE]),
    "unpinned map": (unpin_map, "the pin of a map is gone", [TWO]),
    "added user": (add_a_stranger, "the maps are not as imds-guard wrote them", [TWO]),
    "wiped settings": (wipe_settings, "the settings of the generation in force are gone", [TWO]),
    "generation 0": (open_the_lock, "nothing was in force", [TWO]),
}
"""The damage, the fault that is reported, and who gets through after the repair: ONE where the policy in force could be
read and was unaltered; TWO, whom the configuration allows, where it was not."""


@pytest.mark.parametrize(("damage", "said", "through"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_reported_and_repaired(
    guard: Guard, tmp_path: Path, damage: Callable[[Guard], None], said: str, through: list[int]
) -> None:
    """One line says what was wrong and what was done; after that the guard is whole."""
    path = configured(tmp_path)
    guard.start()
    damage(guard)
    seen = guard("verify", "--config", path)
    assert seen.status == (3 if said == "nothing was in force" else 1)
    assert said in seen.stdout or seen.status == 3
    done = repair(guard, path)
    assert (done.status, done.stderr) == (0, ""), done
    first, *_, last = done.stdout.splitlines()
    assert first.startswith(f"repaired: {said}")
    assert last == "imds-guard: active (ebpf)"
    assert who(guard) == through
    assert guard("verify", "--config", path).stdout == "imds-guard: active (ebpf)\n"


@pytest.mark.parametrize("damage", [unpin_map, add_a_stranger])
def test_without_a_readable_policy_and_a_configuration_only_root_gets_through(
    guard: Guard, damage: Callable[[Guard], None], tmp_path: Path
) -> None:
    """The policy in force was altered and there is no configuration: the emergency lock is put on."""
    built_in = "169.254.169.254"
    guard.start("--user", str(ONE), "--ip", built_in)
    damage(guard)
    done = repair(guard)
    assert done.status == 1
    assert "the emergency lock took its place" in done.stdout
    assert done.stdout.splitlines()[-1] == "imds-guard: degraded: emergency lock (ebpf)"
    assert f"warning: there is no usable configuration {ABSENT}" in done.stderr
    allowed = [lock["allow"] for lock in guard.status()["policy"]["locks"]]
    assert allowed == [{"users": [{"id": 0, "name": "root"}], "groups": []}]


def test_on_error_open_leaves_the_damaged_guard_as_it_is(guard: Guard, tmp_path: Path) -> None:
    path = configured(tmp_path, 'on_error = "open"\n[lock.default]\n')
    guard.start()
    unpin_map(guard)
    done = repair(guard, path)
    assert done.status == 1
    assert 'says on_error = "open": what is left in force stays as it is' in done.stderr
    assert who(guard) == [ONE]


@contextmanager
def neighbour(guard: Guard, flags: int = 0) -> Iterator[None]:
    """A program of another tool at the hook connect4 of the guard's cgroup. It lets everything through."""
    kind = abi.HOOKS["connect4"].attach_type
    with open_cgroup(guard.sandbox.cgroup) as cgroup:
        program = load_stranger(kind)
        link = call(
            Command.LINK_CREATE, LinkCreate(prog_fd=program, target_fd=cgroup.fd, attach_type=kind, flags=flags)
        )
        try:
            yield
        finally:
            os.close(link)
            os.close(program)


def test_a_program_behind_ours_is_not_ours_to_repair(guard: Guard) -> None:
    """It is reported, and the status stays degraded."""
    guard.start()
    with neighbour(guard):
        done = repair(guard)
        assert done.status == 1
        assert "fault: program somebody_else" in done.stdout
        assert "runs behind ours at connect4" in done.stdout
        assert "repaired" not in done.stdout
    assert repair(guard).status == 0


def test_a_repair_puts_ours_in_front(guard: Guard) -> None:
    """Where the kernel can order programs. The other one runs behind ours then, which is a fault, too."""
    guard.start()
    try:
        with neighbour(guard, F_BEFORE):
            done = repair(guard)
            assert done.status == 1
            assert (
                "runs before ours at connect4 and may rewrite addresses: the policy in force was put back"
                in done.stdout
            )
            assert "put ours in front of other programs at connect4" in done.stdout
            assert "fault: program somebody_else" in done.stdout
            assert "runs behind ours" in done.stdout
            assert "repaired" not in repair(guard).stdout
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("this kernel can't order the programs of a cgroup")


def test_a_program_that_the_configuration_knows_is_no_fault(guard: Guard, tmp_path: Path) -> None:
    """Neither to verify nor to the timer's repair. explain names it all the same."""
    path = configured(tmp_path, 'known_programs = ["somebody_else"]\n' + CONFIGURED)
    guard.start()
    with neighbour(guard):
        assert guard("verify", "--config", ABSENT).status == 1
        for words in (("verify",), ("verify", "--repair")):
            done = guard(*words, "--config", path)
            assert (done.status, done.stdout, done.stderr) == (0, "imds-guard: active (ebpf)\n", "")
        asked = ("explain", "--user", "root", SERVICE)
        assert "  but:         program somebody_else (id " in guard(*asked).stdout
        assert ["somebody_else" in sentence for sentence in guard(*asked, "--json").values["neighbours"]] == [True]
        found = guard("status", "--json").values["ebpf"]["other_programs"]
        assert [(one["name"], one["hook"], one["runs"], one["cgroups"]) for one in found] == [
            ("somebody_else", "connect4", "behind", [guard.sandbox.cgroup])
        ]


def test_a_repair_leaves_no_gap(guard: Guard, tmp_path: Path) -> None:
    """A denied caller that keeps trying never gets through during three repairs."""
    path = configured(tmp_path)
    guard.start()
    with_lock = Storm(guard.sandbox, STRANGER, SERVICE)
    with_lock.wait_for(200)
    for damage in (unlink_hook, unpin_map, wipe_settings):
        damage(guard)
        assert repair(guard, path).status == 0
        with_lock.wait_for(200)
    connected, denied, other = with_lock.counts()
    assert (connected, other) == (0, 0)
    assert denied >= 800


def test_verify_in_json(guard: Guard) -> None:
    guard.start()
    unlink_hook(guard)
    done = guard("verify", "--repair", "--config", ABSENT, "--json")
    values = done.values
    assert (done.status, values["state_before"], values["state"], values["faults"]) == (0, "degraded", "active", [])
    (line,) = values["repaired"]
    assert line.startswith("the hook connect6 is not attached")
    assert "the policy in force was put back (repaired the hooks" in line


# --- iptables -------------------------------------------------------------------------------------------------------


def inside(guard: Guard, *argv: str) -> Result:
    """Runs a program in the sandbox's network namespace."""
    return guard.sandbox.call(lambda: command.run(argv), timeout_s=TIMEOUT_S)


def on_iptables(guard: Guard, *words: str) -> Result:
    """Runs the command there with bpf(2) refused: it can only change the namespace's rules."""
    return inside(guard, sys.executable, "-I", str(NO_BPF), *command.argv(words))


RULES: dict[str, tuple[tuple[str, ...], str, int]] = {
    "ACCEPT before our jump": (("-t", "mangle", "-I", "OUTPUT", "-j", "ACCEPT"), "stand before ours", ONE),
    "flushed OUTPUT": (("-F", "OUTPUT"), "nothing in OUTPUT leads to IMDS-GUARD any more", ONE),
    "flushed chain": (("-F", "IMDS-GUARD"), "", TWO),
    "ACCEPT in our chain": (("-I", "IMDS-GUARD", "-j", "ACCEPT"), "someone changed the rules in our chains", ONE),
    "everything flushed": (("-F",), "nothing in OUTPUT leads to IMDS-GUARD any more", ONE),
}
"""An iptables command, the fault that is reported, and who gets through after the repair (see DAMAGE).

Table mangle holds the policy, too, so that a flush of filter alone leaves it readable.
"""


@pytest.mark.parametrize(("words", "said", "through"), RULES.values(), ids=RULES.keys())
def test_changed_rules_are_reported_and_repaired(
    guard: Guard, tmp_path: Path, words: tuple[str, ...], said: str, through: int
) -> None:
    path = configured(tmp_path, 'backend = "iptables"' + CONFIGURED)
    assert on_iptables(guard, "start", "--user", str(ONE), "--ip", SERVICE, "--ip", SERVICE_V6).status == 0
    assert inside(guard, "iptables", *words).status == 0
    seen = on_iptables(guard, "verify", "--config", path)
    assert (seen.status, said in seen.stdout) == (1, True), seen
    done = on_iptables(guard, "verify", "--repair", "--config", path)
    assert (done.status, done.stderr) == (0, ""), done
    assert done.stdout.splitlines()[0].startswith("repaired: ")
    assert done.stdout.splitlines()[-1] == "imds-guard: active (iptables)"
    assert who(guard) == [through]
    assert on_iptables(guard, "verify", "--config", path).status == 0


def test_supplementary_groups_come_back_with_the_rules(guard: Guard) -> None:
    assert on_iptables(guard, "start", "--group", str(STAFF), "--ip", SERVICE).status == 0
    for table in ("filter", "mangle"):  # either one alone would hold
        inside(guard, "iptables", "-t", table, "-I", "OUTPUT", "-j", "ACCEPT")
    assert guard.reach(STRANGER) == "connected"
    assert on_iptables(guard, "verify", "--repair", "--config", ABSENT).status == 0
    assert (guard.reach(STRANGER), guard.reach(STRANGER, groups=[STAFF])) == ("ECONNREFUSED", "connected")
