# SPDX-License-Identifier: Apache-2.0
"""Short functions to write the rows of the table with."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Callable

from imds_guard.policy.decide import Reason
from imds_guard.policy.filters import Filter, FilterRules
from imds_guard.policy.model import Endpoint, Identities, Lock, Mode, Policy, Verdict, make_policy
from imds_guard.policy.ports import ALL_PORTS, NO_PORTS, Ports
from tests.conformance.families import FAMILIES, IPV4, IPV6, Family
from tests.conformance.model import Attempt, Case, PacketInfo, Setting, Who

# IDs that no machine uses. Each is a user ID or a group ID, not both, unless a row says otherwise.
ALICE, BOB, STRANGER = 40_001, 40_002, 40_003
STAFF, CREW, OTHERS = 50_001, 50_002, 50_003

PORT_80: Ports = ((80, 80),)
NOT_DNS: Ports = ((0, 52), (54, 65535))

IfFamily = Callable[[Family], Policy]
ThisWay = Callable[[Family], Attempt]
_PERMITTING = (
    *(Reason.NOT_LOCKED, Reason.ALLOWED_USER, Reason.ALLOWED_GROUP, Reason.DEFAULT_ALLOW),
    Reason.FILTERED,
)


def who(
    uid: int,
    gid: int = OTHERS,
    groups: Iterable[int] = (),
    *,
    setting: Setting = Setting.PROCESS,
    uids: tuple[int, int, int] | None = None,
    gids: tuple[int, int, int] | None = None,
    fsuid: int | None = None,
    fsgid: int | None = None,
    socket_first: bool = False,
    parent_groups: tuple[int, ...] = (),
) -> Who:
    """A caller with one user ID and one group ID, unless ``uids``, ``gids``, ``fsuid`` or ``fsgid`` give others."""
    return Who(
        uids=uids or (uid, uid, uid),
        gids=gids or (gid, gid, gid),
        groups=tuple(groups),
        fsuid=fsuid,
        fsgid=fsgid,
        setting=setting,
        socket_first=socket_first,
        parent_groups=parent_groups,
    )


def lock(
    where: Sequence[str],
    name: str = "imds",
    *,
    users: Iterable[int] = (),
    groups: Iterable[int] = (),
    deny_users: Iterable[int] = (),
    deny_groups: Iterable[int] = (),
    default: Verdict = Verdict.DENY,
    tcp: Ports = ALL_PORTS,
    udp: Ports = NO_PORTS,
) -> Lock:
    """A lock on addresses or prefixes. The default is TCP on all ports."""
    return Lock(
        name=name,
        endpoints=tuple(Endpoint(ipaddress.ip_network(one), tcp, udp) for one in where),
        allow=Identities(frozenset(users), frozenset(groups)),
        deny=Identities(frozenset(deny_users), frozenset(deny_groups)),
        default=default,
    )


def imds(
    *,
    mode: Mode = Mode.ENFORCE,
    containers: Verdict = Verdict.DENY,
    users: Iterable[int] = (),
    groups: Iterable[int] = (),
    deny_users: Iterable[int] = (),
    deny_groups: Iterable[int] = (),
    default: Verdict = Verdict.DENY,
    tcp: Ports = ALL_PORTS,
    udp: Ports = NO_PORTS,
) -> IfFamily:
    """A policy with one lock on the IPv4 and the IPv6 address, the same for every family of a row."""
    one = lock(
        (IPV4.locked, IPV6.locked),
        users=users,
        groups=groups,
        deny_users=deny_users,
        deny_groups=deny_groups,
        default=default,
        tcp=tcp,
        udp=udp,
    )
    return fixed(one, mode=mode, containers=containers)


def fixed(*locks: Lock, mode: Mode = Mode.ENFORCE, containers: Verdict = Verdict.DENY) -> IfFamily:
    """A policy with these locks, the same for every family of a row."""
    policy = make_policy(locks, mode, containers)
    return lambda _: policy


def locks(make: Callable[[Family], Sequence[Lock]]) -> IfFamily:
    """A policy whose locks depend on the family of the row."""
    return lambda family: make_policy(make(family))


def the_filter(
    name: str, *, users: Iterable[int] = (), groups: Iterable[int] = (), everyone: bool = False, port: int = 80
) -> Filter:
    """A filter of the lock that filtered() makes."""
    named = Identities(frozenset(users), frozenset(groups))
    return Filter(name, ("imds",), named, everyone, FilterRules(allow=("GET /**",)), port)


def filtered(
    *filters: Filter,
    where: Sequence[str] = (IPV4.locked, IPV6.locked),
    more: Sequence[Lock] = (),
    mode: Mode = Mode.ENFORCE,
    containers: Verdict = Verdict.DENY,
    account: int | None = None,
    users: Iterable[int] = (),
    groups: Iterable[int] = (),
    deny_users: Iterable[int] = (),
    deny_groups: Iterable[int] = (),
    default: Verdict = Verdict.DENY,
    tcp: Ports = ALL_PORTS,
    udp: Ports = NO_PORTS,
) -> IfFamily:
    """A policy with filters, the same for every family of a row: they serve one lock. ``more`` are other locks."""
    one = lock(
        where,
        users=users,
        groups=groups,
        deny_users=deny_users,
        deny_groups=deny_groups,
        default=default,
        tcp=tcp,
        udp=udp,
    )
    policy = make_policy((one, *more), mode, containers, filters=filters, filter_uid=account)
    return lambda _: policy


def go(
    to: str = "locked",
    port: int = 80,
    form: str = "connect",
    *,
    bind: str | None = None,
    device: bool = False,
    interface: bool = False,
    source: str | None = None,
) -> ThisWay:
    """An attempt. ``to``, ``bind`` and ``source`` are names of fields of Family.

    With ``interface`` or ``source``, the attempt sends an IP_PKTINFO.
    """

    def attempt(family: Family) -> Attempt:
        info = PacketInfo(interface, None if source is None else getattr(family, source))
        return Attempt(
            to=getattr(family, to),
            port=port,
            form=form,
            bind=None if bind is None else getattr(family, bind),
            device=device,
            packet_info=info if interface or source else None,
        )

    return attempt


def row(
    name: str,
    policy: IfFamily,
    caller: Who,
    attempt: ThisWay,
    expected: Reason,
    *,
    allowed: bool | None = None,
    filter: str | None = None,
    redirected: bool | None = None,
    families: Sequence[Family] = FAMILIES,
    requires: tuple[str, ...] = (),
) -> list[Case]:
    """One row per family. ``filter`` is the name of the caller's filter.

    ``allowed`` and ``redirected`` are needed only in audit mode: there they don't follow from the reason.
    """
    let_through = expected in _PERMITTING if allowed is None else allowed
    reaches_filter = expected is Reason.FILTERED if redirected is None else redirected
    return [
        Case(
            name,
            family.name,
            policy(family),
            caller,
            replace(attempt(family), greeted=reaches_filter),
            expected,
            let_through,
            requires,
            filter,
        )
        for family in families
    ]
