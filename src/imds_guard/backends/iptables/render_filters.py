# SPDX-License-Identifier: Apache-2.0
"""The rules for filters (docs/filter.md), in the three tables that a connect meets. Pure.

Mangle lets a caller of a filter through to what it serves, and gives that packet a mark. NAT leads it to the filter's
listener, 127.169.T.F. Filter asks once more for the owner, now at that address, and denies what has the mark and goes
elsewhere. Why three times?

- NAT is asked for the first packet of a connection that conntrack knows. Whoever takes the port of a connection that
  has just failed may inherit its translation, or that there is none: nf_nat_inet_fn() in Linux
  net/netfilter/nf_nat_core.c. Filter, which judges each first packet by its owner and its address, denies both.
- Where the rules in NAT are gone, or somebody else's come first, the packet has another address than a listener's.

IMDS-GUARD-R0    the first lock, for callers that none of its lists decides: the account of the filters, then each
                 filter's callers in the order of the policy, then the default
IMDS-GUARD-R0-F1 callers of the second filter at that lock
IMDS-GUARD-LED   in mangle: the mark
IMDS-GUARD-P     in filter: the addresses of listeners
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Callable

from imds_guard.backends.iptables.rules import (
    ACCEPT,
    DNAT,
    EVERY_UID,
    FILTERED_MARK,
    MARK,
    RETURN,
    Rule,
    id_ranges,
)
from imds_guard.errors import Unsupported
from imds_guard.policy.edit import without_ipv6
from imds_guard.policy.filter_address import Listener, listener_address
from imds_guard.policy.filter_numbers import Numbers, listeners_of
from imds_guard.policy.filters import FILTER_NETWORK, FILTER_PORT, Target, targets_of
from imds_guard.policy.model import Lock, Policy

REST = "IMDS-GUARD-R"
"""The beginning of the names of these chains, and of no other chain."""
LED = "IMDS-GUARD-LED"
PLACES = "IMDS-GUARD-P"
MAX_FILTER_RANGES = 256
"""Ranges of IDs of all filters. They are in no tree: a caller on no list meets each of them."""

Led = Callable[[Listener], Rule]
"""What a table does with a caller of a filter."""


def require_supported(policy: Policy) -> None:
    """Raises Unsupported for filters that no rules can enforce, on any machine."""
    ipv4 = without_ipv6(policy)
    for one in policy.filters:
        if not targets_of(one, ipv4.locks):
            raise Unsupported(
                f"filter {one.name!r} serves IPv6 addresses alone, and iptables can lead callers to a filter by IPv4 "
                "alone: its callers would get nothing"
            )
    ranges = sum(len(id_ranges(ids)) for one in policy.filters for ids in (one.who.users, one.who.groups))
    if ranges > MAX_FILTER_RANGES:
        raise Unsupported(
            f"the filters list {ranges} ranges of IDs, and the maximum for iptables is {MAX_FILTER_RANGES}: list a "
            "group in place of its members"
        )


def listeners_under(policy: Policy, numbers: Numbers) -> list[Listener]:
    """What has to listen. Nobody is led to an IPv6 target: lo has no other IPv6 address than ::1."""
    return listeners_of(without_ipv6(policy), numbers)


def rest_chain(number: int) -> str:
    """The name of the chain for callers that no list of a lock decides."""
    return f"{REST}{number}"


def has_filters(lock: Lock, policy: Policy) -> bool:
    """Whether some filter is for this lock."""
    return any(lock.name in one.locks for one in policy.filters)


def rest(policy: Policy, number: int, version: int) -> list[Rule]:
    """The rules of rest_chain(), without the default."""
    lock = policy.locks[number]
    rules = _of_account(policy, lock, version)
    for index, one in enumerate(policy.filters):
        if lock.name in one.locks:
            name = filter_chain(number, index)
            rules += [Rule(name, goto=True, uids=users) for users in id_ranges(one.who.users)]
            rules += [Rule(name, goto=True, gids=gids, supplementary=True) for gids in id_ranges(one.who.groups)]
            # A socket of the kernel has no owner, and is not "everyone".
            rules += [Rule(name, goto=True, uids=EVERY_UID)] if one.everyone else []
    return rules


def filter_chain(number: int, index: int) -> str:
    """The name of the chain of a lock for the callers of a filter, by their positions in the policy."""
    return f"{rest_chain(number)}-F{index}"


def filter_chains(
    policy: Policy, number: int, listeners: Iterable[Listener], led: Led, deny: Rule
) -> dict[str, list[Rule]]:
    """Chain -> rules for each filter of a lock. What it does not serve is denied."""
    lock = policy.locks[number]
    chains: dict[str, list[Rule]] = {}
    for index, one in enumerate(policy.filters):
        if lock.name in one.locks:
            served = targets_of(one, (lock,))
            mine = [led(each) for each in listeners if each.filter == one.name and each.target in served]
            chains[filter_chain(number, index)] = [*mine, deny]
    return chains


def _of_account(policy: Policy, lock: Lock, version: int) -> list[Rule]:
    """The user that runs the filters reaches what they serve, and nothing else by that."""
    if policy.filter_uid is None:
        return []
    served = sorted({each for one in policy.filters for each in targets_of(one, (lock,))}, key=Target.sort_key)
    uids = (policy.filter_uid, policy.filter_uid)
    return [at_target(each, Rule(RETURN, uids=uids)) for each in served if each.address.version == version]


# --- one rule ---------------------------------------------------------------------------------------------------------


def at_target(target: Target, rule: Rule) -> Rule:
    """The rule for packets to a target alone."""
    network = ipaddress.ip_network(target.address)
    return rule._replace(destination=network, protocol="tcp", ports=(target.port, target.port))


def marking(one: Listener) -> Rule:
    """In mangle."""
    return at_target(one.target, Rule(LED, goto=True))


def passing(one: Listener) -> Rule:
    """In mangle, in audit mode: the caller reaches the endpoint."""
    return at_target(one.target, Rule(RETURN))


def leading(one: Listener) -> Rule:
    """In NAT."""
    return at_target(one.target, Rule(DNAT, to=(one.address, FILTER_PORT)))


def arriving(one: Listener) -> Rule:
    """In filter."""
    return Rule(RETURN, destination=ipaddress.ip_network(one.address), protocol="tcp", ports=(FILTER_PORT, FILTER_PORT))


def row(target_number: int) -> ipaddress.IPv4Network:
    """127.169.T.0/24: where all filters listen for a target."""
    return ipaddress.IPv4Network((int(listener_address(target_number, 0)), 24))


def at_places(rule: Rule) -> Rule:
    """The rule for connects to where filters listen."""
    return rule._replace(destination=FILTER_NETWORK, protocol="tcp", syn=True, ports=(FILTER_PORT, FILTER_PORT))


LED_RULES = (Rule(MARK, mark=FILTERED_MARK), Rule(ACCEPT))
"""ACCEPT ends mangle: no rule behind ours can change the mark."""


def elsewhere(deny: Rule) -> Rule:
    """In filter: what has the mark and goes to no place of a filter. Answers of a filter may have its mark, too.

    An accepted socket inherits the mark where net.ipv4.tcp_fwmark_accept says so.
    """
    return deny._replace(protocol="tcp", syn=True, mark=FILTERED_MARK)
