# SPDX-License-Identifier: Apache-2.0
"""Azure's WireServer (168.63.129.16) gets a lock of its own, which always allows root: Azure's agent needs it.

Source: https://learn.microsoft.com/en-us/azure/virtual-network/what-is-ip-address-168-63-129-16
"""

from __future__ import annotations

from imds_guard.errors import BadPolicy
from imds_guard.policy.builtin import DNS_AND_DHCP, WIRESERVER, host_network
from imds_guard.policy.endpoint_syntax import format_ports
from imds_guard.policy.model import Endpoint, Identities, Lock
from imds_guard.policy.ports import common_ports

WIRESERVER_LOCK = "wireserver"


def split_off_wireserver(lock: Lock) -> tuple[Lock, ...]:
    """``lock`` without the WireServer, and a lock of the WireServer, which allows user 0.

    A lock with no other endpoint keeps its name. The WireServer's lock denies neither user 0 nor group 0. A prefix that
    contains the WireServer is not split. Raises BadPolicy when the lock contains the WireServer's DNS or DHCP port.
    """
    own = tuple(endpoint for endpoint in lock.endpoints if endpoint.network == host_network(WIRESERVER))
    if not own:
        return (lock,)
    for endpoint in own:
        _check_excluded_ports(lock.name, endpoint)
    rest = tuple(endpoint for endpoint in lock.endpoints if endpoint.network != host_network(WIRESERVER))
    wireserver = lock._replace(
        name=WIRESERVER_LOCK if rest else lock.name,
        endpoints=own,
        allow=Identities(lock.allow.users | {0}, lock.allow.groups),
        deny=Identities(lock.deny.users - {0}, lock.deny.groups - {0}),
    )
    return (lock._replace(endpoints=rest), wireserver) if rest else (wireserver,)


def _check_excluded_ports(name: str, endpoint: Endpoint) -> None:
    locked = common_ports(endpoint.tcp, DNS_AND_DHCP) or common_ports(endpoint.udp, DNS_AND_DHCP)
    if locked:
        raise BadPolicy(
            f"lock {name!r} would lock port {locked[0][0]} of {WIRESERVER}, where Azure serves DNS (53) and DHCP (67): "
            f"write {WIRESERVER}, or {WIRESERVER}{format_ports(((80, 80), (32526, 32526)))}"
        )
