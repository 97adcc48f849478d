# SPDX-License-Identifier: Apache-2.0
"""Rows about where a connect goes: addresses, prefixes, ports, protocols, several locks."""

from __future__ import annotations

from imds_guard.policy.decide import Reason
from imds_guard.policy.ports import ALL_PORTS, NO_PORTS
from tests.conformance.families import IPV4, IPV6, LINK_LOCAL, MAPPED, Family
from tests.conformance.rows import (
    ALICE,
    BOB,
    NOT_DNS,
    PORT_80,
    STRANGER,
    fixed,
    go,
    imds,
    lock,
    locks,
    row,
    who,
)

_FE80 = Family(
    name="link-local",
    locked=LINK_LOCAL,
    other=LINK_LOCAL,
    beside="fe80::a9fe:a9ff",
    wireserver=LINK_LOCAL,
    loopback="::1",
    unspecified="::",
    prefix="fe80::a9fe:0/112",
    shorter_prefix="fe80::/10",
    everything="::/0",
)

_one_family = locks(lambda f: [lock([f.locked], users=[ALICE])])
_link_local = locks(lambda f: [lock([f.locked], users=[ALICE], udp=ALL_PORTS)])

ADDRESSES = [
    *row("address-beside", imds(users=[ALICE]), who(STRANGER), go("beside"), Reason.NOT_LOCKED),
    *row("loopback-not-locked", imds(users=[ALICE]), who(STRANGER), go("loopback"), Reason.NOT_LOCKED),
    *row("address-written-as-the-row-does", _one_family, who(STRANGER), go(), Reason.NOT_LISTED),
    *row("address-written-as-the-row-does-listed", _one_family, who(ALICE), go(), Reason.ALLOWED_USER),
    *row(
        "other-family-locked-alone", fixed(lock([IPV6.locked])), who(STRANGER), go(), Reason.NOT_LOCKED,
        families=(IPV4, MAPPED),
    ),
    *row(
        "other-family-locked-alone", fixed(lock([IPV4.locked])), who(STRANGER), go(), Reason.NOT_LOCKED,
        families=(IPV6,),
    ),
    *row("link-local", _link_local, who(STRANGER), go(), Reason.NOT_LISTED, families=(_FE80,)),
    *row("link-local-listed", _link_local, who(ALICE), go(), Reason.ALLOWED_USER, families=(_FE80,)),
    *row("link-local-beside", _link_local, who(STRANGER), go("beside"), Reason.NOT_LOCKED, families=(_FE80,)),
    *row("link-local-udp", _link_local, who(STRANGER), go(form="udp-sendto"), Reason.NOT_LISTED, families=(_FE80,)),
]  # fmt: skip

_prefix = locks(lambda f: [lock([f.prefix], users=[ALICE])])
_everything = locks(lambda f: [lock([f.everything], users=[ALICE])])

PREFIXES = [
    *row("prefix", _prefix, who(STRANGER), go(), Reason.NOT_LISTED),
    *row("prefix-other-address", _prefix, who(STRANGER), go("beside"), Reason.NOT_LISTED),
    *row("prefix-listed", _prefix, who(ALICE), go("beside"), Reason.ALLOWED_USER),
    *row("prefix-outside", _prefix, who(STRANGER), go("wireserver"), Reason.NOT_LOCKED),
    *row("everything-of-a-family", _everything, who(STRANGER), go("wireserver"), Reason.NOT_LISTED),
    *row("everything-of-a-family-listed", _everything, who(ALICE), go("loopback"), Reason.ALLOWED_USER),
    *row(
        "all-of-ipv6-is-not-ipv4", fixed(lock(["::/0"])), who(STRANGER), go(), Reason.NOT_LOCKED,
        families=(IPV4, MAPPED),
    ),
    *row(
        "all-of-ipv4-is-not-ipv6", fixed(lock(["0.0.0.0/0"])), who(STRANGER), go(), Reason.NOT_LOCKED,
        families=(IPV6,),
    ),
    *row(
        "half-of-ipv6-is-not-ipv4", fixed(lock(["::/1"])), who(STRANGER), go(), Reason.NOT_LOCKED,
        families=(IPV4, MAPPED),
    ),
]  # fmt: skip

# An address inside a locked prefix has a lock of its own on port 80. Its other ports belong to the prefix.
_nested = locks(
    lambda f: [
        lock([f.shorter_prefix], "a-net", users=[ALICE]),
        lock([f.locked], "b-host", users=[BOB], tcp=PORT_80),
    ]
)
_three_deep = locks(
    lambda f: [
        lock([f.locked], "a-host", users=[BOB], tcp=PORT_80),
        lock([f.prefix], "b-net", users=[STRANGER], tcp=((443, 443),)),
        lock([f.shorter_prefix], "c-net", users=[ALICE]),
    ]
)

NESTED = [
    *row("inner-on-its-port-inner-user", _nested, who(BOB), go(port=80), Reason.ALLOWED_USER),
    *row("inner-on-its-port-outer-user", _nested, who(ALICE), go(port=80), Reason.NOT_LISTED),
    *row("inner-beside-its-port-inner-user", _nested, who(BOB), go(port=443), Reason.NOT_LISTED),
    *row("inner-beside-its-port-outer-user", _nested, who(ALICE), go(port=443), Reason.ALLOWED_USER),
    *row("outer-address-inner-user", _nested, who(BOB), go("beside"), Reason.NOT_LISTED),
    *row("outer-address-outer-user", _nested, who(ALICE), go("beside"), Reason.ALLOWED_USER),
    *row("three-deep-middle-port", _three_deep, who(STRANGER), go(port=443), Reason.ALLOWED_USER),
    *row("three-deep-middle-port-outer-user", _three_deep, who(ALICE), go(port=443), Reason.NOT_LISTED),
    *row("three-deep-outer-port", _three_deep, who(ALICE), go(port=8080), Reason.ALLOWED_USER),
    *row("three-deep-inner-port", _three_deep, who(BOB), go(port=80), Reason.ALLOWED_USER),
    *row("three-deep-middle-address", _three_deep, who(STRANGER), go("beside", 443), Reason.ALLOWED_USER),
]  # fmt: skip

_port_80 = imds(users=[ALICE], tcp=PORT_80)
_ranges = imds(users=[ALICE], tcp=((1, 79), (81, 442), (444, 65535)))
_by_default = imds(users=[ALICE], tcp=NOT_DNS)

PORTS = [
    *row("the-locked-port", _port_80, who(STRANGER), go(port=80), Reason.NOT_LISTED),
    *row("another-port", _port_80, who(STRANGER), go(port=443), Reason.NOT_LOCKED),
    *row("a-port-whose-bytes-are-swapped", _port_80, who(STRANGER), go(port=20480), Reason.NOT_LOCKED),
    *row("port-in-a-gap", _ranges, who(STRANGER), go(port=80), Reason.NOT_LOCKED),
    *row("port-in-another-gap", _ranges, who(STRANGER), go(port=443), Reason.NOT_LOCKED),
    *row("port-in-the-last-range", _ranges, who(STRANGER), go(port=8080), Reason.NOT_LISTED),
    *row("default-tcp-80", _by_default, who(STRANGER), go(), Reason.NOT_LISTED),
    *row("default-dns-over-tcp", _by_default, who(STRANGER), go(port=53), Reason.NOT_LOCKED),
    *row("default-dns-by-connect", _by_default, who(STRANGER), go(port=53, form="udp-connect"), Reason.NOT_LOCKED),
    *row("default-dns-by-sendto", _by_default, who(STRANGER), go(port=53, form="udp-sendto"), Reason.NOT_LOCKED),
    *row("default-udp-80", _by_default, who(STRANGER), go(form="udp-sendto"), Reason.NOT_LOCKED),
]  # fmt: skip

_udp_alone = imds(users=[ALICE], tcp=NO_PORTS, udp=ALL_PORTS)
_each_its_own = locks(
    lambda f: [
        lock([f.locked], "tcp", users=[ALICE]),
        lock([f.locked], "udp", users=[BOB], tcp=NO_PORTS, udp=ALL_PORTS),
    ]
)

PROTOCOLS = [
    *row("tcp-under-a-udp-lock", _udp_alone, who(STRANGER), go(), Reason.NOT_LOCKED),
    *row("udp-under-a-udp-lock", _udp_alone, who(STRANGER), go(form="udp-sendto"), Reason.NOT_LISTED),
    *row("udp-under-a-tcp-lock", imds(users=[ALICE]), who(STRANGER), go(form="udp-connect"), Reason.NOT_LOCKED),
    *row("tcp-lock-beside-udp-lock-tcp-user", _each_its_own, who(ALICE), go(), Reason.ALLOWED_USER),
    *row("tcp-lock-beside-udp-lock-udp-user", _each_its_own, who(BOB), go(), Reason.NOT_LISTED),
    *row("udp-lock-beside-tcp-lock-udp-user", _each_its_own, who(BOB), go(form="udp-sendto"), Reason.ALLOWED_USER),
    *row("udp-lock-beside-tcp-lock-tcp-user", _each_its_own, who(ALICE), go(form="udp-sendto"), Reason.NOT_LISTED),
]  # fmt: skip

_two = locks(lambda f: [lock([f.locked], "imds", users=[ALICE]), lock([f.other], "tasks", users=[BOB])])
_two_lists = locks(
    lambda f: [
        lock([f.locked], "imds", users=[ALICE], deny_users=[BOB]),
        lock([f.other], "tasks", users=[BOB], deny_users=[ALICE]),
    ]
)
_wireserver = locks(lambda f: [lock([f.wireserver], "wireserver", users=[0], tcp=NOT_DNS)])

SEVERAL_LOCKS = [
    *row("first-lock-its-user", _two, who(ALICE), go(), Reason.ALLOWED_USER),
    *row("first-lock-the-others-user", _two, who(BOB), go(), Reason.NOT_LISTED),
    *row("second-lock-its-user", _two, who(BOB), go("other"), Reason.ALLOWED_USER),
    *row("second-lock-the-others-user", _two, who(ALICE), go("other"), Reason.NOT_LISTED),
    *row("second-lock-denies-the-firsts-user", _two_lists, who(ALICE), go("other"), Reason.DENIED_USER),
    *row("first-lock-is-not-the-seconds-deny-list", _two_lists, who(ALICE), go(), Reason.ALLOWED_USER),
    *row("wireserver-root", _wireserver, who(0, 0), go("wireserver"), Reason.ALLOWED_USER),
    *row("wireserver-stranger", _wireserver, who(STRANGER), go("wireserver"), Reason.NOT_LISTED),
    *row("wireserver-group-0", _wireserver, who(STRANGER, 0), go("wireserver"), Reason.NOT_LISTED),
    *row("wireserver-dns", _wireserver, who(STRANGER), go("wireserver", 53, "udp-sendto"), Reason.NOT_LOCKED),
    *row("wireserver-dns-over-tcp", _wireserver, who(STRANGER), go("wireserver", 53), Reason.NOT_LOCKED),
    *row("wireserver-dhcp", _wireserver, who(STRANGER), go("wireserver", 67, "udp-sendto"), Reason.NOT_LOCKED),
]  # fmt: skip

CASES = [*ADDRESSES, *PREFIXES, *NESTED, *PORTS, *PROTOCOLS, *SEVERAL_LOCKS]
