# SPDX-License-Identifier: Apache-2.0
"""Exported policies: they load, their order is right, and their notes say what the format can't do."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from imds_guard.backends.iptables.parse import combine, parse_chains, parse_family
from imds_guard.backends.iptables.tables import parse_save
from imds_guard.errors import Unsupported, UsageError
from imds_guard.export import FORMATS, export
from imds_guard.kernel.children import run_in_child
from imds_guard.kernel.netns import unshare_network
from imds_guard.kernel.run import Completed, run
from imds_guard.policy.model import Endpoint, Identities, Lock, Mode, Policy, Verdict, make_policy
from imds_guard.policy.ports import ALL_PORTS
from tests.conformance.differential import make_block
from tests.tools import need

NOT_DNS = ((0, 52), (54, 65535))


def lock(
    *where: str,
    name: str = "imds",
    users: Iterable[int] = (),
    groups: Iterable[int] = (),
    deny_users: Iterable[int] = (),
    deny_groups: Iterable[int] = (),
    default: Verdict = Verdict.DENY,
) -> Lock:
    return Lock(
        name,
        tuple(Endpoint(ipaddress.ip_network(one), tcp=NOT_DNS) for one in where),
        Identities(frozenset(users), frozenset(groups)),
        Identities(frozenset(deny_users), frozenset(deny_groups)),
        default,
    )


PLAIN = make_policy([lock("169.254.169.254", "fd00:ec2::254", users=[0, 5])])
GROUPS = make_policy([lock("169.254.169.254", users=[0], groups=[60])])
DENIED_GROUP = make_policy([lock("169.254.169.254", users=[0], deny_groups=[60])])
LENIENT = make_policy([lock("169.254.169.254", deny_users=[1], default=Verdict.ALLOW)])


@pytest.mark.parametrize("form", FORMATS)
def test_no_format_weakens_an_allowlist_of_users(form: str) -> None:
    """Every format denies at least what the policy denies."""
    assert export(PLAIN, form).weakenings == []


# Which formats weaken which policy: nftables and PF see no supplementary groups. Only Linux has user namespaces.
# IPAddressDeny= knows no users.
_WEAK: dict[str, list[str]] = {
    "groups": [],
    "denied-group": ["nftables", "pf"],
    "lenient": ["iptables", "nftables", "systemd"],
}


@pytest.mark.parametrize(
    ("name", "policy"), [("groups", GROUPS), ("denied-group", DENIED_GROUP), ("lenient", LENIENT)], ids=_WEAK
)
def test_weakenings_are_noted_in_the_text(name: str, policy: Policy) -> None:
    """Every weakening and every remark is a comment in the exported text."""
    exported = {form: export(policy, form) for form in FORMATS}
    assert [form for form in FORMATS if exported[form].weakenings] == _WEAK[name]
    for one in exported.values():
        assert all(f"WEAKER: {sentence}" in one.text for sentence in one.weakenings)
        assert all(f"Note: {sentence}" in one.text for sentence in one.remarks)


def test_unknown_format() -> None:
    """An unknown format is refused with the list of formats."""
    with pytest.raises(UsageError, match="'ufw' is not a format: choose one of iptables, nftables"):
        export(PLAIN, "ufw")


@pytest.mark.parametrize("form", FORMATS)
def test_a_backslash_at_the_end_of_a_name_is_not_the_end_of_a_line(form: str) -> None:
    """PF would read the rule in the next line as part of the comment."""
    policy = make_policy([lock("169.254.169.254", name="ends\\", users=[0])])
    assert [line for line in export(policy, form).text.splitlines() if line.endswith("\\")] == []


# --- loadable -------------------------------------------------------------------------------------------------------


def _load(argv: list[str], text: str) -> Completed:
    """Run a loader in a network namespace of its own."""
    if os.geteuid() != 0:
        pytest.skip("loading rules needs root")
    need(argv[0])

    def inside() -> Completed:
        unshare_network([])
        return run(argv, stdin=text)

    return run_in_child(inside, timeout_s=60)


@pytest.mark.parametrize("seed", range(300, 312))
@pytest.mark.parametrize("command", ["iptables-restore", "ip6tables-restore", "iptables-legacy-restore"])
def test_iptables_accepts_it(command: str, seed: int) -> None:
    """iptables-restore and ip6tables-restore accept the same text, for random policies."""
    loaded = _load([command, "--test", "--noflush"], export(make_block(seed, 0).policy, "iptables").text)
    assert (loaded.status, loaded.stderr) == (0, "")


@pytest.mark.parametrize("seed", range(300, 312))
def test_nft_accepts_it(seed: int, tmp_path: Path) -> None:
    """``nft --check`` accepts the text of random policies."""
    file = tmp_path / "rules.nft"
    file.write_text(export(make_block(seed, 0).policy, "nftables").text)
    loaded = _load(["nft", "--check", "-f", str(file)], "")
    assert (loaded.status, loaded.stderr) == (0, "")


@pytest.mark.parametrize("seed", range(300, 312))
def test_iptables_text_is_the_policy(seed: int) -> None:
    """The exported rules read back as the policy that was exported."""
    policy = make_block(seed, 0).policy
    text = export(policy, "iptables").text
    found = []
    for version in (4, 6):
        mine = "\n".join(line[3:] for line in text.splitlines() if line.startswith(f"-{version} "))
        chains, foreign = parse_chains(parse_save(mine))
        assert foreign == []
        found.append(parse_family(chains, version))
    held = combine(found)
    assert held is not None
    assert held.policy == policy


# --- the text of each format ------------------------------------------------------------------------------------


def rules_of(policy: Policy, form: str) -> list[str]:
    return [line for line in export(policy, form).text.splitlines() if line and not line.startswith("#")]


def test_pf() -> None:
    """Denied callers come first, then allowed ones, then everyone. The first rule that matches decides."""
    policy = make_policy([lock("169.254.169.254", users=[5, 6, 7, 9], groups=[60], deny_users=[6])])
    to = "inet proto tcp from any to 169.254.169.254/32 port { 0:52 54:65535 }"
    assert rules_of(policy, "pf") == [
        f"block return out quick {to} user {{ 6 }}",
        f"pass out quick {to} user {{ 5:7 9 }}",
        f"pass out quick {to} group {{ 60 }}",
        f"block return out quick {to}",
    ]


def test_pf_has_the_most_specific_endpoint_first() -> None:
    """An address inside a locked prefix comes before the prefix."""
    policy = make_policy([lock("10.0.0.0/8", name="a"), lock("10.1.2.3", name="b", users=[5])])
    networks = [re.findall(r" to (\S+)", rule)[0] for rule in rules_of(policy, "pf")]
    assert networks == ["10.1.2.3/32", "10.1.2.3/32", "10.0.0.0/8"]


def test_ipfw() -> None:
    """The address selects the lock. An allowed connect skips the rest of our rules."""
    policy = make_policy([lock("169.254.169.254", users=[5], groups=[60])])
    assert rules_of(policy, "ipfw") == [
        "add 100 skipto 200 tcp from any to any dst-ip 169.254.169.254/32 dst-port 0-52,54-65535 out setup",
        "add 101 skipto 9000 ip from any to any",
        "add 200 skipto 9000 ip from any to any { uid 5 }",
        "add 200 skipto 9000 ip from any to any { gid 60 }",
        "add 200 reset tcp from any to any proto ip4",
        "add 200 reset6 tcp from any to any proto ip6",
        "add 200 unreach port udp from any to any proto ip4",
        "add 200 unreach6 port udp from any to any proto ip6",
        "add 9000 count ip from any to any",
    ]


def test_ipfw_splits_long_lists() -> None:
    """No rule has more than 20 IDs, and no ID is lost."""
    users = range(100, 160, 2)
    blocks = [re.findall(r"uid (\d+)", rule) for rule in rules_of(make_policy([lock("10.1.2.3", users=users)]), "ipfw")]
    assert max(map(len, blocks)) <= 20
    assert [int(uid) for block in blocks for uid in block] == list(users)


def test_ipfw_refuses_more_locks_than_rule_numbers() -> None:
    """Two locks never share a rule number."""
    locks = [lock(f"10.{n // 250}.{n % 250}.1", name=f"{n}") for n in range(8801)]
    with pytest.raises(Unsupported, match="8800 locks"):
        export(make_policy(locks), "ipfw")


def test_windows_does_not_block_allowed_users() -> None:
    """The rule blocks Everyone (WD), and a deny entry before that excludes the allowed users."""
    rules = rules_of(make_policy([lock("169.254.169.254", users=[0])]), "windows")
    assert "$principals0 = 'O:LSD:' + (Get-Aces 'D' @('root')) + '(A;;CC;;;WD)'" in rules
    (rule,) = [line for line in rules if line.startswith("New-NetFirewallRule")]
    assert "-Action Block" in rule
    assert "-RemoteAddress '169.254.169.254/32' -Protocol TCP -RemotePort @('0-52', '54-65535')" in rule


def test_windows_quotes_names() -> None:
    """A quote in a lock's name does not end the string."""
    text = export(make_policy([lock("169.254.169.254", name="it's", users=[0])]), "windows").text
    assert "-DisplayName 'imds-guard: it''s'" in text


def test_systemd_denies_everyone() -> None:
    """The drop-in has the addresses of locks that deny by default, and none of a lock that allows by default."""
    policy = make_policy([lock("169.254.169.254", users=[0]), lock("10.1.2.3", name="open", default=Verdict.ALLOW)])
    assert rules_of(policy, "systemd") == ["[Service]", "IPAddressDeny=169.254.169.254/32"]


@pytest.mark.parametrize("form", FORMATS)
def test_audit_denies_nothing(form: str) -> None:
    """In audit mode, no format has an active rule that rejects or blocks."""
    policy = make_policy(PLAIN.locks, Mode.AUDIT)
    for rule in rules_of(policy, form):
        assert not re.search(r"REJECT|\breject\b|\bblock\b|\breset\b|\bunreach|IPAddressDeny|-Enabled True", rule), rule


def test_all_ports_are_not_listed() -> None:
    """A rule for all ports has no list of ports."""
    endpoint = Endpoint(ipaddress.ip_network("10.1.2.3"), tcp=ALL_PORTS, udp=ALL_PORTS)
    policy = make_policy([Lock("x", (endpoint,))])
    assert rules_of(policy, "pf") == [
        f"block return out quick inet proto {protocol} from any to 10.1.2.3/32" for protocol in ("tcp", "udp")
    ]
