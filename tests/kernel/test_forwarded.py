# SPDX-License-Identifier: Apache-2.0
"""A machine that routes forwards nothing to a locked endpoint, whatever its neighbours do with their rules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from imds_guard.backends import Change
from imds_guard.backends.forwarded import Count, Forwarded, Forwarding, ForwardingState
from imds_guard.backends.forwarded.state import forwarding_is_on
from imds_guard.errors import Unsupported, UsageError
from imds_guard.kernel import conntrack, nft
from imds_guard.kernel.run import run
from imds_guard.policy.model import Mode, Protocol, Verdict, make_policy
from tests.kernel.routed import WAYS, Routed, routed_machines
from tests.kernel.rules_in_a_sandbox import FOO, KINDS, STRANGER, V4, V6, policy_for

NOT_DNS = ((0, 52), (54, 65535))
POLICY = policy_for([FOO], tcp=NOT_DNS, udp=((80, 80),))
BOTH = ["connected"] * 2


@pytest.fixture(params=WAYS)
def routed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Routed]:
    """The three machines, once for each way to write rules."""
    with routed_machines(request.param, str(tmp_path)) as machines:
        yield machines


@pytest.fixture
def by_nft(tmp_path: Path) -> Iterator[Routed]:
    """The three machines, with rules of nft."""
    with routed_machines("nft", str(tmp_path)) as machines:
        yield machines


@pytest.mark.parametrize("tracked", [False, True])
def test_nothing_is_forwarded_to_a_locked_port(routed: Routed, tracked: bool) -> None:
    """TCP and UDP over both IP versions. DNS at the same address works."""
    if tracked:
        routed.track()
    assert routed.reach_both() == BOTH
    assert routed.echo_both() == ["answered"] * 2
    routed.enforce(POLICY)
    assert routed.reach_both() == [routed.refusal] * 2
    assert routed.echo_both() == [_UDP_REFUSAL[routed.way]] * 2
    assert routed.reach_both(53) == BOTH
    assert routed.echo_both(53) == ["answered"] * 2
    assert routed.faults(POLICY) == []


_UDP_REFUSAL = {"nft": "ConnectionRefusedError"} | dict.fromkeys(("iptables-nft", "iptables-legacy"), "TimeoutError")


@pytest.mark.parametrize("tracked", [False, True])
def test_a_load_balancers_probe_is_answered(routed: Routed, tracked: bool) -> None:
    """It comes from a locked address, and the answers go to a port of it that is locked."""
    if tracked:
        routed.track()
    routed.enforce(POLICY)
    assert [routed.probe(version) for version in (4, 6)] == ["alive"] * 2


def test_conntrack_is_not_switched_on(routed: Routed) -> None:
    """Where nobody uses it, the rules don't either. Where it is used, they do, for that IP version alone."""

    def tracking() -> list[bool]:
        return [conntrack.tracks(version) for version in (4, 6)]

    routed.enforce(POLICY)
    assert (routed.on_router(tracking), routed.describe(POLICY).tracked) == ([False, False], ())
    routed.command(
        "nft", "-f", "-", stdin="table ip6 o { chain f { type filter hook forward priority 9; ct mark 0; }; }"
    )
    routed.enforce(POLICY)
    assert (routed.on_router(tracking), routed.describe(POLICY).tracked) == ([False, True], (6,))


def test_the_routers_own_packets_are_left_alone(routed: Routed) -> None:
    """A process of the router itself is judged by the backend only."""
    routed.enforce(POLICY)
    assert [routed.reach(to, of="router") for to in (V4, V6)] == BOTH


def test_remove_leaves_nothing(routed: Routed) -> None:
    """remove() removes the rules of both IP versions, and is harmless when there are none."""
    before = routed.command("nft", "list", "tables")
    routed.enforce(POLICY)
    assert routed.on_router(lambda: routed.rules().in_force()) is True
    assert len(routed.on_router(lambda: routed.rules().remove()).done) == 2
    assert routed.reach_both() == BOTH
    assert routed.on_router(lambda: routed.rules().in_force()) is False
    assert routed.on_router(lambda: routed.rules().remove()) == Change()
    assert routed.faults(None) == []
    assert routed.way != "nft" or routed.command("nft", "list", "tables") == before


def test_rules_without_a_policy_are_a_fault(routed: Routed) -> None:
    """Rules for forwarded packets are a fault when no policy is in force."""
    routed.enforce(POLICY)
    assert len(routed.faults(None)) == 1


# --- neighbours -----------------------------------------------------------------------------------------------------


def _docker(routed: Routed) -> None:
    """What dockerd 26 writes at its start, then at ``docker network create``. The client is a container."""
    for chain in ("DOCKER", "DOCKER-USER", "DOCKER-FORWARD"):
        routed.iptables("-N", chain)
    routed.iptables("-I", "FORWARD", "-j", "DOCKER-FORWARD")
    routed.iptables("-I", "FORWARD", "-j", "DOCKER-USER")
    routed.iptables("-P", "FORWARD", "DROP")
    established = ("-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", "-j", "ACCEPT")
    routed.iptables("-A", "DOCKER-FORWARD", "-o", "to-client", *established)
    routed.iptables("-A", "DOCKER-FORWARD", "-i", "to-client", "-j", "ACCEPT")
    routed.iptables("-I", "FORWARD", "-i", "to-client", "!", "-o", "to-client", "-j", "ACCEPT")
    routed.iptables("-A", "DOCKER-FORWARD", "-o", "to-client", "-p", "tcp", "--dport", "8080", "-j", "ACCEPT")


def _firewalld(routed: Routed) -> None:
    """firewalld with nftables removes and makes its own table at each reload."""
    chain = "chain filter_FORWARD { type filter hook forward priority filter + 10; policy accept; accept; }"
    text = f"table inet firewalld\ndelete table inet firewalld\ntable inet firewalld {{ {chain}; }}\n"
    routed.command("nft", "-f", "-", stdin=text)
    routed.command("nft", "-f", "-", stdin=text)


def _ufw(routed: Routed) -> None:
    """``ufw reload`` restores table filter, and what stands in FORWARD then comes from its files."""
    rules = "*filter\n:ufw-before-forward - [0:0]\n-A ufw-before-forward -j ACCEPT\n-I FORWARD -j ufw-before-forward\n"
    for command in KINDS[routed.kind]:
        routed.command(f"{command}-restore", stdin=f"{rules}COMMIT\n")
        routed.command(f"{command}-restore", "-n", stdin="*filter\n-F ufw-before-forward\nCOMMIT\n")


def _accept_first(routed: Routed) -> None:
    routed.iptables("-I", "FORWARD", "-j", "ACCEPT")


def _flush_filter(routed: Routed) -> None:
    routed.iptables("-F")
    routed.iptables("-X")


NEIGHBOURS: dict[str, Callable[[Routed], None]] = {
    "dockerd": _docker,
    "firewalld": _firewalld,
    "ufw": _ufw,
    "an ACCEPT at the head": _accept_first,
    "iptables -F": _flush_filter,
}


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_rules_hold_whatever_a_neighbour_writes_later(routed: Routed, neighbour: str) -> None:
    """The lock, and the answers to a probe."""
    routed.enforce(POLICY)
    NEIGHBOURS[neighbour](routed)
    assert routed.reach_both() == [routed.refusal] * 2
    assert routed.reach_both(53) == BOTH
    assert [routed.probe(version) for version in (4, 6)] == ["alive"] * 2
    assert routed.faults(POLICY) == []


def test_nft_flush_ruleset_is_a_fault(by_nft: Routed) -> None:
    """change() puts the rules back, and so does enforce()."""
    by_nft.enforce(POLICY)
    for repair in (lambda: by_nft.rules().change(POLICY), lambda: by_nft.rules().enforce(POLICY, None)):
        by_nft.command("nft", "flush", "ruleset")
        assert by_nft.reach_both() == BOTH
        (fault,) = by_nft.faults(POLICY)
        assert "somebody removed the table ip imds-guard-forward and ip6 imds-guard-forward" in fault
        assert by_nft.describe(POLICY).is_open
        by_nft.on_router(repair)
        assert by_nft.faults(POLICY) == []
        assert by_nft.reach_both() == [by_nft.refusal] * 2


@pytest.mark.parametrize(
    "change", ["flush table ip6 imds-guard-forward", "insert rule ip imds-guard-forward find accept"]
)
def test_a_change_of_our_tables_is_a_fault(by_nft: Routed, change: str) -> None:
    """Rules that somebody removed, and one that he put in front."""
    by_nft.enforce(POLICY)
    by_nft.command("nft", *change.split())
    assert ["somebody changed" in fault for fault in by_nft.faults(POLICY)] == [True]
    by_nft.on_router(lambda: by_nft.rules().change(POLICY))
    assert by_nft.faults(POLICY) == []


@pytest.mark.parametrize("way", ["iptables-nft", "iptables-legacy"])
def test_a_change_of_table_mangle_is_a_fault(way: str, tmp_path: Path) -> None:
    """A flush, an ACCEPT in front, and a rule of ours that is gone."""
    with routed_machines(way, str(tmp_path)) as routed:
        for arguments, said in (
            (("-F", "FORWARD"), "leads to IMDS-FORWARD"),
            (("-I", "FORWARD", "-j", "ACCEPT"), "stand before ours"),
            (("-D", "IMDS-FORWARD-E", "1"), "somebody changed"),
        ):
            routed.enforce(POLICY)
            assert routed.faults(POLICY) == []
            routed.iptables("-t", "mangle", *arguments)
            assert any(said in fault for fault in routed.faults(POLICY)), (arguments, routed.faults(POLICY))
            routed.on_router(lambda: routed.rules().change(POLICY))
            assert routed.faults(POLICY) == []
            assert routed.reach_both() == [routed.refusal] * 2


# --- what was asked for ---------------------------------------------------------------------------------------------


def test_leave_is_remembered(routed: Routed) -> None:
    """With "leave" packets are forwarded, also after a change of the policy, and that is no fault."""
    routed.enforce(POLICY)
    routed.enforce(POLICY, "leave")
    routed.on_router(lambda: routed.rules().change(policy_for([STRANGER])))
    assert routed.reach_both() == BOTH
    assert routed.describe(POLICY) == ForwardingState(Forwarding.LEFT, why="--forwarded leave")


def test_audit_mode_counts_and_forwards_everything(routed: Routed) -> None:
    """Connections, datagrams and answers, all of them."""
    policy = policy_for([FOO], tcp=NOT_DNS, udp=((80, 80),), mode=Mode.AUDIT)
    routed.enforce(policy, "drop")
    assert routed.reach_both() == BOTH
    assert routed.echo_both() == ["answered"] * 2
    found = routed.describe(policy)
    assert (found.forwarding, found.faults) == (Forwarding.COUNTED, ())
    seen = {(one.lock, one.version, one.protocol) for one in found.counts.rejected}
    assert seen == {("imds", version, protocol) for version in (4, 6) for protocol in Protocol}


def test_counters_tell_lock_version_and_protocol(routed: Routed) -> None:
    """What passes is not counted."""
    routed.enforce(POLICY)
    assert routed.describe(POLICY).counts.rejected == ()
    assert (routed.reach(V4, 53), routed.echo(V6)) == ("connected", _UDP_REFUSAL[routed.way])
    found = routed.describe(POLICY)
    assert found.counts.rejected == (Count("imds", 6, Protocol.UDP, 1),)
    assert found.forwarding is (Forwarding.REJECTED if routed.way == "nft" else Forwarding.DROPPED)


def test_counters_outlive_a_change_that_changes_no_rule(routed: Routed) -> None:
    """``allow`` for one user more: who may connect is in none of the rules."""
    routed.enforce(POLICY)
    routed.echo(V4)
    more = policy_for([FOO, STRANGER], tcp=NOT_DNS, udp=((80, 80),))
    routed.on_router(lambda: routed.rules().change(more))
    assert [one.packets for one in routed.describe(more).counts.rejected] == [1]


def test_containers_that_may_connect_are_not_undone(routed: Routed) -> None:
    """With containers = "allow", "drop" is refused, and without an option nothing is rejected any more."""
    policy = make_policy(POLICY.locks, containers=Verdict.ALLOW)
    routed.enforce(POLICY)

    def refused() -> bool:
        try:
            routed.rules().check(policy, "drop")
        except UsageError:
            return True
        return False

    assert routed.on_router(refused)
    change = routed.enforce(policy)
    assert any("left alone" in line for line in change.done)
    assert routed.reach_both() == BOTH
    assert routed.describe(policy) == ForwardingState(Forwarding.LEFT, why='containers = "allow"')


# --- programs -------------------------------------------------------------------------------------------------------


def test_without_nft_packets_are_dropped_and_start_says_so(by_nft: Routed) -> None:
    """iptables takes over; when nft is there again, its rules take the place of those of iptables."""

    def without_nft() -> Change:
        rules = by_nft.rules()
        nft.NFT = "nft-of-nobody"
        return rules.enforce(POLICY, None)

    by_nft.writers = ("nft", "iptables")
    (said,) = by_nft.on_router(without_nft).done
    assert "dropped" in said
    assert "install the package" in said
    assert by_nft.describe(POLICY).by == "iptables"
    assert by_nft.reach(V4).startswith("TimeoutError")
    by_nft.enforce(POLICY)
    assert by_nft.describe(POLICY).by == "nft"
    assert "IMDS-FORWARD" not in by_nft.iptables("-t", "mangle", "-S")
    assert by_nft.reach_both() == [by_nft.refusal] * 2


def test_without_both_programs_a_warning_and_a_fault(by_nft: Routed, tmp_path: Path) -> None:
    """On a machine that forwards. On another one nothing is said. An explicit "drop" is refused."""
    rules = Forwarded(("iptables-of-nobody", "ip6tables-of-nobody"), state_folder=str(tmp_path / "none"))

    def enforced() -> tuple[Change, ForwardingState, bool]:
        nft.NFT = "nft-of-nobody"
        try:
            rules.check(POLICY, "drop")
            refused = False
        except Unsupported:
            refused = True
        return rules.enforce(POLICY, None), rules.describe(POLICY), refused

    change, found, refused = by_nft.on_router(enforced)
    assert [line.count("install the package") for line in change.warnings] == [2]
    assert (found.forwarding, len(found.faults), refused) == (Forwarding.OPEN, 1, True)
    assert by_nft.boxes["client"].call(enforced) == (Change(), ForwardingState(Forwarding.OPEN), True)


def test_the_rules_of_an_earlier_version_are_removed(routed: Routed) -> None:
    """imds-guard 0.1.0 had them at the head of filter FORWARD."""
    for chain in ("IMDS-FORWARD", "IMDS-FORWARD-DENY"):
        routed.iptables("-N", chain)
    routed.iptables("-A", "IMDS-FORWARD-DENY", "-j", "REJECT")
    routed.iptables("-A", "IMDS-FORWARD", "-p", "tcp", "-g", "IMDS-FORWARD-DENY")
    routed.iptables("-I", "FORWARD", "1", "-j", "IMDS-FORWARD")
    routed.on_router(lambda: routed.rules().state_file.write("drop"))
    assert len(routed.faults(POLICY)) == 1
    routed.enforce(POLICY)
    assert "IMDS" not in routed.iptables("-S")
    assert routed.faults(POLICY) == []
    assert routed.reach_both() == [routed.refusal] * 2


def test_rules_are_written_before_the_machine_forwards(routed: Routed) -> None:
    """Docker switches forwarding on later. The router routes; the client does not."""
    assert routed.on_router(forwarding_is_on) is True
    assert routed.boxes["client"].call(forwarding_is_on) is False

    def rules() -> tuple[bool, list[str]]:
        client = routed.rules()
        client.enforce(POLICY, None)
        return client.in_force(), client.faults(POLICY)

    assert routed.boxes["client"].call(rules) == (True, [])


def test_a_command_that_was_ended_in_the_middle_is_a_fault(routed: Routed) -> None:
    """The record says that rules should be in force, and not which: the next start writes them."""
    routed.on_router(lambda: routed.rules().state_file.write("drop"))
    assert ["start again" in fault for fault in routed.faults(POLICY)] == [True]
    routed.on_router(lambda: routed.rules().change(POLICY))
    assert routed.faults(POLICY) == []


def test_ruleset_of_nft_can_be_loaded_again(by_nft: Routed) -> None:
    """``nft list ruleset > FILE; nft -f FILE``, as admins do: the same rules, and no fault."""
    by_nft.enforce(POLICY)
    text = by_nft.command("nft", "list", "ruleset")
    by_nft.on_router(lambda: run(["nft", "flush", "ruleset"]))
    by_nft.command("nft", "-f", "-", stdin=text)
    assert by_nft.faults(POLICY) == []
