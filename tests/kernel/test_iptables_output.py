# SPDX-License-Identifier: Apache-2.0
"""The rules in OUTPUT hold against other people's: rules before ours, NAT, flushes. What they don't is named."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from imds_guard.backends.iptables import marks
from imds_guard.backends.iptables.differences import WEAKER
from imds_guard.backends.iptables.form import Form
from imds_guard.backends.iptables.rules import DENIED_MARK
from imds_guard.errors import GuardError
from imds_guard.kernel.credentials import become
from imds_guard.kernel.listeners import family, sockaddr
from imds_guard.kernel.run import run
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.model import Mode
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

REFUSED, CONNECTED = "ECONNREFUSED", "connected"
ALL_FORMS = pytest.mark.parametrize("form", Form)
MARKED = pytest.mark.parametrize("form", [Form.NFT, Form.MANGLE])
VERSIONS = pytest.mark.parametrize("version", [4, 6])


@pytest.fixture(params=sorted(KINDS))
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    """A namespace with listeners, once for each kind of iptables."""
    kind: str = request.param
    if os.geteuid() != 0:
        pytest.skip("making network namespaces needs root")
    need(KINDS[kind][0])
    need("nft")
    with one_legacy_at_a_time(kind), Sandbox((V4, V6, OTHER)) as sandbox:
        sandbox.serve(SERVED, PORTS)
        yield Machine(sandbox, kind, str(tmp_path))


def locked(version: int) -> str:
    return V4 if version == 4 else V6


def redirect(machine: Machine, version: int, to: str = "REDIRECT") -> None:
    """The locked address leads to a proxy of this machine, as the ECS agent and GKE do it."""
    target = ("REDIRECT", "--to-ports", "8080")
    if to == "DNAT":
        target = ("DNAT", "--to-destination", "127.0.0.1:8080" if version == 4 else "[::1]:8080")
    rule = ("-A", "OUTPUT", "-d", locked(version), "-p", "tcp", "--dport", "80", "-j", *target)
    machine.iptables("-t", "nat", *rule, version=version)


def accept_in_front(machine: Machine, version: int, table: str = "filter") -> None:
    machine.iptables("-t", table, "-I", "OUTPUT", "1", "-d", locked(version), "-j", "ACCEPT", version=version)


def outcomes(machine: Machine, version: int) -> tuple[str, str]:
    """Of an allowed caller and of a denied one."""
    return machine.reach(FOO, locked(version)), machine.reach(STRANGER, locked(version))


def left(machine: Machine) -> list[str]:
    """Our names in all rules of the namespace."""
    texts = [machine.rules(version, table) for version in (4, 6) for table in ("filter", "mangle")]
    texts.append(machine.call(lambda: run(["nft", "list", "ruleset"])).stdout)
    return [line for text in texts for line in text.splitlines() if "imds" in line.lower()]


# --- what the lock holds against --------------------------------------------------------------------------------------


@VERSIONS
@MARKED
@pytest.mark.parametrize("to", ["REDIRECT", "DNAT"])
@pytest.mark.parametrize("first", [True, False], ids=["nat-first", "nat-later"])
def test_nat_in_output(machine: Machine, form: Form, version: int, to: str, first: bool) -> None:
    """Who is denied is denied, and who is allowed reaches the proxy."""
    machine.form = form
    if first:
        redirect(machine, version, to)
    machine.apply(policy_for([FOO]))
    if not first:
        redirect(machine, version, to)
    assert outcomes(machine, version) == (CONNECTED, REFUSED)
    assert machine.faults() == []


@VERSIONS
def test_an_accept_in_front(machine: Machine, version: int) -> None:
    """With nft it changes nothing, so it is no fault. With NAT beside it, too."""
    machine.apply(policy_for([FOO]))
    accept_in_front(machine, version)
    assert outcomes(machine, version) == (CONNECTED, REFUSED)
    redirect(machine, version)
    assert outcomes(machine, version) == (CONNECTED, REFUSED)
    assert machine.faults() == []


@VERSIONS
def test_connections_that_are_not_tracked(machine: Machine, version: int) -> None:
    """NOTRACK in front of mangle: our rules ask nothing of conntrack."""
    machine.iptables("-t", "raw", "-A", "OUTPUT", "-j", "NOTRACK", version=version)
    machine.apply(policy_for([FOO]))
    accept_in_front(machine, version)
    assert outcomes(machine, version) == (CONNECTED, REFUSED)


@VERSIONS
@MARKED
def test_marks_of_others_behind_ours(machine: Machine, form: Form, version: int) -> None:
    """A mark that is set or restored for every packet does not meet those that we deny."""
    machine.form = form
    machine.apply(policy_for([FOO]))
    for target in (("MARK", "--set-mark", "0x1"), ("CONNMARK", "--restore-mark")):
        machine.iptables("-t", "mangle", "-A", "OUTPUT", "-j", *target, version=version)
    redirect(machine, version)
    assert outcomes(machine, version) == (CONNECTED, REFUSED)
    assert machine.faults() == []


def test_who_is_let_through_meets_the_rules_of_others_in_every_table(machine: Machine) -> None:
    """RETURN, not ACCEPT: a rule behind ours still counts, and its mark stays as others have set it."""
    machine.apply(policy_for([FOO]))
    machine.iptables("-t", "mangle", "-A", "OUTPUT", "-d", V4, "-p", "tcp", "-j", "MARK", "--set-mark", "0x55")
    machine.iptables(
        "-A", "OUTPUT", "-d", V4, "-p", "tcp", "--dport", "8080", "-m", "mark", "--mark", "0x55", "-j", "REJECT"
    )
    assert machine.reach(FOO, V4, 80) == CONNECTED
    assert machine.reach(FOO, V4, 8080) == REFUSED


def test_datagrams(machine: Machine) -> None:
    machine.apply(policy_for([FOO], udp=ALL_PORTS))
    for version in (4, 6):
        rule = ("-A", "OUTPUT", "-d", locked(version), "-p", "udp", "-j", "REDIRECT", "--to-ports", "8080")
        machine.iptables("-t", "nat", *rule, version=version)
        assert [machine.send(FOO, locked(version)), machine.send(STRANGER, locked(version))] == [CONNECTED, "EPERM"]


@MARKED
def test_a_mark_that_the_caller_sets_itself(machine: Machine, form: Form) -> None:
    """With CAP_NET_ADMIN (SO_MARK in socket(7)): it opens nothing. The mark of a denial denies whoever sets it."""
    machine.form = form
    machine.apply(policy_for([FOO]))

    def as_user(uid: int, mark: int, to: str = V4) -> str:
        def inside() -> str:
            become(gids=(NO_GROUP,) * 3, groups=())
            become(uids=(uid, uid, 0))
            with socket.socket(family(to), socket.SOCK_STREAM) as one:
                become(uids=(0, 0, 0))
                one.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("=I", mark))
                return _connected(one, to)

        return machine.call(inside)

    assert [as_user(STRANGER, mark) for mark in (0x1, 0xFFFFFFFF, DENIED_MARK)] == [REFUSED] * 3
    assert as_user(FOO, 0x1) == CONNECTED
    assert [as_user(FOO, DENIED_MARK, to) for to in (V4, OTHER)] == [REFUSED] * 2


def _connected(one: socket.socket, to: str) -> str:
    one.settimeout(10)
    try:
        one.connect(sockaddr(to, 80))
    except ConnectionRefusedError:
        return REFUSED
    return CONNECTED


# --- flushes ----------------------------------------------------------------------------------------------------------


@VERSIONS
@pytest.mark.parametrize("table", ["filter", "mangle"])
def test_a_flush_of_one_table_opens_nothing_and_is_a_fault(machine: Machine, table: str, version: int) -> None:
    policy = policy_for([FOO])
    machine.apply(policy)
    for arguments in (("-F",), ("-X",)):
        machine.iptables("-t", table, *arguments, version=version)
        assert outcomes(machine, version) == (CONNECTED, REFUSED)
        assert machine.call(lambda: machine.backend().read()) == policy
    assert any(f"IPv{version}: our rules in table {table} are gone" in line for line in machine.faults())
    machine.apply(policy)
    assert machine.faults() == []


def test_a_removed_table_of_nft_is_a_fault(machine: Machine) -> None:
    """Filter still rejects what is marked, but not behind an ACCEPT of others."""
    machine.apply(policy_for([FOO]))
    machine.nft(f"delete table {marks.TABLE}\n")
    redirect(machine, 4)
    assert outcomes(machine, 4) == (CONNECTED, REFUSED)
    assert any("somebody removed the table inet imds-guard-output" in line for line in machine.faults())
    machine.apply(policy_for([FOO]))
    assert machine.faults() == []


def test_a_changed_table_of_nft_is_a_fault(machine: Machine) -> None:
    machine.apply(policy_for([FOO]))
    machine.nft(f"insert rule {marks.TABLE} output accept\n")
    assert any("somebody changed the table inet imds-guard-output" in line for line in machine.faults())
    machine.apply(policy_for([FOO]))
    assert machine.faults() == []
    machine.nft(f"flush table {marks.TABLE}\n")
    assert machine.faults() != []


def test_a_flush_of_everything_is_a_fault(machine: Machine) -> None:
    machine.apply(policy_for([FOO]))
    machine.nft("flush ruleset\n")
    assert machine.faults() != []
    machine.apply(policy_for([FOO]))
    assert machine.faults() == []
    assert outcomes(machine, 4) == (CONNECTED, REFUSED)


def test_a_reload_of_saved_rules(machine: Machine) -> None:
    """Rules that were saved with ours in them and loaded at boot or by a service, as iptables-persistent does."""
    machine.apply(policy_for([FOO]))
    command = machine.commands[0]

    def reload() -> int:
        saved = run([f"{command}-save"]).stdout
        return run([f"{command}-restore"], stdin=saved).status

    assert machine.call(reload) == 0
    assert outcomes(machine, 4) == (CONNECTED, REFUSED)
    assert machine.faults() == []


# --- what can't be closed is named ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [Form.MANGLE, Form.FILTER])
def test_an_accept_in_front_without_nft(machine: Machine, form: Form) -> None:
    machine.form = form
    machine.apply(policy_for([FOO]))
    accept_in_front(machine, 4)
    assert outcomes(machine, 4) == (CONNECTED, CONNECTED)
    assert any("in OUTPUT stand before ours" in line for line in machine.faults())


def test_an_accept_in_front_in_mangle(machine: Machine) -> None:
    """Filter still denies the address. It can't where NAT changes that."""
    machine.apply(policy_for([FOO]))
    accept_in_front(machine, 4, "mangle")
    assert outcomes(machine, 4) == (CONNECTED, REFUSED)
    assert any("in mangle OUTPUT stand before ours" in line for line in machine.faults())
    redirect(machine, 4)
    assert outcomes(machine, 4) == (CONNECTED, CONNECTED)
    machine.apply(policy_for([FOO]))
    assert (outcomes(machine, 4), machine.faults()) == ((CONNECTED, REFUSED), [])


def test_nat_where_marks_do_not_work(machine: Machine) -> None:
    machine.form = Form.FILTER
    redirect(machine, 4)
    warnings = machine.call(lambda: machine.backend().apply(policy_for([FOO]))).warnings
    assert outcomes(machine, 4) == (CONNECTED, CONNECTED)
    assert ["rules in nat OUTPUT act before ours" in line for line in warnings] == [True]
    assert machine.faults() == list(warnings)


STRANGERS: dict[str, tuple[str, int, str]] = {
    "a mark": ("filter", -120, "meta mark set 0x1"),
    "a restored mark": ("filter", -150, "meta mark set ct mark"),
    "an address, before mangle": ("filter", -170, f"ip daddr {V4} ip daddr set 127.0.0.1"),
    "NAT, before mangle": ("nat", -160, f"ip daddr {V4} dnat ip to 127.0.0.1"),
}
HARMLESS: dict[str, tuple[str, int, str]] = {
    "NAT, behind": ("nat", -100, f"ip daddr {V4} dnat ip to 127.0.0.1"),
    "NAT, behind mangle": ("nat", -110, f"ip daddr {V4} dnat ip to 127.0.0.1"),
    "a mark before mangle": ("filter", -300, "meta mark set 0x1"),
    "a mark behind": ("filter", 0, "meta mark set 0x1"),
    "an accept": ("filter", -120, "accept"),
}


def somebodys_table(kind: str, priority: int, rule: str) -> str:
    base = f"type {kind} hook output priority {priority}; policy accept;"
    return f"table inet somebody {{\n\tchain out {{\n\t\t{base}\n\t\t{rule}\n\t}}\n}}\n"


@pytest.mark.parametrize("stranger", STRANGERS)
def test_chains_of_others_that_act_before_ours_are_named(machine: Machine, stranger: str) -> None:
    """By start, too, which can do nothing about them."""
    machine.nft(somebodys_table(*STRANGERS[stranger]))
    warnings = machine.call(lambda: machine.backend().apply(policy_for([FOO]))).warnings
    assert ["somebody's table inet somebody" in line for line in warnings] == [True]
    assert machine.faults() == list(warnings)


@pytest.mark.parametrize("stranger", HARMLESS)
def test_other_chains_are_no_fault_and_open_nothing(machine: Machine, stranger: str) -> None:
    machine.nft(somebodys_table(*HARMLESS[stranger]))
    machine.apply(policy_for([FOO]))
    assert outcomes(machine, 4) == (CONNECTED, REFUSED)
    assert machine.faults() == []


def test_lesser_forms_are_noted(machine: Machine) -> None:
    policy = policy_for([FOO])
    for form in Form:
        machine.form = form
        machine.apply(policy)
        noted = machine.call(lambda: machine.backend().notes(policy))
        assert [text for text in WEAKER.values() if f"iptables: {text}" in noted] == [
            text for one, text in WEAKER.items() if one is form
        ]


# --- from one form to another -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", Form)
@pytest.mark.parametrize("before", Form)
def test_from_one_form_to_another(machine: Machine, before: Form, after: Form) -> None:
    """As when nft is installed or removed, and from a version that knew filter alone."""
    machine.form = before
    machine.apply(policy_for([FOO]))
    machine.form = after
    machine.apply(policy_for([BAR], [STAFF]))
    assert machine.faults() == []
    assert machine.call(lambda: machine.backend().read()) == policy_for([BAR], [STAFF])
    assert [machine.reach(uid) for uid in (FOO, BAR, STRANGER)] == [REFUSED, CONNECTED, REFUSED]
    machine.call(lambda: machine.backend().remove())
    assert left(machine) == []
    assert machine.faults() == []


@ALL_FORMS
def test_audit_writes_one_line_and_rejects_nothing(machine: Machine, form: Form) -> None:
    machine.form = form
    machine.apply(policy_for([FOO]))
    machine.apply(policy_for([FOO], mode=Mode.AUDIT))
    assert [machine.reach(FOO), machine.reach(STRANGER)] == [CONNECTED] * 2
    saved = machine.call(lambda: run([f"{machine.commands[0]}-save", "-c"])).stdout
    assert [line.split(" ")[0][:3] for line in saved.splitlines() if "-j LOG" in line] == ["[1:"]
    assert machine.faults() == []
    machine.apply(policy_for([FOO]))
    assert [machine.reach(FOO), machine.reach(STRANGER)] == [CONNECTED, REFUSED]


@ALL_FORMS
@pytest.mark.parametrize("old", [None, policy_for([FOO])], ids=["first", "change"])
def test_a_failure_of_nft_leaves_everything_as_it_was(
    machine: Machine, form: Form, old: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.form = form
    if old is not None:
        machine.apply(policy_for([FOO]))
    before = left(machine)

    def failing(*_: object) -> str:
        raise GuardError("nft failed")

    machine.form = Form.NFT
    monkeypatch.setattr(marks, "put", failing)
    with pytest.raises(GuardError, match="nft failed"):
        machine.apply(policy_for([BAR]))
    assert left(machine) == before
    assert machine.faults() == []
