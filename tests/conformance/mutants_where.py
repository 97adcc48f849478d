# SPDX-License-Identifier: Apache-2.0
"""Mutants that judge the wrong destination."""

from __future__ import annotations

import ipaddress
from typing import Callable

from imds_guard.policy.decide import UNBOUND, Decision, Reason, resolve_unspecified
from imds_guard.policy.model import Endpoint, Lock, Protocol
from tests.conformance.model import Case, model_destination, model_source
from tests.conformance.mutant import judge, mutant, with_endpoints


@mutant
def ipv4_only(case: Case) -> Decision:
    """IPv6 endpoints are left out."""
    return Decision(True, Reason.NOT_LOCKED) if _written_as_ipv6(case) and not _mapped(case) else judge(case)


@mutant
def mapped_addresses_forgotten(case: Case) -> Decision:
    """A mapped address (::ffff:a.b.c.d) is treated as an IPv6 address that is not locked."""
    return Decision(True, Reason.NOT_LOCKED) if _mapped(case) else judge(case)


@mutant
def link_local_forgotten(case: Case) -> Decision:
    """Link-local IPv6 endpoints are left out."""
    return (
        Decision(True, Reason.NOT_LOCKED)
        if model_destination(case).address.is_link_local and _written_as_ipv6(case) and not _mapped(case)
        else judge(case)
    )


def _written_as_ipv6(case: Case) -> bool:
    return ":" in case.attempt.to


def _mapped(case: Case) -> bool:
    address = model_destination(case).address
    return isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None


@mutant
def all_of_ipv6_covers_ipv4(case: Case) -> Decision:
    """IPv4 shares a trie of 16-byte keys with IPv6, where ::/0 also covers ::ffff:0:0/96."""
    decision = judge(case)
    if decision.lock or case.attempt.protocol is Protocol.UDP:
        return decision
    short = [lock for lock in case.policy.locks for one in lock.endpoints if one.network.version == 6
             and one.network.prefixlen <= 96 and ipaddress.ip_address("::ffff:0:0") in one.network]  # fmt: skip
    address = resolve_unspecified(model_destination(case).address, model_source(case))
    if short and address is not None and address.version == 4:
        return Decision(False, Reason.NOT_LISTED)
    return decision


@mutant
def prefixes_forgotten(case: Case) -> Decision:
    """Only single addresses are looked up."""
    locks = tuple(lock for lock in case.policy.locks if all(_single(one) for one in lock.endpoints))
    return judge(case, policy=case.policy._replace(locks=locks))


def _single(endpoint: Endpoint) -> bool:
    return endpoint.network.prefixlen == endpoint.network.max_prefixlen


@mutant
def least_specific(case: Case) -> Decision:
    """The least specific endpoint decides."""
    return _by_lock(case, lambda lock: min(one.network.prefixlen for one in lock.endpoints))


@mutant
def first_lock_by_name(case: Case) -> Decision:
    """The first lock by name that matches decides."""
    return _by_lock(case, lambda lock: 0)


def _by_lock(case: Case, order: Callable[[Lock], int]) -> Decision:
    """The decision of the first lock, in this order, that covers the destination when it is the only one."""
    for lock in sorted(case.policy.locks, key=order):
        alone = judge(case, policy=case.policy._replace(locks=(lock,)))
        if alone.reason is not Reason.NOT_LOCKED:
            return alone
    return judge(case)


@mutant
def most_specific_whatever_its_ports(case: Case) -> Decision:
    """The most specific endpoint decides for all ports. Ports that it does not list are open."""
    address = resolve_unspecified(model_destination(case).address, model_source(case))
    inner = [
        (one.network.prefixlen, lock)
        for lock in case.policy.locks
        for one in lock.endpoints
        if address is not None and one.covers(address)
    ]
    if not inner:
        return judge(case)
    longest = max(length for length, _ in inner)
    return judge(case, policy=case.policy._replace(locks=tuple(lock for length, lock in inner if length == longest)))


@mutant
def ports_ignored(case: Case) -> Decision:
    """A lock with some ports locks all ports."""
    everything = ((0, 65535),)
    policy = with_endpoints(
        case.policy, lambda one: one._replace(tcp=one.tcp and everything, udp=one.udp and everything)
    )
    return judge(case, policy=policy)


@mutant
def port_bytes_swapped(case: Case) -> Decision:
    """The port is compared in network byte order."""
    destination = model_destination(case)
    swapped = int.from_bytes(destination.port.to_bytes(2, "big"), "little")
    return judge(case, destination=destination._replace(port=swapped))


@mutant
def first_range_of_ports(case: Case) -> Decision:
    """Only the first range of a lock's ports is checked."""
    return judge(case, policy=with_endpoints(case.policy, lambda one: one._replace(tcp=one.tcp[:1], udp=one.udp[:1])))


@mutant
def hull_of_the_ports(case: Case) -> Decision:
    """Everything from the lowest to the highest port is locked, gaps included."""
    policy = with_endpoints(
        case.policy,
        lambda one: one._replace(
            tcp=one.tcp and ((one.tcp[0][0], one.tcp[-1][1]),),
            udp=one.udp and ((one.udp[0][0], one.udp[-1][1]),),
        ),
    )
    return judge(case, policy=policy)


@mutant
def protocol_ignored(case: Case) -> Decision:
    """An endpoint that is locked for TCP is locked for UDP, too."""
    policy = with_endpoints(case.policy, lambda one: one._replace(tcp=one.tcp or one.udp, udp=one.udp or one.tcp))
    return judge(case, policy=policy)


@mutant
def tcp_only(case: Case) -> Decision:
    """UDP is not checked."""
    return Decision(True, Reason.NOT_LOCKED) if case.attempt.protocol is Protocol.UDP else judge(case)


@mutant
def everything_is_locked(case: Case) -> Decision:
    """Destinations that are not locked are denied, too."""
    decision = judge(case)
    return Decision(False, Reason.NOT_LISTED) if decision.lock is None else decision


# --- 0.0.0.0 --------------------------------------------------------------------------------------------------------


@mutant
def unspecified_forgotten(case: Case) -> Decision:
    """0.0.0.0 is treated as an address that is not locked."""
    unspecified = int(model_destination(case).address) & 0xFFFFFFFF == 0
    return Decision(True, Reason.NOT_LOCKED) if unspecified else judge(case)


@mutant
def unspecified_ipv6_forgotten(case: Case) -> Decision:
    """:: is treated as an address that is not locked."""
    return Decision(True, Reason.NOT_LOCKED) if case.attempt.to == "::" else judge(case)


@mutant
def unspecified_is_loopback(case: Case) -> Decision:
    """0.0.0.0 means loopback, even on a bound socket."""
    return judge(case, source=UNBOUND)


@mutant
def devices_forgotten(case: Case) -> Decision:
    """0.0.0.0 means loopback, even on a socket that is bound to an interface."""
    return judge(case, source=model_source(case)._replace(by_device=False))


@mutant
def devices_before_the_bound_address(case: Case) -> Decision:
    """An interface makes the destination unknown, even on a socket that is bound to an address."""
    source = model_source(case)
    return judge(case, source=source._replace(address=None)) if source.by_device else judge(case)


@mutant
def packet_info_forgotten(case: Case) -> Decision:
    """The socket's own address counts, although an IP_PKTINFO replaces it."""
    bind = case.attempt.bind
    return judge(case, source=model_source(case)._replace(address=None if bind is None else ipaddress.ip_address(bind)))


@mutant
def any_unspecified_is_denied(case: Case) -> Decision:
    """0.0.0.0 is denied, locked or not."""
    decision = judge(case)
    unspecified = int(model_destination(case).address) & 0xFFFFFFFF == 0
    return Decision(False, Reason.UNSPECIFIED_DESTINATION) if unspecified and decision.lock is None else decision
