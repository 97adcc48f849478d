# SPDX-License-Identifier: Apache-2.0
"""Rows about filters: who is redirected, where to, and when the answer is a denial.

The name of a filter says how its listener is: witness.BROKEN.
"""

from __future__ import annotations

from imds_guard.policy.decide import Reason
from imds_guard.policy.model import Mode, Verdict
from imds_guard.policy.ports import ALL_PORTS
from tests.conformance.families import FAMILIES, IPV4, IPV6, MAPPED
from tests.conformance.model import USER_NAMESPACE_OFFSET, Case, Setting
from tests.conformance.rows import (
    ALICE,
    BOB,
    CREW,
    OTHERS,
    PORT_80,
    STAFF,
    STRANGER,
    filtered,
    go,
    lock,
    row,
    the_filter,
    who,
)
from tests.conformance.witness import DEAD, FOREIGN, OTHER_RULES

FILTER = 169
_IN_IPV4 = (IPV4, MAPPED)
_MANY = tuple(range(100_000, 101_025))
_USER, _GROUP = the_filter("region", users=[ALICE]), the_filter("region", groups=[STAFF])
_ALL, _DEAD = the_filter("region", everyone=True), the_filter(DEAD, users=[ALICE])
_alice, _staff, _everyone, _dead = filtered(_USER), filtered(_GROUP), filtered(_ALL), filtered(_DEAD)
_first_and_second = filtered(the_filter("first", groups=[STAFF, CREW]), the_filter("second", users=[ALICE, BOB]))

NAMED = [
    *row("filter-user", _alice, who(ALICE), go(), Reason.FILTERED, filter="region"),
    *row("filter-user-not-named", _alice, who(STRANGER), go(), Reason.NOT_LISTED),
    *row("filter-gid-equal-to-a-named-uid", _alice, who(STRANGER, ALICE), go(), Reason.NOT_LISTED),
    *row("filter-primary-group", _staff, who(ALICE, STAFF), go(), Reason.FILTERED, filter="region"),
    *row(
        "filter-supplementary-group", _staff,
        who(ALICE, OTHERS, [CREW, STAFF]), go(), Reason.FILTERED, filter="region",
    ),
    *row("filter-uid-equal-to-a-named-gid", _staff, who(STAFF), go(), Reason.NOT_LISTED),
    *row("filter-everyone", _everyone, who(STRANGER), go(), Reason.FILTERED, filter="region"),
    *row("filter-everyone-root", _everyone, who(0, 0), go(), Reason.FILTERED, filter="region"),
    *row("filter-setfsuid", _alice, who(0, fsuid=ALICE), go(), Reason.FILTERED, filter="region"),
    *row("filter-beside", _everyone, who(STRANGER), go("beside"), Reason.NOT_LOCKED),
]  # fmt: skip

ORDER = [
    *row("filter-first", _first_and_second, who(STRANGER, CREW), go(), Reason.FILTERED, filter="first"),
    *row("filter-second", _first_and_second, who(BOB), go(), Reason.FILTERED, filter="second"),
    *row("filter-first-of-two", _first_and_second, who(ALICE, OTHERS, [STAFF]), go(), Reason.FILTERED, filter="first"),
    *row(
        "filter-everyone-first", filtered(the_filter("first", everyone=True), the_filter("second", users=[ALICE])),
        who(ALICE), go(), Reason.FILTERED, filter="first",
    ),
    *row(
        "filter-everyone-second", filtered(the_filter("first", users=[BOB]), the_filter("second", everyone=True)),
        who(ALICE), go(), Reason.FILTERED, filter="second",
    ),
    *row(
        "filter-last-of-24",
        filtered(*(the_filter(f"{n}", users=[60_000 + n]) for n in range(23)), the_filter("last", users=[ALICE])),
        who(ALICE), go(), Reason.FILTERED, filter="last",
    ),
    *row(
        "filter-first-serves-another-port",
        filtered(the_filter("first", users=[ALICE], port=8080), the_filter("second", users=[ALICE])),
        who(ALICE), go(), Reason.NOT_SERVED, filter="first",
    ),
]  # fmt: skip

LISTS = [
    *row("filter-allowed-user", filtered(_USER, users=[ALICE]), who(ALICE), go(), Reason.ALLOWED_USER),
    *row("filter-allowed-group", filtered(_USER, groups=[STAFF]), who(ALICE, STAFF), go(), Reason.ALLOWED_GROUP),
    *row("filter-allowed-user-everyone", filtered(_ALL, users=[ALICE]), who(ALICE), go(), Reason.ALLOWED_USER),
    *row("filter-denied-user", filtered(_USER, deny_users=[ALICE]), who(ALICE), go(), Reason.DENIED_USER),
    *row("filter-denied-user-everyone", filtered(_ALL, deny_users=[ALICE]), who(ALICE), go(), Reason.DENIED_USER),
    *row(
        "filter-denied-group", filtered(_USER, deny_groups=[CREW]),
        who(ALICE, OTHERS, [CREW]), go(), Reason.DENIED_GROUP,
    ),
    *row(
        "filter-before-default-allow", filtered(_USER, default=Verdict.ALLOW),
        who(ALICE), go(), Reason.FILTERED, filter="region",
    ),
    *row(
        "filter-not-named-default-allow", filtered(_USER, default=Verdict.ALLOW),
        who(STRANGER), go(), Reason.DEFAULT_ALLOW,
    ),
]  # fmt: skip

_two_locks = filtered(_USER, more=[lock((IPV4.other, IPV6.other), "other", tcp=ALL_PORTS)])
_with_prefix = filtered(_USER, where=(IPV4.other, IPV6.other, IPV4.prefix, IPV6.prefix))
_udp = filtered(_USER, udp=ALL_PORTS)
_on_8080 = filtered(the_filter("region", users=[ALICE], port=8080))

SERVED = [
    *row("filter-another-port", _alice, who(ALICE), go(port=443), Reason.NOT_SERVED, filter="region"),
    *row("filter-udp", _udp, who(ALICE), go(form="udp-sendto"), Reason.NOT_SERVED, filter="region"),
    *row("filter-udp-connect", _udp, who(ALICE), go(form="udp-connect"), Reason.NOT_SERVED, filter="region"),
    *row("filter-prefix", _with_prefix, who(ALICE), go(), Reason.NOT_SERVED, filter="region"),
    *row("filter-beside-a-prefix", _with_prefix, who(ALICE), go("other"), Reason.FILTERED, filter="region"),
    *row("filter-its-own-port", _on_8080, who(ALICE), go(port=8080), Reason.FILTERED, filter="region"),
    *row("filter-not-its-own-port", _on_8080, who(ALICE), go(), Reason.NOT_SERVED, filter="region"),
    *row("filter-of-another-lock", _two_locks, who(ALICE), go("other"), Reason.NOT_LISTED),
    *row("filter-open-port", filtered(_USER, tcp=PORT_80), who(ALICE), go(port=443), Reason.NOT_LOCKED),
]  # fmt: skip

ALIVE = [
    *row("filter-dead", _dead, who(ALICE), go(), Reason.NO_FILTER, filter=DEAD),
    *row("filter-dead-nonblocking", _dead, who(ALICE), go(form="nonblocking"), Reason.NO_FILTER, filter=DEAD),
    *row(
        "filter-foreign-listener", filtered(the_filter(FOREIGN, users=[ALICE])),
        who(ALICE), go(), Reason.NO_FILTER, filter=FOREIGN,
    ),
    *row(
        "filter-other-rules", filtered(the_filter(OTHER_RULES, users=[ALICE])),
        who(ALICE), go(), Reason.NO_FILTER, filter=OTHER_RULES,
    ),
    *row(
        "filter-network-namespace", _alice,
        who(ALICE, setting=Setting.NETWORK_NAMESPACE), go(), Reason.NO_FILTER, filter="region",
    ),
    *row("filter-dead-not-named", _dead, who(STRANGER), go(), Reason.NOT_LISTED),
    *row(
        "filter-dead-is-no-way-to-the-second", filtered(_DEAD, the_filter("second", everyone=True)),
        who(ALICE), go(), Reason.NO_FILTER, filter=DEAD,
    ),
]  # fmt: skip

_outside = ALICE + USER_NAMESPACE_OFFSET
CONTAINERS = [
    *row("filter-pid-namespace", _alice, who(ALICE, setting=Setting.PID_NAMESPACE), go(), Reason.CONTAINER),
    *row("filter-everyone-pid-namespace", _everyone, who(ALICE, setting=Setting.PID_NAMESPACE), go(), Reason.CONTAINER),
    *row(
        "filter-everyone-userns", _everyone, who(ALICE, setting=Setting.USER_NAMESPACE), go(), Reason.CONTAINER,
        requires=("userns",),
    ),
    *row(
        "filter-everyone-pid-namespace-allowed", filtered(_ALL, containers=Verdict.ALLOW),
        who(ALICE, setting=Setting.PID_NAMESPACE), go(), Reason.FILTERED, filter="region",
    ),
    *row(
        "filter-everyone-userns-allowed", filtered(_ALL, containers=Verdict.ALLOW),
        who(ALICE, setting=Setting.USER_NAMESPACE), go(), Reason.USER_NAMESPACE, requires=("userns",),
    ),
    *row(
        "filter-user-userns-allowed",
        filtered(the_filter("region", users=[_outside]), the_filter("second", everyone=True), containers=Verdict.ALLOW),
        who(ALICE, setting=Setting.USER_NAMESPACE), go(), Reason.FILTERED, filter="region", requires=("userns",),
    ),
]  # fmt: skip

MANY_GROUPS = [
    *row("filter-1025-groups", _staff, who(ALICE, OTHERS, [*_MANY, STAFF]), go(), Reason.TOO_MANY_GROUPS),
    *row("filter-1025-groups-primary-named", _staff, who(ALICE, STAFF, _MANY), go(), Reason.TOO_MANY_GROUPS),
    *row(
        "filter-1025-groups-user-named", filtered(_GROUP, the_filter("second", users=[ALICE])),
        who(ALICE, OTHERS, _MANY), go(), Reason.TOO_MANY_GROUPS,
    ),
    *row(
        "filter-1025-groups-no-group-named", _alice,
        who(ALICE, OTHERS, _MANY), go(), Reason.FILTERED, filter="region",
    ),
    *row(
        "filter-1024-groups", _staff, who(ALICE, OTHERS, [*_MANY[:1023], STAFF]), go(), Reason.FILTERED,
        filter="region",
    ),
    *row(
        "filter-1025-groups-user-allowed", filtered(_GROUP, users=[ALICE], deny_groups=[CREW]),
        who(ALICE, OTHERS, _MANY), go(), Reason.ALLOWED_USER,
    ),
    *row(
        "filter-1025-groups-group-allowed", filtered(_GROUP, groups=[CREW]),
        who(ALICE, OTHERS, [*_MANY, CREW, STAFF]), go(), Reason.ALLOWED_GROUP,
    ),
    *row(
        "filter-1025-groups-group-denied", filtered(_GROUP, deny_groups=[CREW]),
        who(ALICE, OTHERS, [*_MANY, CREW, STAFF]), go(), Reason.DENIED_GROUP,
    ),
]  # fmt: skip

_audit = filtered(_USER, mode=Mode.AUDIT)
AUDIT = [
    *row("filter-audit", _audit, who(ALICE), go(), Reason.FILTERED, filter="region", allowed=True, redirected=False),
    *row(
        "filter-audit-dead", filtered(_DEAD, mode=Mode.AUDIT), who(ALICE), go(),
        Reason.FILTERED, filter=DEAD, allowed=True, redirected=False,
    ),
    *row(
        "filter-audit-another-port", _audit,
        who(ALICE), go(port=443), Reason.NOT_SERVED, filter="region", allowed=True,
    ),
    *row("filter-audit-not-named", _audit, who(STRANGER), go(), Reason.NOT_LISTED, allowed=True),
    *row(
        "filter-audit-direct", _audit, who(STRANGER), go("filter_address", FILTER), Reason.FILTER_ADDRESS, allowed=True,
        families=_IN_IPV4,
    ),
]  # fmt: skip

SOCKETS = [
    *row("filter-bound-to-a-device", _alice, who(ALICE), go(device=True), Reason.NOT_SERVED, filter="region"),
    *row(
        "filter-bound-to-ipv4", _alice,
        who(ALICE), go(bind="beside"), Reason.FILTERED, filter="region", families=_IN_IPV4,
    ),
    *row(
        "filter-bound-to-ipv6", _alice,
        who(ALICE), go(bind="beside"), Reason.NOT_SERVED, filter="region", families=(IPV6,),
    ),
    *row("filter-bound-to-unspecified", _alice, who(ALICE), go(bind="unspecified"), Reason.FILTERED, filter="region"),
    *row(
        "filter-unspecified-bound-to-locked", _alice, who(ALICE), go("unspecified", bind="locked"), Reason.FILTERED,
        filter="region", families=_IN_IPV4,
    ),
    *row("filter-socket-made-by-root", _alice, who(ALICE, socket_first=True), go(), Reason.FILTERED, filter="region"),
    *row("filter-root-made-the-socket", _alice, who(STRANGER, socket_first=True), go(), Reason.NOT_LISTED),
]  # fmt: skip


def _forms() -> list[Case]:
    """Each way to connect by TCP is redirected."""
    rows: list[Case] = []
    for form, requires in (
        ("nonblocking", ()),
        ("fastopen-sendto", ("fastopen",)),
        ("fastopen-connect", ("fastopen",)),
        ("mptcp", ("mptcp",)),
        ("io_uring", ("io_uring",)),
        ("io_uring-worker", ("io_uring",)),
        ("io_uring-sqpoll", ("io_uring",)),
        ("connect-after-unspec", ()),
    ):
        rows += row(
            f"filter-{form}", _alice, who(ALICE), go(form=form), Reason.FILTERED, filter="region", requires=requires
        )
    return rows


_allowed = filtered(_ALL, users=[ALICE])
DIRECT = [
    *row("filter-direct", _alice, who(ALICE), go("filter_address", FILTER), Reason.FILTER_ADDRESS, families=_IN_IPV4),
    *row(
        "filter-direct-allowed-user", _allowed,
        who(ALICE), go("filter_address", FILTER), Reason.FILTER_ADDRESS, families=_IN_IPV4,
    ),
    *row(
        "filter-direct-root", _everyone,
        who(0, 0), go("filter_address", FILTER), Reason.FILTER_ADDRESS, families=_IN_IPV4,
    ),
    *row(
        "filter-direct-default-allow", filtered(_USER, default=Verdict.ALLOW), who(STRANGER),
        go("filter_address", FILTER), Reason.FILTER_ADDRESS, families=_IN_IPV4,
    ),
    *row(
        "filter-direct-by-unspecified", _alice, who(STRANGER), go("unspecified", FILTER, bind="filter_address"),
        Reason.FILTER_ADDRESS, families=_IN_IPV4,
    ),
    *row(
        "filter-direct-fastopen", _alice, who(STRANGER), go("filter_address", FILTER, "fastopen-sendto"),
        Reason.FILTER_ADDRESS, families=_IN_IPV4, requires=("fastopen",),
    ),
    *row(
        "filter-direct-account", filtered(_USER, account=BOB), who(BOB),
        go("filter_address", FILTER), Reason.FILTER_ADDRESS, families=_IN_IPV4,
    ),
    *row(
        "filter-direct-within-a-locked-prefix",
        filtered(_USER, more=[lock(["127.0.0.0/8"], "loopback", users=[BOB])]),
        who(BOB), go("filter_address", FILTER), Reason.FILTER_ADDRESS, families=_IN_IPV4,
    ),
    *row(
        "filter-address-another-port", _alice,
        who(STRANGER), go("filter_address"), Reason.NOT_LOCKED, families=_IN_IPV4,
    ),
    *row(
        "filter-address-udp", _alice,
        who(STRANGER), go("filter_address", FILTER, "udp-sendto"), Reason.NOT_LOCKED, families=_IN_IPV4,
    ),
    *row(
        "filter-port-at-another-address", _alice,
        who(STRANGER), go("loopback", FILTER), Reason.NOT_LOCKED, families=FAMILIES,
    ),
]  # fmt: skip

_account = filtered(_USER, account=BOB)
ACCOUNT = [
    *row("filter-account", _account, who(BOB), go(), Reason.ALLOWED_USER),
    *row("filter-account-gid", _account, who(STRANGER, BOB), go(), Reason.NOT_LISTED),
    *row("filter-account-another-port", _account, who(BOB), go(port=443), Reason.NOT_LISTED),
    *row("filter-account-of-everyone", filtered(_ALL, account=BOB), who(BOB), go(), Reason.ALLOWED_USER),
    *row(
        "filter-account-denied-group", filtered(_USER, account=BOB, deny_groups=[CREW]),
        who(BOB, OTHERS, [CREW]), go(), Reason.DENIED_GROUP,
    ),
    *row("filter-account-container", _account, who(BOB, setting=Setting.PID_NAMESPACE), go(), Reason.CONTAINER),
    *row(
        "filter-account-of-another-lock",
        filtered(
            _USER, account=BOB,
            more=[lock((IPV4.other, IPV6.other), "other", tcp=ALL_PORTS)],
        ),
        who(BOB), go("other"), Reason.NOT_LISTED,
    ),
]  # fmt: skip

_FORMS = _forms()

ON_EVERY_KERNEL = [*SOCKETS, *_FORMS, *(case for case in ALIVE if len(case.policy.filters) == 1)]
"""Rows that kernels may treat in different ways. Few policies: to apply one takes seconds on an emulated processor."""

CASES = [
    *NAMED,
    *ORDER,
    *LISTS,
    *SERVED,
    *ALIVE,
    *CONTAINERS,
    *MANY_GROUPS,
    *AUDIT,
    *SOCKETS,
    *_FORMS,
    *DIRECT,
    *ACCOUNT,
]
