# SPDX-License-Identifier: Apache-2.0
"""A policy for iptables-restore and ip6tables-restore, and for nft."""

from __future__ import annotations

from collections.abc import Iterable

from imds_guard.backends.iptables.render import HEAD, ResolvedPolicy, render
from imds_guard.export.exported import Exported, note_containers, note_primary_groups, note_user_namespaces
from imds_guard.export.rules import by_specificity, format_ids, format_ports, heading
from imds_guard.policy.model import Identities, Lock, Mode, Policy, Protocol, Verdict


def iptables(policy: Policy) -> Exported:
    """One file for both commands: ip6tables-restore skips a rule that begins with -4, iptables-restore one with -6.

    Source: iptables(8), "-4, --ipv4".
    """
    exported = Exported()
    note_containers(policy, exported)
    note_user_namespaces(policy, exported)
    if any(lock.listed_groups for lock in policy.locks):
        exported.remarks.append(
            "a kernel without --suppl-groups stores the option and ignores it: test it before you rely on it"
        )
    exported.remarks.append("the rules check who opened the socket, and only in this network namespace")
    families = {version: render(ResolvedPolicy(policy), version) for version in (4, 6)}
    chains: dict[str, None] = dict.fromkeys([HEAD, *families[4], *families[6]])
    lines = exported.comments("Load with: iptables-restore --noflush < FILE && ip6tables-restore --noflush < FILE")
    lines += ["*filter", *(f":{chain} - [0:0]" for chain in chains), f"-I OUTPUT 1 -j {HEAD}"]
    for version, family in families.items():
        lines += [f"-{version} -A {chain} {rule.text()}" for chain, rules in family.items() for rule in rules]
    exported.text = "\n".join([*lines, "COMMIT", ""])
    return exported


# --- nft ------------------------------------------------------------------------------------------------------------

TABLE = "inet imds_guard"


def nftables(policy: Policy) -> Exported:
    """A table of its own. Loading it again replaces it in one step."""
    exported = Exported()
    note_containers(policy, exported)
    note_user_namespaces(policy, exported)
    note_primary_groups(policy.locks, exported, "nftables")
    exported.remarks.append("the rules check who opened the socket, and only in this network namespace")
    lines = exported.comments("Load with: nft -f FILE")
    # Deleting a table that does not exist is an error, so the first line creates it.
    lines += [f"table {TABLE}", f"delete table {TABLE}", f"table {TABLE} {{"]
    lines += _chain("deny", _denial(policy.mode))
    for number, lock in enumerate(policy.locks):
        lines += _chain(f"lock_{number}", _lock(lock))
    lines += _chain("find_tcp", _find(policy, Protocol.TCP)) + _chain("find_udp", _find(policy, Protocol.UDP))
    lines += _chain(
        "output",
        [
            "type filter hook output priority filter; policy accept;",
            "tcp flags & (fin | syn | rst | ack) == syn jump find_tcp",
            "meta l4proto udp jump find_udp",
        ],
    )
    exported.text = "\n".join([*lines, "}", ""])
    return exported


def _chain(name: str, rules: Iterable[str]) -> list[str]:
    return [f"\tchain {name} {{", *(f"\t\t{rule}" for rule in rules), "\t}"]


def _denial(mode: Mode) -> list[str]:
    if mode is Mode.AUDIT:
        return ['log prefix "imds-guard would deny: " flags skuid']
    return ["meta l4proto tcp reject with tcp reset", "reject with icmpx port-unreachable"]


def _lock(lock: Lock) -> list[str]:
    rules = [heading(lock)]
    rules += [f"{match} goto deny" for match in _matches(lock.deny)]
    rules += [f"{match} return" for match in _matches(lock.allow)]
    if lock.default is Verdict.ALLOW:
        # A socket of the kernel itself has no user ID and does not match.
        rules.append("meta skuid 0-4294967294 return")
    return [*rules, "goto deny"]


def _matches(identities: Identities) -> list[str]:
    pairs = (("skuid", identities.users), ("skgid", identities.groups))
    return [f"meta {key} {{ {', '.join(format_ids(ids, '-'))} }}" for key, ids in pairs if ids]


def _find(policy: Policy, protocol: Protocol) -> list[str]:
    rules: list[str] = []
    for number, _, endpoint in by_specificity(policy):
        if not endpoint.ports(protocol):
            continue
        family = "ip" if endpoint.network.version == 4 else "ip6"
        nfproto = "ipv4" if endpoint.network.version == 4 else "ipv6"
        where = f"{family} daddr {endpoint.network}" if endpoint.network.prefixlen else f"meta nfproto {nfproto}"
        ports = ", ".join(format_ports(endpoint.ports(protocol), "-"))
        port = f" {protocol.value} dport {{ {ports} }}" if ports else ""
        rules.append(f"{where}{port} goto lock_{number}")
    return rules
