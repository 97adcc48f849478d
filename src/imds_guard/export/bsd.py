# SPDX-License-Identifier: Apache-2.0
"""A policy for PF (OpenBSD, FreeBSD, macOS) and for FreeBSD's IPFW.

PF knows the effective user and group ID with which the socket was opened, and no supplementary groups. IPFW knows
all groups. Sources: pf.conf(5), "user" and "group"; ipfw(8), "uid" and "gid", and O_GID in FreeBSD
sys/netpfil/ipfw/ip_fw2.c, which calls groupmember().
"""

from __future__ import annotations

from collections.abc import Iterable

from imds_guard.errors import Unsupported
from imds_guard.export.exported import Exported, note_containers, note_default_allow, note_primary_groups
from imds_guard.export.rules import by_specificity, format_ids, format_ports, heading
from imds_guard.policy.model import Endpoint, Lock, Mode, Policy, Protocol, Verdict
from imds_guard.policy.ports import ALL_PORTS


def pf(policy: Policy) -> Exported:
    """Rules for an anchor; the first that matches decides."""
    exported = Exported()
    note_containers(policy, exported)
    note_primary_groups(policy.locks, exported, "PF")
    exported.remarks.append('an allowed connect matches "pass quick", so your later rules do not see it')
    note_default_allow(policy, exported)
    lines = exported.comments('Load with: pfctl -a imds-guard -f FILE; pf.conf needs the line: anchor "imds-guard" out')
    for _, lock, endpoint in by_specificity(policy):
        for protocol in Protocol:
            if endpoint.ports(protocol):
                lines += [heading(lock), *_pf_lock(lock, _pf_match(endpoint, protocol), policy.mode)]
    exported.text = "\n".join([*lines, ""])
    return exported


def _pf_match(endpoint: Endpoint, protocol: Protocol) -> str:
    network = endpoint.network
    family = "inet" if network.version == 4 else "inet6"
    ports = format_ports(endpoint.ports(protocol), ":")
    port = f" port {{ {' '.join(ports)} }}" if ports else ""
    return f"{family} proto {protocol.value} from any to {network}{port}"


def _pf_lock(lock: Lock, match: str, mode: Mode) -> list[str]:
    deny = "pass out log quick" if mode is Mode.AUDIT else "block return out quick"
    rules: list[str] = []
    for verdict, identities in ((deny, lock.deny), ("pass out quick", lock.allow)):
        for keyword, ids in (("user", identities.users), ("group", identities.groups)):
            if ids:
                rules.append(f"{verdict} {match} {keyword} {{ {' '.join(format_ids(ids, ':'))} }}")
    rest = deny if lock.default is Verdict.DENY else "pass out quick"
    return [*rules, f"{rest} {match}"]


# --- IPFW -----------------------------------------------------------------------------------------------------------

FIRST_RULE = 100
FIRST_LOCK = 200
LAST_RULE = 9_000
IDS_PER_RULE = 20
"""A rule has at most 255 32-bit words (IPFW_RULE_CMD_MAX in FreeBSD sys/netinet/ip_fw.h)."""


def ipfw(policy: Policy) -> Exported:
    """Rules 100 to 9000. An allowed connect goes on with the rules after them."""
    if FIRST_LOCK + len(policy.locks) > LAST_RULE:
        raise Unsupported(
            f"ipfw has rule numbers for {LAST_RULE - FIRST_LOCK} locks here, and the policy has {len(policy.locks)}"
        )
    exported = Exported()
    note_containers(policy, exported)
    note_default_allow(policy, exported)
    lines = exported.comments(f"Load with: ipfw -q FILE. Rules {FIRST_RULE} to {LAST_RULE} must be free.")
    for number, _, endpoint in by_specificity(policy):
        lines += [
            f"add {FIRST_RULE} skipto {FIRST_LOCK + number} {match}"
            for protocol in Protocol
            if endpoint.ports(protocol)
            for match in [_ipfw_match(endpoint, protocol)]
        ]
    lines.append(f"add {FIRST_RULE + 1} skipto {LAST_RULE} ip from any to any")
    for number, lock in enumerate(policy.locks):
        lines += [heading(lock), *(f"add {FIRST_LOCK + number} {rule}" for rule in _ipfw_lock(lock, policy.mode))]
    exported.text = "\n".join([*lines, f"add {LAST_RULE} count ip from any to any", ""])
    return exported


def _ipfw_match(endpoint: Endpoint, protocol: Protocol) -> str:
    ports = endpoint.ports(protocol)
    port = "" if ports == ALL_PORTS else " dst-port " + ",".join(format_ports(ports, "-"))
    setup = " setup" if protocol is Protocol.TCP else ""
    family = "dst-ip" if endpoint.network.version == 4 else "dst-ip6"
    return f"{protocol.value} from any to any {family} {endpoint.network}{port} out{setup}"


def _ipfw_lock(lock: Lock, mode: Mode) -> list[str]:
    allowed = [f"skipto {LAST_RULE} ip from any to any"]
    rules: list[str] = []
    for actions, identities in ((_ipfw_denial(mode), lock.deny), (allowed, lock.allow)):
        for keyword, ids in (("uid", identities.users), ("gid", identities.groups)):
            rules += [f"{action} {block}" for block in _or_blocks(keyword, ids) for action in actions]
    return rules + (_ipfw_denial(mode) if lock.default is Verdict.DENY else allowed)


def _or_blocks(keyword: str, ids: Iterable[int]) -> list[str]:
    ordered = sorted(ids)
    parts = [ordered[low : low + IDS_PER_RULE] for low in range(0, len(ordered), IDS_PER_RULE)]
    return ["{ " + " or ".join(f"{keyword} {number}" for number in part) + " }" for part in parts]


def _ipfw_denial(mode: Mode) -> list[str]:
    if mode is Mode.AUDIT:
        return ["count log ip from any to any", f"skipto {LAST_RULE} ip from any to any"]
    return [
        "reset tcp from any to any proto ip4",
        "reset6 tcp from any to any proto ip6",
        "unreach port udp from any to any proto ip4",
        "unreach6 port udp from any to any proto ip6",
    ]
