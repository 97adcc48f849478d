# SPDX-License-Identifier: Apache-2.0
"""Rows about how a connect is made: by which system call, from which source address, and to 0.0.0.0."""

from __future__ import annotations

from imds_guard.policy.decide import Reason
from imds_guard.policy.ports import ALL_PORTS
from tests.conformance.families import IPV4, IPV6, MAPPED
from tests.conformance.model import Attempt, Case
from tests.conformance.rows import ALICE, PORT_80, STAFF, STRANGER, fixed, go, imds, lock, locks, row, who

_any = imds(users=[ALICE], udp=ALL_PORTS)


def _forms() -> list[Case]:
    """Each way to connect: denied for a stranger, allowed for a listed user, not judged where nothing is locked."""
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
        ("udp-connect", ()),
        ("udp-connect-after-unspec", ()),
        ("udp-sendto", ()),
        ("udp-sendto-on-connected", ()),
        ("udp-sendmsg-on-connected", ()),
        ("udp-sendmmsg", ()),
        ("udp-io_uring", ("io_uring",)),
    ):
        rows += row(f"{form}-denied", _any, who(STRANGER), go(form=form), Reason.NOT_LISTED, requires=requires)
        rows += row(f"{form}-allowed", _any, who(ALICE), go(form=form), Reason.ALLOWED_USER, requires=requires)
        rows += row(
            f"{form}-beside", _any, who(STRANGER), go("beside", form=form), Reason.NOT_LOCKED, requires=requires
        )
    return rows


def _odd_families() -> list[Case]:
    """UDP calls with an address of another family than the socket's. The kernel accepts them."""
    rows: list[Case] = []
    for form in ("udp-connect-ipv4-on-ipv6-socket", "udp-sendto-ipv4-on-ipv6-socket", "udp-sendto-as-unspec"):
        rows += row(f"{form}-denied", _any, who(STRANGER), go(form=form), Reason.NOT_LISTED, families=(IPV4,))
        rows += row(f"{form}-allowed", _any, who(ALICE), go(form=form), Reason.ALLOWED_USER, families=(IPV4,))
        rows += row(f"{form}-beside", _any, who(STRANGER), go("beside", form=form), Reason.NOT_LOCKED, families=(IPV4,))
    return rows


_tcp = imds(users=[ALICE])
_loopback = locks(lambda f: [lock([f.loopback], users=[ALICE], udp=ALL_PORTS)])

UNSPECIFIED_TCP = [
    *row("unspecified-bound-to-locked", _tcp, who(STRANGER), go("unspecified", bind="locked"), Reason.NOT_LISTED),
    *row("unspecified-bound-to-locked-listed", _tcp, who(ALICE), go("unspecified", bind="locked"), Reason.ALLOWED_USER),
    *row("unspecified-bound-beside", _tcp, who(STRANGER), go("unspecified", bind="beside"), Reason.NOT_LOCKED),
    *row(
        "unspecified-bound-to-locked-another-port", imds(tcp=PORT_80), who(STRANGER),
        go("unspecified", 443, bind="locked"), Reason.NOT_LOCKED,
    ),
    *row("unspecified-unbound", _tcp, who(STRANGER), go("unspecified"), Reason.NOT_LOCKED),
    *row("unspecified-unbound-loopback-locked", _loopback, who(STRANGER), go("unspecified"), Reason.NOT_LISTED),
    *row("unspecified-unbound-loopback-listed", _loopback, who(ALICE), go("unspecified"), Reason.ALLOWED_USER),
    *row(
        "unspecified-bound-to-locked-fastopen", _tcp, who(STRANGER),
        go("unspecified", form="fastopen-sendto", bind="locked"), Reason.NOT_LISTED, requires=("fastopen",),
    ),
    *row(
        "unspecified-bound-to-locked-mptcp", _tcp, who(STRANGER), go("unspecified", form="mptcp", bind="locked"),
        Reason.NOT_LISTED, requires=("mptcp",),
    ),
    *row(
        "bound-to-locked-elsewhere", _tcp, who(STRANGER), go("beside", bind="locked"), Reason.NOT_LOCKED,
    ),
    *row("bound-beside-to-locked", _tcp, who(STRANGER), go("locked", bind="beside"), Reason.NOT_LISTED),
]  # fmt: skip

# On a socket that is bound to an interface, 0.0.0.0 means the interface's primary address. Here that one is locked.
DEVICE = [
    *row(
        "unspecified-on-a-device", _tcp, who(STRANGER), go("unspecified", device=True),
        Reason.UNSPECIFIED_DESTINATION, families=(IPV4, MAPPED),
    ),
    *row(
        "unspecified-on-a-device-listed", _tcp, who(ALICE), go("unspecified", device=True),
        Reason.UNSPECIFIED_DESTINATION, families=(IPV4, MAPPED),
    ),
    *row(
        "unspecified-on-a-device-port-not-locked", imds(users=[ALICE], tcp=PORT_80), who(STRANGER),
        go("unspecified", 443, device=True), Reason.NOT_LOCKED, families=(IPV4, MAPPED),
    ),
    *row(
        "unspecified-on-a-device-only-ipv6-locked", fixed(lock([IPV6.locked])), who(STRANGER),
        go("unspecified", 443, device=True), Reason.NOT_LOCKED, families=(IPV4, MAPPED),
    ),
    *row(
        "unspecified-on-a-device-prefix-locked", fixed(lock([IPV4.prefix], tcp=PORT_80)), who(STRANGER),
        go("unspecified", device=True), Reason.UNSPECIFIED_DESTINATION, families=(IPV4, MAPPED),
    ),
    *row(
        "unspecified-on-a-device-bound-beside", _tcp, who(STRANGER), go("unspecified", bind="beside", device=True),
        Reason.NOT_LOCKED,
    ),
    *row(
        "unspecified-on-a-device-bound-to-locked", _tcp, who(STRANGER), go("unspecified", bind="locked", device=True),
        Reason.NOT_LISTED,
    ),
    *row(
        "unspecified-on-a-device", _tcp, who(STRANGER), go("unspecified", device=True), Reason.NOT_LOCKED,
        families=(IPV6,),
    ),
    *row("device-to-locked", _tcp, who(STRANGER), go(device=True), Reason.NOT_LISTED),
    *row("device-beside", _tcp, who(STRANGER), go("beside", device=True), Reason.NOT_LOCKED),
]  # fmt: skip


def _unspecified_udp(form: str) -> list[Case]:
    return [
        *row(
            f"unspecified-bound-to-locked-{form}", _any, who(STRANGER), go("unspecified", form=form, bind="locked"),
            Reason.NOT_LISTED,
        ),
        *row(
            f"unspecified-bound-to-locked-{form}-listed", _any, who(ALICE), go("unspecified", form=form, bind="locked"),
            Reason.ALLOWED_USER,
        ),
        *row(
            f"unspecified-bound-beside-{form}", _any, who(STRANGER), go("unspecified", form=form, bind="beside"),
            Reason.NOT_LOCKED,
        ),
        *row(
            f"unspecified-unbound-{form}", _any, who(ALICE), go("unspecified", form=form),
            Reason.UNSPECIFIED_DESTINATION, families=(IPV4, MAPPED),
        ),
        *row(
            f"unspecified-unbound-{form}", _any, who(STRANGER), go("unspecified", form=form), Reason.NOT_LOCKED,
            families=(IPV6,),
        ),
        *row(
            f"unspecified-unbound-{form}-tcp-lock", _tcp, who(STRANGER), go("unspecified", form=form),
            Reason.NOT_LOCKED,
        ),
        *row(
            f"unspecified-unbound-{form}-loopback-locked", _loopback, who(STRANGER), go("unspecified", form=form),
            Reason.NOT_LISTED, families=(IPV6,),
        ),
    ]  # fmt: skip


_PKTINFO = "udp-sendmsg-pktinfo"

PACKET_INFO = [
    *row(
        "pktinfo-source-locked", _any, who(STRANGER), go("unspecified", form=_PKTINFO, source="locked"),
        Reason.NOT_LISTED, families=(IPV4,),
    ),
    *row(
        "pktinfo-source-locked-listed", _any, who(ALICE), go("unspecified", form=_PKTINFO, source="locked"),
        Reason.ALLOWED_USER, families=(IPV4,),
    ),
    *row(
        "pktinfo-source-beside", _any, who(STRANGER), go("unspecified", form=_PKTINFO, source="beside"),
        Reason.NOT_LOCKED, families=(IPV4,),
    ),
    *row(
        "pktinfo-source-replaces-the-bound-one", _any, who(STRANGER),
        go("unspecified", form=_PKTINFO, bind="beside", source="locked"), Reason.NOT_LISTED, families=(IPV4,),
    ),
    *row(
        "pktinfo-source-replaces-the-locked-one", _any, who(STRANGER),
        go("unspecified", form=_PKTINFO, bind="locked", source="beside"), Reason.NOT_LOCKED, families=(IPV4,),
    ),
    *row(
        "pktinfo-interface", _any, who(STRANGER), go("unspecified", form=_PKTINFO, interface=True),
        Reason.UNSPECIFIED_DESTINATION, families=(IPV4,),
    ),
    *row(
        "pktinfo-interface-replaces-the-bound-source", _any, who(STRANGER),
        go("unspecified", form=_PKTINFO, bind="beside", interface=True), Reason.UNSPECIFIED_DESTINATION,
        families=(IPV4,),
    ),
    *row(
        "pktinfo-interface-and-source", _any, who(STRANGER),
        go("unspecified", form=_PKTINFO, interface=True, source="locked"), Reason.NOT_LISTED, families=(IPV4,),
    ),
    *row(
        "pktinfo-to-locked", _any, who(STRANGER), go(form=_PKTINFO, interface=True), Reason.NOT_LISTED,
        families=(IPV4, IPV6),
    ),
    *row(
        "pktinfo-beside", _any, who(STRANGER), go("beside", form=_PKTINFO, interface=True), Reason.NOT_LOCKED,
        families=(IPV4, IPV6),
    ),
    # A connected socket sends without an address. It was judged by connect(2), and this hook sees an empty address.
    *row(
        "connected-pktinfo-beside", _any, who(STRANGER), go("beside", form="udp-connected-pktinfo", interface=True),
        Reason.NOT_LOCKED, families=(IPV4, IPV6),
    ),
    *row(
        "connected-pktinfo-listed", _any, who(ALICE), go(form="udp-connected-pktinfo", interface=True),
        Reason.ALLOWED_USER, families=(IPV4, IPV6),
    ),
    *row(
        "connected-pktinfo-from-locked", _any, who(STRANGER),
        go("beside", form="udp-connected-pktinfo", bind="locked", interface=True), Reason.NOT_LOCKED,
        families=(IPV4, IPV6),
    ),
    *row(
        "udp-sendto-as-unspec-unspecified", _any, who(STRANGER),
        go("unspecified", form="udp-sendto-as-unspec", bind="locked"), Reason.NOT_LISTED, families=(IPV4,),
    ),
]  # fmt: skip

# An IPv6 socket that is bound to a mapped address and connects to "::" reaches ::ffff:127.0.0.1. It is judged by the
# address that it is bound to all the same.
BOUND_TO_MAPPED = [
    Case(
        "unspecified-ipv6-bound-to-mapped", "mapped", _tcp(MAPPED), who(STRANGER),
        Attempt(to="::", bind=MAPPED.locked), Reason.NOT_LISTED, False,
    ),
]  # fmt: skip

GROUP_FORMS = [
    *row("udp-sendto-group", imds(groups=[STAFF], udp=ALL_PORTS), who(STRANGER, groups=[STAFF]), go(form="udp-sendto"),
         Reason.ALLOWED_GROUP),
]  # fmt: skip

CASES = [
    *_forms(),
    *_odd_families(),
    *UNSPECIFIED_TCP,
    *DEVICE,
    *_unspecified_udp("udp-connect"),
    *_unspecified_udp("udp-sendto"),
    *PACKET_INFO,
    *BOUND_TO_MAPPED,
    *GROUP_FORMS,
]
