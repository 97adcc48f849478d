# SPDX-License-Identifier: Apache-2.0
"""The rules of iptables enforce the policy that they were made from, and parse back to it."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imds_guard.backends.iptables.parse import combine, parse_chains, parse_family
from imds_guard.backends.iptables.render import HEAD, Chains, ResolvedPolicy, digest, lock_comment, render
from imds_guard.backends.iptables.rules import LOG, REJECT, ForeignRule, Rule, id_ranges, parse_rule
from imds_guard.backends.iptables.tables import Anchor, is_first, parse_save, restore_text, rule_texts
from imds_guard.policy.decide import Caller, Destination, decide
from imds_guard.policy.model import Endpoint, Identities, Lock, Mode, Policy, Verdict, make_policy
from imds_guard.policy.ports import ALL_PORTS
from tests.conformance.differential import make_block
from tests.rules.iptables import Filter
from tests.rules.packets import Outcome, Owner, Packet

ANCHOR = Anchor("OUTPUT", HEAD)
IMDS = ipaddress.ip_network("169.254.169.254/32")
IMDS6 = ipaddress.ip_network("fd00:ec2::254/128")


def policy_of(
    users: Sequence[int] = (), *, deny: Sequence[int] = (), mode: Mode = Mode.ENFORCE, name: str = "imds"
) -> Policy:
    endpoints = (Endpoint(IMDS, tcp=ALL_PORTS), Endpoint(IMDS6, tcp=ALL_PORTS))
    lock = Lock(name, endpoints, Identities(frozenset(users)), Identities(frozenset(deny)))
    return make_policy([lock], mode)


def read_back(families: dict[int, Chains]) -> ResolvedPolicy | None:
    found = []
    for version, chains in families.items():
        parsed, foreign = parse_chains(rule_texts(chains))
        assert foreign == []
        assert parsed == chains
        found.append(parse_family(parsed, version))
    return combine(found)


def both(policy: Policy) -> dict[int, Chains]:
    return {version: render(ResolvedPolicy(policy), version) for version in (4, 6)}


def table_of(chains: Chains) -> Filter:
    table = Filter(4)
    table.restore(restore_text(table.texts(), ANCHOR, rule_texts(chains)))
    return table


def connect(table: Filter, owner: Owner | None) -> Outcome:
    return table.judge("OUTPUT", Packet(IMDS.network_address, "tcp", 80, owner=owner))


@pytest.mark.parametrize("seed", range(1, 101))
def test_reads_back(seed: int) -> None:
    """The rules of both IP versions parse back to the policy, without resolved members."""
    policy = make_block(seed, 0).policy
    assert read_back(both(policy)) == ResolvedPolicy(policy)


@pytest.mark.parametrize("default", list(Verdict))
def test_socket_of_the_kernel_is_denied(default: Verdict) -> None:
    """A packet without an owner is denied, whatever the default is."""
    lock = Lock("imds", (Endpoint(IMDS, tcp=ALL_PORTS),), deny=Identities(frozenset({5})), default=default)
    chains = render(ResolvedPolicy(make_policy([lock])), 4)
    assert connect(table_of(chains), None).verdict == REJECT


def test_a_thousand_scattered_users_cost_few_rules() -> None:
    """A packet of one of 1,000 scattered users meets 16 rules on average, at most 23; a stranger's at most 25."""
    users = range(10_000, 13_000, 3)
    table = table_of(render(ResolvedPolicy(policy_of(users)), 4))
    met = [connect(table, Owner(uid, 1)).met for uid in users]
    assert sum(met) / len(met) <= 17
    assert max(met) <= 23
    strangers = [connect(table, Owner(uid + 1, 1)) for uid in users]
    assert {one.verdict for one in strangers} == {REJECT}
    assert max(one.met for one in strangers) <= 25


def test_chains_stay_within_what_nft_takes() -> None:
    """The chains for 20,000 ranges, OUTPUT included, are at most NFT_JUMP_STACK_SIZE (16) levels deep."""
    users = range(0, 60_000, 3)
    chains = render(ResolvedPolicy(policy_of(users, deny=[1])), 4)
    table = table_of(chains)
    assert max(connect(table, Owner(uid, 1)).depth for uid in range(0, 60_000, 7)) <= 16
    assert max(len(name) for name in chains) <= 28


def test_only_a_lone_syn_is_judged() -> None:
    """No rule meets a later packet of a TCP connection: its socket may be closed, and then the packet has no owner."""
    chains = render(ResolvedPolicy(policy_of([5])), 4)
    assert [rule.syn for rule in chains[HEAD]] == [True]
    assert "--tcp-flags FIN,SYN,RST,ACK SYN" in chains[HEAD][0].text()


def test_audit_rejects_nothing() -> None:
    """In audit mode no rule rejects, and a denial is a line in the kernel's log."""
    targets = {
        rule.target for rules in render(ResolvedPolicy(policy_of([5], mode=Mode.AUDIT)), 4).values() for rule in rules
    }
    assert REJECT not in targets
    assert LOG in targets


def test_family_without_endpoints_has_no_rules() -> None:
    """A policy without an IPv6 endpoint leaves ip6tables alone."""
    policy = make_policy([Lock("imds", (Endpoint(IMDS, tcp=ALL_PORTS),))])
    assert render(ResolvedPolicy(policy), 6) == {}
    assert read_back(both(policy) | {6: {}}) == ResolvedPolicy(policy)


def test_members_of_a_group_do_not_become_listed_users() -> None:
    """Resolved members parse back as members, not as listed users."""
    lock = Lock("imds", (Endpoint(IMDS, tcp=ALL_PORTS),), Identities(frozenset({5}), frozenset({60})))
    held = ResolvedPolicy(make_policy([lock]), {("imds", "allow"): frozenset({5, 7, 8}), ("imds", "deny"): frozenset()})
    chains = render(held, 4)
    again = read_back({4: chains})
    assert again is not None
    assert again.policy == held.policy
    assert again.members == {("imds", "allow"): frozenset({7, 8}), ("imds", "deny"): frozenset()}
    assert render(again, 4) == chains
    assert connect(table_of(chains), Owner(7, 1)).verdict == "ACCEPT"
    assert connect(table_of(chains), Owner(9, 1, frozenset({60}))).verdict == REJECT


@pytest.mark.parametrize("name", ["ec2", "a b", "ö\"'\\`$(x)", "%20", "-j ACCEPT", "ü" * 31])
def test_lock_names_survive(name: str) -> None:
    """A name of any characters parses back from the comment unchanged."""
    policy = policy_of([5], name=name)
    assert read_back(both(policy)) == ResolvedPolicy(policy)
    assert len(lock_comment(name)) <= 255
    assert lock_comment(name).isascii()


def test_different_policies_have_different_digests() -> None:
    """Every part of a policy is in its digest."""
    base = policy_of([5])
    lock = base.locks[0]
    others = [
        policy_of([6]),
        policy_of([5], deny=[7]),
        policy_of([5], mode=Mode.AUDIT),
        policy_of([5], name="other"),
        base._replace(containers=Verdict.ALLOW),
        base._replace(locks=(lock._replace(default=Verdict.ALLOW),)),
        base._replace(locks=(lock._replace(allow=Identities(groups=frozenset({5}))),)),
        base._replace(locks=(lock._replace(endpoints=(Endpoint(IMDS, tcp=ALL_PORTS),)),)),
    ]
    assert len({digest(policy) for policy in (base, *others)}) == len(others) + 1


# --- edited rules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chain", "line"),
    [
        ("IMDS-GUARD", "-j RETURN"),
        ("IMDS-GUARD-L0", "-j RETURN"),
        ("IMDS-GUARD-L0", "-m owner --uid-owner 9 -j RETURN"),
        ("IMDS-GUARD-L0", "-m owner --uid-owner 0-4294967294 -j RETURN"),
        ("IMDS-GUARD-T", "-d 169.254.169.254/32 -p tcp -j RETURN"),
        ("IMDS-GUARD-DENY", "-j RETURN"),
    ],
)
def test_an_added_rule_is_noticed(chain: str, line: str) -> None:
    """Rules with one more at the head of a chain differ from those that are rendered for their policy."""
    texts = dict(rule_texts(render(ResolvedPolicy(policy_of([5])), 4)))
    texts[chain] = (line, *texts[chain])
    chains, foreign = parse_chains(texts)
    held = combine([parse_family(chains, 4)])
    assert foreign or held is None or render(held, 4) != chains


def test_every_missing_rule_is_noticed() -> None:
    """Without any one of the rules, the others differ from those that are rendered for their policy."""
    whole = render(ResolvedPolicy(policy_of([5, 7], deny=range(20, 60, 2))), 4)
    for chain, rules in whole.items():
        for position in range(len(rules)):
            less = {**whole, chain: rules[:position] + rules[position + 1 :]}
            held = combine([parse_family(less, 4)])
            assert held is None or render(held, 4) != less, (chain, rules[position])


def test_lists_that_differ_between_ip_versions_become_two_locks() -> None:
    """A command that was killed between the IP versions leaves such rules. They are parsed as they are."""
    one, other = policy_of([5]), policy_of([6])
    held = combine([parse_family(render(ResolvedPolicy(one), 4), 4), parse_family(render(ResolvedPolicy(other), 6), 6)])
    assert held is not None
    for uid, version, allowed in ((5, 4, True), (5, 6, False), (6, 4, False), (6, 6, True)):
        network = IMDS if version == 4 else IMDS6
        decision = decide(held.policy, Caller(uid, 1), Destination(network.network_address, 80))
        assert decision.allowed is allowed


# --- text -------------------------------------------------------------------------------------------------------------

_id_ranges = st.tuples(st.integers(0, 2**32 - 2), st.integers(0, 2**32 - 2)).map(lambda pair: (min(pair), max(pair)))


@given(
    uids=st.none() | _id_ranges,
    gids=st.none() | _id_ranges,
    supplementary=st.booleans(),
    goto=st.booleans(),
    comment=st.text("abc=%0", max_size=9),
)
def test_rule_text_parses(
    uids: tuple[int, int] | None,
    gids: tuple[int, int] | None,
    supplementary: bool,
    goto: bool,
    comment: str,
) -> None:
    """A rule's text parses back to the rule."""
    rule = Rule("X", goto, uids=uids, gids=gids, supplementary=supplementary and gids is not None, comment=comment)
    assert parse_rule(rule.text()) == rule


@pytest.mark.parametrize(
    "text",
    ["-s 1.2.3.4/32 -j RETURN", "-m mark --mark 0x1 -j RETURN", "! -d 1.2.3.4/32 -j RETURN", "-i lo -j RETURN", '-j "'],
)
def test_a_rule_that_we_never_write_is_foreign(text: str) -> None:
    """A rule with another kind of match is not taken for one of ours."""
    with pytest.raises(ForeignRule):
        parse_rule(text)


@given(st.sets(st.integers(0, 300)))
def test_ranges_are_the_ids(ids: set[int]) -> None:
    """Merged ranges have the same IDs, in order, and no range touches the next."""
    ranges = id_ranges(ids)
    assert [number for low, high in ranges for number in range(low, high + 1)] == sorted(ids)
    assert all(one[1] + 1 < other[0] for one, other in zip(ranges, ranges[1:]))


def lines_of(text: str) -> list[str]:
    return text.splitlines()


OTHERS = """\
*filter
:INPUT ACCEPT [0:0]
:OUTPUT DROP [7:8]
:ADMIN - [0:0]
-A OUTPUT -d 169.254.169.254/32 -j ACCEPT
-A OUTPUT -j ADMIN
-A ADMIN -j RETURN
COMMIT
"""


def test_restore_text_names_nothing_of_others() -> None:
    """Only our chains are declared. OUTPUT gets our jump as its first rule and is not declared."""
    chains = rule_texts(render(ResolvedPolicy(policy_of([5])), 4))
    lines = lines_of(restore_text(parse_save(OTHERS), ANCHOR, chains))
    assert lines[0] == "*filter"
    assert lines[-1] == "COMMIT"
    assert [line for line in lines if "OUTPUT" in line] == ["-I OUTPUT 1 -j IMDS-GUARD"]
    assert not any("ADMIN" in line or line.startswith((":INPUT", ":OUTPUT")) for line in lines)


def test_restore_text_moves_the_jump_only_when_it_must() -> None:
    """A jump that is the first rule stays. A later one, or a second one, is deleted before it is inserted first."""
    chains = rule_texts(render(ResolvedPolicy(policy_of([5])), 4))
    first = {"OUTPUT": ("-j IMDS-GUARD", "-j ADMIN"), **chains}
    assert is_first(first, ANCHOR)
    assert not [line for line in lines_of(restore_text(first, ANCHOR, chains)) if "OUTPUT" in line]
    later = {"OUTPUT": ("-j ADMIN", "-j IMDS-GUARD", "-j IMDS-GUARD"), **chains}
    assert not is_first(later, ANCHOR)
    assert [line for line in lines_of(restore_text(later, ANCHOR, chains)) if "OUTPUT" in line] == [
        "-D OUTPUT -j IMDS-GUARD",
        "-D OUTPUT -j IMDS-GUARD",
        "-I OUTPUT 1 -j IMDS-GUARD",
    ]


def test_restore_text_removes_stale_chains() -> None:
    """Chains that the new rules lack are flushed and deleted. Without any rules the jump and all our chains are."""
    old = rule_texts(render(ResolvedPolicy(policy_of(range(0, 60, 2))), 4))
    new = rule_texts(render(ResolvedPolicy(policy_of([5])), 4))
    stale = set(old) - set(new)
    assert stale
    lines = lines_of(restore_text({"OUTPUT": ("-j IMDS-GUARD",), **old}, ANCHOR, new))
    assert {line[3:] for line in lines if line.startswith("-X ")} == stale
    gone = lines_of(restore_text({"OUTPUT": ("-j IMDS-GUARD",), **old}, ANCHOR, {}))
    assert {line[3:] for line in gone if line.startswith("-X ")} == set(old)
    assert "-D OUTPUT -j IMDS-GUARD" in gone
    assert restore_text(parse_save(OTHERS), ANCHOR, {}) == ""
