# SPDX-License-Identifier: Apache-2.0
"""Azure's WireServer (168.63.129.16) stands in a lock of its own: the machine's agent, which is root, can't do without.

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
    """``lock`` without the WireServer, and the WireServer's own lock, which always lets user 0.

    A lock that holds nothing else keeps its name. User 0 and group 0 leave the deny lists of the WireServer's lock. A
    prefix that covers the address is left as it is. Raises BadPolicy when DNS or DHCP there would be locked.
    """
    own = tuple(endpoint for endpoint in lock.endpoints if endpoint.network == host_network(WIRESERVER))
    if not own:
        return (lock,)
    for endpoint in own:
        _check_spared(lock.name, endpoint)
    rest = tuple(endpoint for endpoint in lock.endpoints if endpoint.network != host_network(WIRESERVER))
    apart = lock._replace(
        name=WIRESERVER_LOCK if rest else lock.name,
        endpoints=own,
        allow=Identities(lock.allow.users | {0}, lock.allow.groups),
        deny=Identities(lock.deny.users - {0}, lock.deny.groups - {0}),
    )
    return (lock._replace(endpoints=rest), apart) if rest else (apart,)


def _check_spared(name: str, endpoint: Endpoint) -> None:
    taken = common_ports(endpoint.tcp, DNS_AND_DHCP) or common_ports(endpoint.udp, DNS_AND_DHCP)
    if taken:
        raise BadPolicy(
            f"lock {name!r} would take port {taken[0][0]} of {WIRESERVER}, where Azure serves DNS (53) and DHCP (67): "
            f"write {WIRESERVER}, or {WIRESERVER}{format_ports(((80, 80), (32526, 32526)))}"
        )
