# SPDX-License-Identifier: Apache-2.0
"""Rows where a backend is known to differ from the table: there the opposite verdict is expected, and tested."""

from __future__ import annotations

import ipaddress
from fnmatch import fnmatchcase

from imds_guard.policy.model import unmapped
from imds_guard.text import host_port
from tests.conformance.model import Case

_OPENER = "the identity that counts is the one that opened the socket"
_NAMESPACE = "only one network namespace is guarded, not those that are made later"
_CONTAINERS = "callers in containers are judged like callers on the host"
_EXACT = "packets are judged by the address that the kernel chose for 0.0.0.0, which the hook can't know"
_LOOPBACK = "the kernel chooses loopback for ::, even on a bound socket, and packets are judged by that address"
_GROUPS = "all groups of a caller are compared, without a limit"
_LISTENER = "nobody asks which socket listens at a filter's address: that takes privilege"
_DEVICE = "NAT leads a socket to its filter on whatever device it is, and lo reaches one"


def _filtered(name: str, why: str) -> tuple[tuple[str, str], ...]:
    """A row about a filter: its IPv6 form agrees with the table, since a caller is denied there."""
    return (f"{name}/ipv4", why), (f"{name}/mapped", why)


# Backend -> (pattern of row ids, why). The first pattern that matches decides.
KNOWN: dict[str, tuple[tuple[str, str], ...]] = {
    "ebpf": (),
    "iptables": (
        ("socket-made-by-*", _OPENER),
        ("network-namespace-not-listed/*", _NAMESPACE),
        ("pid-namespace/*", _CONTAINERS),
        ("pid-namespace-root/*", _CONTAINERS),
        ("pid-namespace-default-allow/*", _CONTAINERS),
        ("userns-uid-listed-outside/*", _CONTAINERS),
        ("userns-deny-list/*", _CONTAINERS),
        ("userns-slips-past-no-deny-list/*", _CONTAINERS),
        ("filter-network-namespace/*", _NAMESPACE),
        ("filter-account-container/*", _CONTAINERS),
        *_filtered("filter-pid-namespace", _CONTAINERS),
        *_filtered("filter-everyone-pid-namespace", _CONTAINERS),
        *_filtered("filter-everyone-userns", _CONTAINERS),
        *_filtered("filter-everyone-userns-allowed", _CONTAINERS),
        *_filtered("filter-1025-groups", _GROUPS),
        *_filtered("filter-1025-groups-primary-named", _GROUPS),
        *_filtered("filter-1025-groups-user-named", _GROUPS),
        *_filtered("filter-foreign-listener", _LISTENER),
        *_filtered("filter-other-rules", _LISTENER),
        *_filtered("filter-bound-to-a-device", _DEVICE),
        *_filtered("filter-socket-made-by-root", _OPENER),
        ("1025-groups-129-listed/*", _GROUPS),
        ("1025-groups-129-denied/*", _GROUPS),
        ("1025-times-one-group-129-listed/*", _GROUPS),
        ("unspecified-on-a-device-listed/*", _EXACT),
        ("unspecified-unbound-udp-connect/ipv4", _EXACT),
        ("unspecified-unbound-udp-connect/mapped", _EXACT),
        ("unspecified-unbound-udp-sendto/ipv4", _EXACT),
        ("unspecified-unbound-udp-sendto/mapped", _EXACT),
        ("unspecified-bound-to-locked/ipv6", _LOOPBACK),
        ("unspecified-bound-to-locked-fastopen/ipv6", _LOOPBACK),
        ("unspecified-bound-to-locked-mptcp/ipv6", _LOOPBACK),
        ("unspecified-bound-to-locked-udp-connect/ipv6", _LOOPBACK),
        ("unspecified-bound-to-locked-udp-sendto/ipv6", _LOOPBACK),
        ("unspecified-on-a-device-bound-to-locked/ipv6", _LOOPBACK),
        ("unspecified-ipv6-bound-to-mapped/mapped", _LOOPBACK),
    ),
}


def difference(backend: str, row_id: str) -> str | None:
    """Why ``backend`` gives the opposite of what the table says for the row, or None when it must agree."""
    for pattern, why in KNOWN[backend]:
        if fnmatchcase(row_id, pattern):
            return why
    return None


def expected_verdict(case: Case, backend: str) -> str:
    """``allowed`` or ``denied``: what the table says, or the opposite where the backend is known to differ.

    For a connect that is redirected ``filtered by NAME to ADDRESS:PORT``.
    """
    if case.attempt.greeted and backend == "iptables" and _is_ipv6(case):
        return "denied"  # "filter-ipv6" in backends/iptables/differences.py
    if case.attempt.greeted and difference(backend, case.id) is None:
        return f"filtered by {case.filter} to {_target_of(case)}"
    differs = difference(backend, case.id) is not None
    return "allowed" if case.allowed != differs else "denied"


def _is_ipv6(case: Case) -> bool:
    return unmapped(ipaddress.ip_address(case.attempt.to)).version == 6


def _target_of(case: Case) -> str:
    attempt = case.attempt
    to = unmapped(ipaddress.ip_address(attempt.to))
    address = to if int(to) else unmapped(ipaddress.ip_address(attempt.bind or ""))
    return host_port(address, attempt.port)
