# SPDX-License-Identifier: Apache-2.0
"""iptables in namespaces of our own: mistakes of a well-known script, other people's rules, and faults()."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from imds_guard.backends.iptables import IptablesBackend, output_rules, programs, tables
from imds_guard.backends.iptables.form import Form
from imds_guard.backends.iptables.probe import ProbeResult, probe
from imds_guard.backends.iptables.programs import Program, default_program
from imds_guard.backends.iptables.tables import NoTable
from imds_guard.errors import GuardError, NotPermitted, Unsupported
from imds_guard.kernel.credentials import become
from imds_guard.kernel.netns import unshare_network
from imds_guard.kernel.run import Completed, run
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.model import Mode, Verdict
from imds_guard.policy.ports import ALL_PORTS
from tests.kernel.rules_in_a_sandbox import (
    BAR,
    FOO,
    KINDS,
    NO_GROUP,
    OTHER,
    PORTS,
    SERVED,
    STAFF,
    STRANGER,
    V4,
    V6,
    Machine,
    one_legacy_at_a_time,
    policy_for,
)
from tests.tools import need

REFUSED = "ECONNREFUSED"


@pytest.fixture(params=sorted(KINDS))
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    """A namespace with listeners, once for each kind of iptables."""
    kind: str = request.param
    if os.geteuid() != 0:
        pytest.skip("making network namespaces needs root")
    need(KINDS[kind][0])
    with one_legacy_at_a_time(kind), Sandbox((V4, V6, OTHER)) as sandbox:
        sandbox.serve(SERVED, PORTS)
        yield Machine(sandbox, kind, str(tmp_path))


# --- what a well-known script gets wrong ------------------------------------------------------------------------------


def test_allow_then_deny(machine: Machine) -> None:
    """A user who was allowed before and no longer is, is denied."""
    machine.apply(policy_for([FOO, BAR]))
    assert machine.reach(FOO) == "connected"
    machine.apply(policy_for([BAR]))
    assert [machine.reach(FOO, to) for to in (V4, V6)] == [REFUSED] * 2
    assert machine.reach(BAR) == "connected"


def test_deny_then_allow(machine: Machine) -> None:
    """A user who was denied before and now is allowed, gets through."""
    machine.apply(policy_for([BAR]))
    assert machine.reach(FOO) == REFUSED
    machine.apply(policy_for([BAR, FOO]))
    assert [machine.reach(FOO, to) for to in (V4, V6)] == ["connected"] * 2


def test_remove_clears_ipv6_too(machine: Machine) -> None:
    """After remove() neither IP version has a rule or a chain of ours, and everybody connects."""
    before = machine.rules(4), machine.rules(6)
    machine.apply(policy_for(range(42_000, 42_100, 3), [STAFF]))
    assert machine.reach(STRANGER, V6) == REFUSED
    machine.call(lambda: machine.backend().remove())
    assert "IMDS" not in machine.rules(4) + machine.rules(6)
    assert _without_builtin(machine.rules(4), machine.rules(6)) == _without_builtin(*before)
    assert [machine.reach(STRANGER, to) for to in (V4, V6)] == ["connected"] * 2
    assert machine.call(lambda: machine.backend().read()) is None
    assert machine.call(lambda: machine.backend().in_force()) is False
    assert not machine.call(lambda: machine.backend().remove())


def _without_builtin(*saved: str) -> list[str]:
    """Without built-in chains: nft creates empty ones when a table is read first."""
    return [line for text in saved for line in text.splitlines() if " ACCEPT [" not in line]


def test_earlier_accept_does_not_win(machine: Machine) -> None:
    """An ACCEPT for the address that was there before our rules lets nobody through."""
    machine.iptables("-A", "OUTPUT", "-d", V4, "-j", "ACCEPT")
    machine.iptables("-A", "OUTPUT", "-j", "ACCEPT", version=6)
    machine.apply(policy_for([FOO]))
    assert [machine.reach(STRANGER, to) for to in (V4, V6)] == [REFUSED] * 2
    assert machine.reach(FOO) == "connected"


@pytest.mark.parametrize("table", ["filter", "mangle"])
def test_rules_that_the_kernel_does_not_show_are_not_in_force(
    machine: Machine, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """iptables-restore reports success and loses a rule: apply() reads back, fails, and the old rules stay."""
    machine.apply(policy_for([FOO]))
    before = [machine.rules(version, name) for version in (4, 6) for name in ("filter", "mangle")]
    lost: list[str] = []

    def losing(program: Program, anchor: tables.Anchor, chains: tables.Table, lock_wait_s: int) -> bool:
        if not lost and anchor.table == table:
            name, rules = next((name, rules) for name, rules in chains.items() if name.endswith("-DENY"))
            lost.append(rules[-1])
            chains = {**chains, name: rules[:-1]}
        return tables.replace(program, anchor, chains, lock_wait_s)

    monkeypatch.setattr(output_rules, "replace", losing)
    with pytest.raises(GuardError, match=rf"iptables-save shows others in table {table}; nothing was changed"):
        machine.apply(policy_for([BAR]))
    assert [machine.rules(version, name) for version in (4, 6) for name in ("filter", "mangle")] == before
    assert machine.reach(FOO) == "connected"


# --- other people's rules ---------------------------------------------------------------------------------------------

_OTHERS: tuple[tuple[str, ...], ...] = (
    ("-N", "ADMIN"),
    ("-A", "OUTPUT", "-p", "udp", "--dport", "9999", "-j", "DROP"),
    ("-A", "OUTPUT", "-j", "ADMIN"),
    ("-A", "OUTPUT", "-p", "tcp", "--dport", "9998", "-j", "REJECT"),
    ("-A", "ADMIN", "-m", "comment", "--comment", "IMDS-GUARD is not mine", "-j", "RETURN"),
    ("-A", "FORWARD", "-j", "DROP"),
)


def test_other_peoples_rules_stay_as_they_are(machine: Machine) -> None:
    """Rules, chains and their order are the same after two starts, a change and a stop."""
    for version in (4, 6):
        for arguments in _OTHERS:
            machine.iptables(*arguments, version=version)
    before = machine.rules(4), machine.rules(6)
    for policy in (policy_for([FOO]), policy_for([FOO]), policy_for(range(42_000, 42_100, 3), [STAFF])):
        machine.apply(policy)
        assert [_not_ours(machine.rules(version)) for version in (4, 6)] == [_not_ours(text) for text in before]
        assert machine.faults() == []
    machine.call(lambda: machine.backend().remove())
    assert (machine.rules(4), machine.rules(6)) == before


def _not_ours(saved: str) -> list[str]:
    return [line for line in saved.splitlines() if "IMDS-GUARD" not in line.replace("IMDS-GUARD is not mine", "")]


def test_twice_is_once(machine: Machine) -> None:
    """The same policy again leaves the same rules. One jump is the first rule of OUTPUT."""
    machine.apply(policy_for([FOO], [STAFF]))
    once = machine.rules(4), machine.rules(6)
    machine.apply(policy_for([FOO], [STAFF]))
    assert (machine.rules(4), machine.rules(6)) == once
    assert [line for line in once[0].splitlines() if line.startswith("-A OUTPUT")] == ["-A OUTPUT -j IMDS-GUARD"]


def test_allowed_packets_meet_other_peoples_rules(machine: Machine) -> None:
    """A later rule can still stop a user that we allow: we are not a firewall."""
    machine.iptables("-A", "OUTPUT", "-d", V4, "-p", "tcp", "--dport", "8080", "-j", "REJECT")
    machine.apply(policy_for([FOO]))
    assert machine.reach(FOO, V4, 80) == "connected"
    assert machine.reach(FOO, V4, 8080) == REFUSED


# --- faults -----------------------------------------------------------------------------------------------------------


def test_a_foreign_flush_is_a_fault(machine: Machine) -> None:
    """faults() reports each step of someone's ``iptables -F`` and ``-X``, and apply() repairs all of it.

    Here with rules in filter alone; test_iptables_output.py has the better forms.
    """
    machine.form = Form.FILTER
    policy = policy_for([FOO])
    machine.apply(policy)
    assert machine.faults() == []
    machine.iptables("-F", "OUTPUT")
    assert any("nothing in OUTPUT leads to" in line for line in machine.faults())
    machine.iptables("-F")
    machine.iptables("-X")
    assert any("the rules for IPv4 are gone" in line for line in machine.faults())
    machine.iptables("-F", version=6)
    machine.iptables("-X", version=6)
    assert any("are gone" in line for line in machine.faults())
    assert machine.reach(STRANGER) == "connected"
    assert machine.call(lambda: machine.backend().read()) is None
    machine.apply(policy)
    assert machine.faults() == []
    assert [machine.reach(STRANGER, to) for to in (V4, V6)] == [REFUSED] * 2


def test_a_rule_before_ours_is_a_fault(machine: Machine) -> None:
    """A rule that was inserted before ours is a fault. apply() puts ours first again and leaves the other one.

    Here without nft; test_iptables_output.py shows that the rule changes nothing where there is nft.
    """
    machine.form = Form.MANGLE
    machine.apply(policy_for([FOO]))
    machine.iptables("-I", "OUTPUT", "1", "-d", V4, "-j", "ACCEPT")
    assert machine.reach(STRANGER) == "connected"
    assert any("stand before ours" in line for line in machine.faults())
    machine.apply(policy_for([FOO]))
    assert machine.faults() == []
    assert machine.reach(STRANGER) == REFUSED
    assert f"-A OUTPUT -d {V4}/32 -j ACCEPT" in machine.rules(4)


def test_a_rule_that_comes_between_reading_and_writing_does_not_stay_before_ours(machine: Machine) -> None:
    """A command reads a table again before it changes it, even within reading_once()."""
    machine.form = Form.MANGLE
    machine.apply(policy_for([FOO]))
    before_ours = ["-I", "OUTPUT", "1", "-d", V4, "-j", "ACCEPT"]

    def command() -> list[str]:
        backend = machine.backend()
        with tables.reading_once():
            assert backend.faults() == []
            assert run([KINDS[machine.kind][0], "-w", "10", *before_ours]).status == 0
            assert backend.faults() == []  # of the table as it was read before
            backend.apply(policy_for([FOO]))
            return backend.faults()

    assert machine.call(command) == []
    assert machine.faults() == []
    assert machine.reach(STRANGER) == REFUSED


def test_cached_tables_are_forgotten_at_the_end_of_a_command(machine: Machine) -> None:
    """And a table that the command has changed itself is read again."""

    def command() -> tuple[bool, bool, bool]:
        backend = machine.backend()
        with tables.reading_once():
            before = backend.in_force()
            backend.apply(policy_for([FOO]))
            after = backend.in_force()
        run([KINDS[machine.kind][0], "-w", "10", "-F", "OUTPUT"])
        return before, after, any("nothing in OUTPUT leads to" in line for line in backend.faults())

    assert machine.call(command) == (False, True, True)


def test_a_table_that_was_changed_in_an_inner_block_is_read_again_outside(machine: Machine) -> None:
    """status() in the middle of a repair is such a block."""

    def command() -> tuple[bool, bool]:
        backend = machine.backend()
        with tables.reading_once():
            before = backend.in_force()
            with tables.reading_once():
                backend.apply(policy_for([FOO]))
            return before, backend.in_force()

    assert machine.call(command) == (False, True)


def test_another_namespace_has_tables_of_its_own(machine: Machine) -> None:
    """Tables are cached by namespace: children of a command try rules in one of their own."""
    machine.apply(policy_for([FOO]))
    program = default_program(4, KINDS[machine.kind][0])

    def here_and_there() -> tuple[bool, bool]:
        with tables.reading_once():
            here = "IMDS-GUARD" in tables.read_table(program)
            unshare_network([])
            return here, "IMDS-GUARD" in tables.read_table(program)

    assert machine.call(here_and_there) == (True, False)


@pytest.mark.parametrize(
    "arguments",
    [
        ("-I", "IMDS-GUARD-L0", "1", "-j", "RETURN"),
        ("-I", "IMDS-GUARD-L0", "1", "-m", "owner", "--uid-owner", str(STRANGER), "-j", "RETURN"),
        ("-I", "IMDS-GUARD-T", "1", "-s", "127.0.0.0/8", "-j", "RETURN"),
        ("-D", "IMDS-GUARD-L0", "1"),
        ("-F", "IMDS-GUARD-DENY"),
    ],
    ids=" ".join,
)
def test_an_edited_chain_is_a_fault(machine: Machine, arguments: tuple[str, ...]) -> None:
    """A chain of ours that someone edited is a fault, and apply() repairs it."""
    machine.apply(policy_for([FOO, BAR]))
    machine.iptables(*arguments)
    assert machine.faults() != []
    machine.apply(policy_for([FOO, BAR]))
    assert machine.faults() == []


def test_both_kinds_of_tables_are_known(machine: Machine) -> None:
    """Rules of the other kind of iptables are read. apply() replaces them by rules of the default kind."""
    (kind,) = set(KINDS) - {machine.kind}
    other = Machine(machine.sandbox, kind, machine.state_folder)
    policy = policy_for([FOO], [STAFF])
    with one_legacy_at_a_time(kind):
        other.apply(policy)
        assert machine.call(lambda: machine.backend().read()) == policy
        machine.apply(policy_for([BAR]))
        assert "IMDS" not in other.rules(4) + other.rules(6)
    assert machine.faults() == []
    assert machine.reach(BAR) == "connected"
    lines = machine.apply(policy)
    assert f"({machine.kind})" in lines[0]


def test_audit_denies_nobody_and_counts(machine: Machine) -> None:
    """In audit mode a user who is not listed connects, and the LOG rule has met the packet."""
    policy = policy_for([FOO], mode=Mode.AUDIT)
    machine.apply(policy)
    assert [machine.reach(FOO), machine.reach(STRANGER)] == ["connected"] * 2
    saved = machine.call(lambda: run([f"{machine.commands[0]}-save", "-c"])).stdout
    (line,) = [line for line in saved.splitlines() if "-j LOG" in line]
    assert line.startswith("[1:")
    assert machine.call(lambda: machine.backend().read()) == policy


def test_udp_is_judged_on_every_packet(machine: Machine) -> None:
    """A datagram to a locked port is refused to a user who is not listed. Other ports, and TCP, are left alone."""
    machine.apply(policy_for([FOO], tcp=(), udp=((80, 80),)))
    for to in (V4, V6):
        assert [machine.send(FOO, to), machine.send(STRANGER, to)] == ["connected", "EPERM"]
        assert [machine.send(STRANGER, to, 8080), machine.reach(STRANGER, to)] == ["connected"] * 2


def test_udp_connect_sends_nothing(machine: Machine) -> None:
    """Known difference "udp-connect": connect() of a UDP socket succeeds, and its first datagram is refused."""
    machine.apply(policy_for([FOO], udp=ALL_PORTS))

    def try_it() -> tuple[int, str]:
        become((STRANGER,) * 3, (NO_GROUP,) * 3, ())
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            connected = one.connect_ex((V4, 80))
            try:
                one.send(b"?")
            except PermissionError:
                return connected, "EPERM"
            return connected, "sent"

    assert machine.call(try_it) == (0, "EPERM")


def test_other_addresses_are_left_alone(machine: Machine) -> None:
    """An address that is not locked is open to everyone."""
    machine.apply(policy_for([FOO], to=[V4]))
    assert [machine.reach(STRANGER, to) for to in (V4, V6, OTHER, "127.0.0.1")] == [REFUSED] + ["connected"] * 3


def test_deny_list_of_many(machine: Machine) -> None:
    """A deny list that is long enough for a tree stops its users and nobody else."""
    machine.apply(policy_for(deny=range(43_000, 43_100, 3), default=Verdict.ALLOW))
    assert [machine.reach(uid) for uid in (43_000, 43_099, 43_001, 42_999)] == [REFUSED] * 2 + ["connected"] * 2


# --- groups -----------------------------------------------------------------------------------------------------------


def test_probe_sees_supplementary_groups(machine: Machine) -> None:
    """The owner match of this kernel sees supplementary groups, with both IP versions."""
    programs = [default_program(version, command) for version, command in zip((4, 6), machine.commands)]
    assert probe(programs, audit=True) == ProbeResult(owner=True, supplementary=True)


def test_groups_without_a_match_for_them_are_refused(machine: Machine) -> None:
    """Where the kernel does not match supplementary groups, a policy with groups is refused, with advice."""
    backend = machine.backend()
    backend._probes[False] = ProbeResult(owner=True, supplementary=False, reason="tried, and it did not match")
    with pytest.raises(Unsupported, match=r"tried, and it did not match; --resolve-groups"):
        backend.check(policy_for([FOO], [STAFF]))
    backend.check(policy_for([FOO]))
    backend.resolve_groups = True
    backend.check(policy_for([FOO], [STAFF]))


def test_resolved_groups(machine: Machine) -> None:
    """With resolve_groups the members of a group connect by their user ID, and notes() says so."""
    # "games" of Debian's base-passwd, whose uid is 5 and gid 60, and "man", 6 and 12.
    policy = policy_for([FOO], [60])
    machine.call(lambda: machine.backend(resolve_groups=True).apply(policy))
    assert machine.reach(5) == "connected"
    assert machine.reach(STRANGER, gid=60) == "connected"
    assert [machine.reach(6), machine.reach(STRANGER, groups=[60])] == [REFUSED] * 2
    assert machine.call(lambda: machine.backend().read()) == policy
    assert machine.faults() == []
    notes = machine.call(lambda: machine.backend().notes(policy))
    assert any("start again after each change of membership" in line for line in notes)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_iptables_absent() -> None:
    """Without iptables the error names its package, and the exit status is 69."""
    backend = IptablesBackend(("iptables-of-nobody", "ip6tables-of-nobody"))
    with pytest.raises(Unsupported, match="install the package iptables") as caught:
        backend.check(None)
    assert caught.value.exit_status == 69
    assert backend.read() is None


def test_each_file_is_asked_once_which_tables_it_writes(tmp_path: Path) -> None:
    """A command asks some ten times. An upgrade or update-alternatives may change the file in between."""
    program, asked = tmp_path / "iptables", tmp_path / "asked"

    def put(said: str, status: int = 0) -> None:
        fresh = tmp_path / "fresh"
        fresh.write_text(f"#!/bin/sh\necho >>{asked}\necho '{said}'\nexit {status}\n")
        fresh.chmod(0o755)
        fresh.replace(program)

    put("iptables v1.8.9 (nf_tables)")
    assert [default_program(4, str(program)).kind for _ in range(3)] == [programs.NFT] * 3
    assert asked.read_text() == "\n"
    put("iptables v1.8.9 (legacy)")
    assert default_program(4, str(program)).kind == programs.LEGACY
    put("it is broken", 1)
    for _ in range(2):
        with pytest.raises(Unsupported, match="it is broken"):
            default_program(4, str(program))
    assert asked.read_text() == "\n" * 4
    program.unlink()
    with pytest.raises(Unsupported, match="install the package iptables"):
        default_program(4, str(program))


def test_without_privilege(machine: Machine) -> None:
    """Without root the error says so, and nothing changes."""

    def try_it() -> str:
        become((STRANGER,) * 3, (NO_GROUP,) * 3, ())
        try:
            machine.backend().check(policy_for([FOO]))
        except NotPermitted as error:
            return str(error)
        return "it worked"

    assert "root" in machine.call(try_it)


def test_a_kernel_without_the_tables_is_no_failure() -> None:
    """Where the kernel has no such tables, nothing is in them: NoTable."""
    program = Program(4, "iptables", "nf_tables")
    for text in (
        "iptables/1.8.9 Failed to initialize nft: Protocol not supported",
        "iptables-save v1.8.9 (legacy): can't initialize iptables table `filter': Table does not exist",
    ):
        with pytest.raises(NoTable, match="no such tables"):
            tables._raise_for(program, "could not be read", Completed(1, "", text))


def test_a_foreign_reference_to_our_chain_is_named(machine: Machine) -> None:
    """When someone's rule leads into our chain, remove() names the rule and removes nothing."""
    machine.apply(policy_for([FOO]))
    machine.iptables("-A", "OUTPUT", "-p", "tcp", "-j", "IMDS-GUARD")
    before = machine.rules(4)

    def try_it() -> str:
        try:
            machine.backend().remove()
        except GuardError as error:
            return str(error)
        return "it worked"

    assert "-A OUTPUT -p tcp -j IMDS-GUARD" in machine.call(try_it)
    assert machine.rules(4) == before


def test_udp_lock_leaves_other_ports(machine: Machine) -> None:
    """With every port of both protocols locked, another address stays open."""
    machine.apply(policy_for([FOO], udp=ALL_PORTS))
    assert [machine.send(STRANGER, to) for to in (V4, V6, OTHER)] == ["EPERM", "EPERM", "connected"]
