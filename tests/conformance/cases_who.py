# SPDX-License-Identifier: Apache-2.0
"""Rows about who connects: user IDs, group IDs, and the kind of task."""

from __future__ import annotations

from imds_guard.policy.decide import Reason
from imds_guard.policy.model import Mode, Verdict
from tests.conformance.model import USER_NAMESPACE_OFFSET, Case, Setting
from tests.conformance.rows import ALICE, BOB, CREW, OTHERS, STAFF, STRANGER, go, imds, row, who

ALLOW = Verdict.ALLOW

USERS = [
    *row("allowed-uid", imds(users=[ALICE]), who(ALICE), go(), Reason.ALLOWED_USER),
    *row("one-of-three-uids", imds(users=[ALICE, BOB, 0]), who(BOB), go(), Reason.ALLOWED_USER),
    *row("uid-not-listed", imds(users=[ALICE]), who(STRANGER), go(), Reason.NOT_LISTED),
    *row("nobody-allowed", imds(), who(ALICE, STAFF, [CREW]), go(), Reason.NOT_LISTED),
    *row("nobody-allowed-root", imds(), who(0, 0), go(), Reason.NOT_LISTED),
    *row("root-not-listed", imds(users=[ALICE], groups=[STAFF]), who(0, OTHERS), go(), Reason.NOT_LISTED),
    *row("root-listed", imds(users=[0]), who(0, OTHERS), go(), Reason.ALLOWED_USER),
    *row("gid-0-is-not-root", imds(users=[0]), who(ALICE, 0), go(), Reason.NOT_LISTED),
    *row("uid-0-is-not-group-0", imds(groups=[0]), who(0, OTHERS), go(), Reason.NOT_LISTED),
    *row("gid-equal-to-an-allowed-uid", imds(users=[ALICE]), who(BOB, ALICE), go(), Reason.NOT_LISTED),
    *row(
        "supplementary-gid-equal-to-an-allowed-uid", imds(users=[ALICE]), who(BOB, STAFF, [ALICE]), go(),
        Reason.NOT_LISTED,
    ),
    *row("uid-equal-to-an-allowed-gid", imds(groups=[STAFF]), who(STAFF, OTHERS), go(), Reason.NOT_LISTED),
    *row("uid-differs-in-the-upper-half", imds(users=[ALICE]), who(ALICE + 65536), go(), Reason.NOT_LISTED),
    *row("largest-uid", imds(users=[0xFFFFFFFE]), who(0xFFFFFFFE), go(), Reason.ALLOWED_USER),
    *row("uid-above-the-sign-bit", imds(users=[0x80000001]), who(0x80000001), go(), Reason.ALLOWED_USER),
]  # fmt: skip

REAL_EFFECTIVE_FS = [
    *row("real-uid-alone-listed", imds(users=[ALICE]), who(0, uids=(ALICE, BOB, BOB)), go(), Reason.NOT_LISTED),
    *row("saved-uid-alone-listed", imds(users=[ALICE]), who(0, uids=(BOB, BOB, ALICE)), go(), Reason.NOT_LISTED),
    *row("real-uid-alone-not-listed", imds(users=[ALICE]), who(0, uids=(BOB, ALICE, ALICE)), go(), Reason.ALLOWED_USER),
    *row("daemon-that-did-seteuid", imds(users=[0]), who(0, uids=(0, ALICE, 0)), go(), Reason.NOT_LISTED),
    *row("setfsuid-to-a-listed-one", imds(users=[ALICE]), who(0, fsuid=ALICE), go(), Reason.ALLOWED_USER),
    *row("setfsuid-to-one-not-listed", imds(users=[0]), who(0, fsuid=STRANGER), go(), Reason.NOT_LISTED),
    *row(
        "real-and-effective-uid-listed-fs-not", imds(users=[ALICE, 0]), who(0, uids=(ALICE, 0, 0), fsuid=STRANGER),
        go(), Reason.NOT_LISTED,
    ),
    *row("real-gid-alone-listed", imds(groups=[STAFF]), who(BOB, gids=(STAFF, CREW, CREW)), go(), Reason.NOT_LISTED),
    *row(
        "real-gid-alone-not-listed", imds(groups=[STAFF]), who(BOB, gids=(CREW, STAFF, STAFF)), go(),
        Reason.ALLOWED_GROUP,
    ),
    *row("setfsgid-to-a-listed-one", imds(groups=[STAFF]), who(0, CREW, fsgid=STAFF), go(), Reason.ALLOWED_GROUP),
    *row("setfsgid-to-one-not-listed", imds(groups=[STAFF]), who(0, STAFF, fsgid=CREW), go(), Reason.NOT_LISTED),
    *row(
        "socket-made-by-listed-root", imds(users=[0]), who(STRANGER, socket_first=True), go(), Reason.NOT_LISTED,
    ),
    *row(
        "socket-made-by-unlisted-root", imds(users=[ALICE]), who(ALICE, socket_first=True), go(),
        Reason.ALLOWED_USER,
    ),
]  # fmt: skip


def _group_rows() -> list[Case]:
    """For group lists of each size: an allowed group at each end and in the middle, and gids that lie between."""
    rows: list[Case] = []
    for size in (1, 3, 64, 1024, 1025, 65536):
        groups = tuple(100_000 + 2 * position for position in range(size))
        caller = who(STRANGER, OTHERS, groups)
        for place, position in {"first": 0, "middle": size // 2, "last": size - 1}.items():
            name = f"group-{place}-of-{size}"
            rows += row(name, imds(groups=[groups[position]]), caller, go(), Reason.ALLOWED_GROUP)
        for place, gid in {
            "below": groups[0] - 1,
            "between": groups[size // 2] + 1,
            "above": groups[-1] + 1,
        }.items():
            rows += row(f"group-{place}-all-of-{size}", imds(groups=[gid]), caller, go(), Reason.NOT_LISTED)
    return rows


_MANY_LISTED: tuple[int, ...] = tuple(range(300_000, 300_128))
_MANY_HELD = tuple(range(200_000, 201_025))

GROUPS = [
    *row("allowed-primary-gid", imds(groups=[STAFF]), who(BOB, STAFF), go(), Reason.ALLOWED_GROUP),
    *row(
        "allowed-primary-gid-among-others", imds(groups=[STAFF]), who(BOB, STAFF, [CREW, OTHERS]), go(),
        Reason.ALLOWED_GROUP,
    ),
    *row("gid-not-listed", imds(groups=[STAFF]), who(BOB, CREW, [OTHERS]), go(), Reason.NOT_LISTED),
    *row("no-supplementary-groups", imds(groups=[STAFF]), who(BOB, CREW), go(), Reason.NOT_LISTED),
    *row("uid-listed-before-group", imds(users=[BOB], groups=[STAFF]), who(BOB, STAFF), go(), Reason.ALLOWED_USER),
    *row("gid-512-apart", imds(groups=[STAFF]), who(BOB, CREW, [STAFF + 512]), go(), Reason.NOT_LISTED),
    *row("gid-65536-apart", imds(groups=[STAFF]), who(BOB, CREW, [STAFF + 65536]), go(), Reason.NOT_LISTED),
    *row("largest-gid", imds(groups=[0xFFFFFFFE]), who(BOB, CREW, [1, 0xFFFFFFFE]), go(), Reason.ALLOWED_GROUP),
    *row(
        "largest-gid-of-1025", imds(groups=[0xFFFFFFFE]), who(BOB, CREW, (*_MANY_HELD[1:], 0xFFFFFFFE)), go(),
        Reason.ALLOWED_GROUP,
    ),
    *row(
        "gid-above-the-sign-bit-of-1025", imds(groups=[_MANY_HELD[7]]),
        who(BOB, CREW, (*_MANY_HELD[:512], *(2**31 + gid for gid in range(513)))), go(), Reason.ALLOWED_GROUP,
    ),
    *_group_rows(),
    *row(
        "1025-groups-128-listed", imds(groups=(*_MANY_LISTED[:-1], _MANY_HELD[-1])), who(BOB, CREW, _MANY_HELD), go(),
        Reason.ALLOWED_GROUP,
    ),
    *row(
        "1025-groups-129-listed", imds(groups=(*_MANY_LISTED, _MANY_HELD[-1])), who(BOB, CREW, _MANY_HELD), go(),
        Reason.TOO_MANY_GROUPS,
    ),
    *row(
        "1024-groups-129-listed", imds(groups=(*_MANY_LISTED, _MANY_HELD[0])), who(BOB, CREW, _MANY_HELD[:1024]),
        go(), Reason.ALLOWED_GROUP,
    ),
    *row(
        "1025-groups-129-listed-uid-allowed", imds(users=[BOB], groups=(*_MANY_LISTED, CREW)),
        who(BOB, OTHERS, _MANY_HELD), go(), Reason.ALLOWED_USER,
    ),
    *row(
        "1025-groups-129-listed-primary-allowed", imds(groups=(*_MANY_LISTED, CREW)), who(BOB, CREW, _MANY_HELD),
        go(), Reason.ALLOWED_GROUP,
    ),
    *row(
        "1025-groups-129-denied", imds(deny_groups=(*_MANY_LISTED, STAFF), default=ALLOW), who(BOB, CREW, _MANY_HELD),
        go(), Reason.TOO_MANY_GROUPS,
    ),
    *row(
        "1025-times-one-group-129-listed", imds(groups=(*_MANY_LISTED, CREW)), who(BOB, OTHERS, [CREW] * 1025), go(),
        Reason.TOO_MANY_GROUPS,
    ),
    *row(
        "1024-times-one-group-129-listed", imds(groups=(*_MANY_LISTED, CREW)), who(BOB, OTHERS, [CREW] * 1024), go(),
        Reason.ALLOWED_GROUP,
    ),
]  # fmt: skip

DENY_LISTS = [
    *row("denied-uid", imds(deny_users=[BOB], default=ALLOW), who(BOB), go(), Reason.DENIED_USER),
    *row("only-deny-lists", imds(deny_users=[BOB], default=ALLOW), who(STRANGER), go(), Reason.DEFAULT_ALLOW),
    *row("denied-primary-gid", imds(deny_groups=[CREW], default=ALLOW), who(BOB, CREW), go(), Reason.DENIED_GROUP),
    *row(
        "denied-supplementary-gid", imds(deny_groups=[CREW], default=ALLOW), who(BOB, OTHERS, [STAFF, CREW]), go(),
        Reason.DENIED_GROUP,
    ),
    *row(
        "denied-last-of-1025-groups", imds(deny_groups=[_MANY_HELD[-1]], default=ALLOW), who(BOB, CREW, _MANY_HELD),
        go(), Reason.DENIED_GROUP,
    ),
    *row(
        "denied-uid-in-allowed-group", imds(groups=[STAFF], deny_users=[BOB]), who(BOB, STAFF), go(),
        Reason.DENIED_USER,
    ),
    *row(
        "allowed-uid-in-denied-group", imds(users=[BOB], deny_groups=[CREW]), who(BOB, OTHERS, [CREW]), go(),
        Reason.DENIED_GROUP,
    ),
    *row(
        "in-allowed-and-denied-group", imds(groups=[STAFF], deny_groups=[CREW]), who(BOB, STAFF, [CREW]), go(),
        Reason.DENIED_GROUP,
    ),
    *row("both-lists-neither-matches", imds(users=[ALICE], deny_users=[BOB]), who(STRANGER), go(), Reason.NOT_LISTED),
    *row("denied-gid-is-not-a-uid", imds(deny_groups=[CREW], default=ALLOW), who(CREW), go(), Reason.DEFAULT_ALLOW),
    *row("denied-uid-is-not-a-gid", imds(deny_users=[BOB], default=ALLOW), who(ALICE, BOB), go(), Reason.DEFAULT_ALLOW),
    *row("default-allow-root", imds(deny_users=[BOB], default=ALLOW), who(0, 0), go(), Reason.DEFAULT_ALLOW),
]  # fmt: skip

AUDIT = [
    *row("audit-denial", imds(mode=Mode.AUDIT, users=[ALICE]), who(BOB), go(), Reason.NOT_LISTED, allowed=True),
    *row("audit-allowed", imds(mode=Mode.AUDIT, users=[ALICE]), who(ALICE), go(), Reason.ALLOWED_USER),
    *row(
        "audit-deny-list", imds(mode=Mode.AUDIT, deny_users=[BOB], default=ALLOW), who(BOB), go(), Reason.DENIED_USER,
        allowed=True,
    ),
]  # fmt: skip

_INSIDE, _OUTSIDE = ALICE, ALICE + USER_NAMESPACE_OFFSET

TASKS = [
    *row("thread-listed", imds(users=[ALICE]), who(ALICE, setting=Setting.THREAD), go(), Reason.ALLOWED_USER),
    *row("thread-not-listed", imds(users=[0]), who(STRANGER, setting=Setting.THREAD), go(), Reason.NOT_LISTED),
    *row(
        "thread-in-a-group", imds(groups=[STAFF]), who(BOB, CREW, [STAFF], setting=Setting.THREAD), go(),
        Reason.ALLOWED_GROUP,
    ),
    *row(
        "child-that-dropped-the-group", imds(groups=[STAFF]),
        who(BOB, CREW, [OTHERS], setting=Setting.CHILD, parent_groups=(STAFF,)), go(), Reason.NOT_LISTED,
    ),
    *row(
        "child-that-took-the-group", imds(groups=[STAFF]),
        who(BOB, CREW, [STAFF], setting=Setting.CHILD, parent_groups=(OTHERS,)), go(), Reason.ALLOWED_GROUP,
    ),
    *row(
        "unshared-pid-is-still-the-host", imds(users=[ALICE]), who(ALICE, setting=Setting.UNSHARED_PID), go(),
        Reason.ALLOWED_USER,
    ),
    *row(
        "network-namespace-listed", imds(users=[ALICE]), who(ALICE, setting=Setting.NETWORK_NAMESPACE), go(),
        Reason.ALLOWED_USER,
    ),
    *row(
        "network-namespace-not-listed", imds(users=[ALICE]), who(STRANGER, setting=Setting.NETWORK_NAMESPACE), go(),
        Reason.NOT_LISTED,
    ),
]  # fmt: skip

CONTAINERS = [
    *row("pid-namespace", imds(users=[ALICE]), who(ALICE, setting=Setting.PID_NAMESPACE), go(), Reason.CONTAINER),
    *row("pid-namespace-root", imds(users=[0]), who(0, 0, setting=Setting.PID_NAMESPACE), go(), Reason.CONTAINER),
    *row(
        "pid-namespace-not-locked", imds(users=[ALICE]), who(ALICE, setting=Setting.PID_NAMESPACE), go("beside"),
        Reason.NOT_LOCKED,
    ),
    *row(
        "pid-namespace-containers-allowed", imds(containers=ALLOW, users=[ALICE]),
        who(ALICE, setting=Setting.PID_NAMESPACE), go(), Reason.ALLOWED_USER,
    ),
    *row(
        "pid-namespace-containers-allowed-not-listed", imds(containers=ALLOW, users=[ALICE]),
        who(STRANGER, setting=Setting.PID_NAMESPACE), go(), Reason.NOT_LISTED,
    ),
    *row(
        "pid-namespace-default-allow", imds(deny_users=[BOB], default=ALLOW),
        who(STRANGER, setting=Setting.PID_NAMESPACE), go(), Reason.CONTAINER,
    ),
    *row(
        "pid-namespace-containers-and-default-allow", imds(containers=ALLOW, deny_users=[BOB], default=ALLOW),
        who(STRANGER, setting=Setting.PID_NAMESPACE), go(), Reason.DEFAULT_ALLOW,
    ),
]  # fmt: skip


USER_NAMESPACES = [
    case
    for name, policy, caller, expected in (
        ("userns-uid-listed-outside", imds(users=[_OUTSIDE]), (_INSIDE,), Reason.CONTAINER),
        ("userns-root", imds(users=[0]), (0, 0), Reason.CONTAINER),
        ("userns-deny-list", imds(deny_users=[BOB], default=ALLOW), (BOB,), Reason.CONTAINER),
        (
            "userns-containers-allowed-outside-listed",
            imds(containers=ALLOW, users=[_OUTSIDE]),
            (_INSIDE,),
            Reason.ALLOWED_USER,
        ),
        (
            "userns-containers-allowed-inside-listed",
            imds(containers=ALLOW, users=[_INSIDE]),
            (_INSIDE,),
            Reason.NOT_LISTED,
        ),
        (
            "userns-containers-allowed-group-outside",
            imds(containers=ALLOW, groups=[STAFF + USER_NAMESPACE_OFFSET]),
            (_INSIDE, CREW, (STAFF,)),
            Reason.ALLOWED_GROUP,
        ),
        (
            "userns-containers-allowed-group-inside",
            imds(containers=ALLOW, groups=[STAFF]),
            (_INSIDE, CREW, (STAFF,)),
            Reason.NOT_LISTED,
        ),
        (
            "userns-slips-past-no-deny-list",
            imds(containers=ALLOW, deny_users=[BOB], default=ALLOW),
            (BOB,),
            Reason.USER_NAMESPACE,
        ),
        (
            "userns-denied-outside",
            imds(containers=ALLOW, deny_users=[_OUTSIDE], default=ALLOW),
            (_INSIDE,),
            Reason.DENIED_USER,
        ),
    )
    for case in row(name, policy, who(*caller, setting=Setting.USER_NAMESPACE), go(), expected, requires=("userns",))
]

# Only decide() is asked. User space can't make a kernel thread that connects.
KERNEL_THREADS = [
    *row("kernel-thread", imds(users=[0]), who(0, 0, setting=Setting.KERNEL_THREAD), go(), Reason.KERNEL_THREAD),
    *row(
        "kernel-thread-default-allow", imds(containers=ALLOW, deny_users=[BOB], default=ALLOW),
        who(0, 0, setting=Setting.KERNEL_THREAD), go(), Reason.KERNEL_THREAD,
    ),
]  # fmt: skip

CASES = [
    *USERS,
    *REAL_EFFECTIVE_FS,
    *GROUPS,
    *DENY_LISTS,
    *AUDIT,
    *TASKS,
    *CONTAINERS,
    *USER_NAMESPACES,
]
