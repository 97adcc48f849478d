# SPDX-License-Identifier: Apache-2.0
"""A policy for PF (OpenBSD, FreeBSD, macOS) and for FreeBSD's IPFW.

Sources: pf.conf(5), "user" and "group": the effective IDs of who opened the socket, group_info not included. ipfw(8),
"uid" and "gid"; O_GID in FreeBSD sys/netpfil/ipfw/ip_fw2.c asks groupmember(), which knows all groups.
"""

from __future__ import annotations

from collections.abc import Iterable

from imds_guard.errors import Unsupported
from imds_guard.export.words import Exported, entries, id_words, note_containers, note_primary_groups, port_words
from imds_guard.policy.model import Endpoint, Lock, Mode, Policy, Protocol, Verdict
from imds_guard.policy.ports import ALL_PORTS


def pf(policy: Policy) -> Exported:
    """Rules for an anchor: the first that matches decides."""
    exported = Exported()
    note_containers(policy, exported)
    note_primary_groups(policy.locks, exported, "PF")
    exported.remarks.append('an allowed connect matches "pass quick", so no later rule of yours is asked')
    if any(lock.default is Verdict.ALLOW for lock in policy.locks):
        exported.remarks.append("a lock that allows by default also passes sockets of the kernel itself")
    lines = exported.comments('Load with: pfctl -a imds-guard -f FILE; and have in pf.conf: anchor "imds-guard" out')
    for _, lock, endpoint in entries(policy):
        for protocol in Protocol:
            if endpoint.ports(protocol):
                lines += [f"# {lock.name}", *_pf_lock(lock, _pf_match(endpoint, protocol), policy.mode)]
    exported.text = "\n".join([*lines, ""])
    return exported


def _pf_match(endpoint: Endpoint, protocol: Protocol) -> str:
    network = endpoint.network
    family = "inet" if network.version == 4 else "inet6"
    ports = port_words(endpoint.ports(protocol), ":")
    port = f" port {{ {' '.join(ports)} }}" if ports else ""
    return f"{family} proto {protocol.value} from any to {network}{port}"


def _pf_lock(lock: Lock, match: str, mode: Mode) -> list[str]:
    deny = "pass out log quick" if mode is Mode.AUDIT else "block return out quick"
    rules: list[str] = []
    for verdict, identities in ((deny, lock.deny), ("pass out quick", lock.allow)):
        for word, ids in (("user", identities.users), ("group", identities.groups)):
            if ids:
                rules.append(f"{verdict} {match} {word} {{ {' '.join(id_words(ids, ':'))} }}")
    rest = deny if lock.default is Verdict.DENY else "pass out quick"
    return [*rules, f"{rest} {match}"]


# --- IPFW -----------------------------------------------------------------------------------------------------------

FIRST_RULE = 100
FIRST_LOCK = 200
BEHIND = 9_000
IDS_IN_A_RULE = 20
"""An or-block of so many; a rule has room for 255 words (IPFW_RULE_CMD_MAX in FreeBSD sys/netinet/ip_fw.h)."""


def ipfw(policy: Policy) -> Exported:
    """Rules 100 to 9000. A connect that is allowed goes on behind them, to whatever rules there are."""
    if FIRST_LOCK + len(policy.locks) > BEHIND:
        raise Unsupported(
            f"ipfw has numbers for {BEHIND - FIRST_LOCK} locks here, and the policy has {len(policy.locks)}"
        )
    exported = Exported()
    note_containers(policy, exported)
    if any(lock.default is Verdict.ALLOW for lock in policy.locks):
        exported.remarks.append("a lock that allows by default also passes sockets of the kernel itself")
    lines = exported.comments(f"Load with: ipfw -q FILE. Rules {FIRST_RULE} to {BEHIND} must be free.")
    for number, _, endpoint in entries(policy):
        lines += [
            f"add {FIRST_RULE} skipto {FIRST_LOCK + number} {match}"
            for protocol in Protocol
            if endpoint.ports(protocol)
            for match in [_ipfw_match(endpoint, protocol)]
        ]
    lines.append(f"add {FIRST_RULE + 1} skipto {BEHIND} ip from any to any")
    for number, lock in enumerate(policy.locks):
        lines += [f"# {lock.name}", *(f"add {FIRST_LOCK + number} {rule}" for rule in _ipfw_lock(lock, policy.mode))]
    exported.text = "\n".join([*lines, f"add {BEHIND} count ip from any to any", ""])
    return exported


def _ipfw_match(endpoint: Endpoint, protocol: Protocol) -> str:
    ports = endpoint.ports(protocol)
    port = "" if ports == ALL_PORTS else " dst-port " + ",".join(port_words(ports, "-"))
    setup = " setup" if protocol is Protocol.TCP else ""
    family = "dst-ip" if endpoint.network.version == 4 else "dst-ip6"
    return f"{protocol.value} from any to any {family} {endpoint.network}{port} out{setup}"


def _ipfw_lock(lock: Lock, mode: Mode) -> list[str]:
    behind = [f"skipto {BEHIND} ip from any to any"]
    rules: list[str] = []
    for kinds, identities in ((_ipfw_denial(mode), lock.deny), (behind, lock.allow)):
        for word, ids in (("uid", identities.users), ("gid", identities.groups)):
            rules += [f"{kind} {block}" for block in _or_blocks(word, ids) for kind in kinds]
    return rules + (_ipfw_denial(mode) if lock.default is Verdict.DENY else behind)


def _or_blocks(word: str, ids: Iterable[int]) -> list[str]:
    ordered = sorted(ids)
    parts = [ordered[low : low + IDS_IN_A_RULE] for low in range(0, len(ordered), IDS_IN_A_RULE)]
    return ["{ " + " or ".join(f"{word} {number}" for number in part) + " }" for part in parts]


def _ipfw_denial(mode: Mode) -> list[str]:
    if mode is Mode.AUDIT:
        return ["count log ip from any to any", f"skipto {BEHIND} ip from any to any"]
    return [
        "reset tcp from any to any proto ip4",
        "reset6 tcp from any to any proto ip6",
        "unreach port udp from any to any proto ip4",
        "unreach6 port udp from any to any proto ip6",
    ]
