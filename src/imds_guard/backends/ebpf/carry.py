# SPDX-License-Identifier: Apache-2.0
"""Keeps rows of the report through a change of policy: those whose caller the new policy denies, too.

Records belong to a generation, so user space moves them. Hooks write meanwhile: a few counts may be lost, a row is not.
"""

from __future__ import annotations

from typing import NamedTuple

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.image import Items
from imds_guard.backends.ebpf.reader import PROTOCOLS, address_of
from imds_guard.errors import GuardError
from imds_guard.kernel import accounts
from imds_guard.policy.decide import Caller, Destination, Reason, decide
from imds_guard.policy.lock_index import LockIndex
from imds_guard.policy.model import Lock, Policy, Protocol

JUDGED_BY_IDS = frozenset(
    {Reason.DENIED_USER, Reason.DENIED_GROUP, Reason.NOT_LISTED, Reason.CONTAINER, Reason.USER_NAMESPACE}
    | {Reason.TOO_MANY_GROUPS}
)
"""Reasons that another list, default or value of ``containers`` can end."""
NO_ID = 0xFFFFFFFF
"""No list can have this user or group: (uid_t)-1."""


class _Row(NamedTuple):
    reason: int
    lock: int
    who: int
    uid: int
    record: bytes


class Carrier:
    """Judges rows by the new policy. ``numbers``: the number of each of its locks, by name."""

    def __init__(self, policy: Policy, numbers: dict[str, int], generation: int) -> None:
        self._policy = policy
        self._numbers = numbers
        self._generation = generation
        self._index = LockIndex(policy)
        self._locks = {lock.name: lock for lock in policy.locks}
        self._callers: dict[int, Caller] = {}

    def carried(self, items: Items) -> dict[bytes, bytes]:
        """The records of the new generation for those of the old one."""
        found: dict[bytes, bytes] = {}
        for key, record in items:
            _, reason, lock, who, uid = abi.REPORT_KEY.unpack(key)
            number = self._lock_of(_Row(reason, lock, who, uid, record))
            if number is not None:
                new = abi.REPORT_KEY.pack(self._generation, reason, number, who, uid)
                found[new] = merged(found[new], record) if new in found else record
        return found

    def _lock_of(self, row: _Row) -> int | None:
        """The number of the lock that denies the caller now; None where it passes."""
        if row.reason == Reason.UNAPPROVED_SOCKET and not self._policy.strict:
            return None
        if row.lock == abi.NO_LOCK:
            return abi.NO_LOCK
        to = _destination(row.record)
        found = self._index.find(*to)
        if found is None:
            return None
        name, endpoint = found
        lock = self._locks[name]._replace(endpoints=(endpoint,))
        if row.reason in JUDGED_BY_IDS and self._passes(row, lock, to):
            return None
        return self._numbers.get(name)

    def _passes(self, row: _Row, lock: Lock, to: Destination) -> bool:
        """Of callers in user namespaces only the owner is known: they pass where everybody does."""
        caller = self._caller(row.uid) if row.who == abi.WHO_USER else Caller(NO_ID, NO_ID)
        caller = caller._replace(
            pid_namespace_is_initial=row.reason != Reason.CONTAINER,
            user_namespace_is_initial=row.reason != Reason.USER_NAMESPACE and row.who == abi.WHO_USER,
        )
        return decide(self._policy._replace(locks=(lock,)), caller, to).reason.permits

    def _caller(self, uid: int) -> Caller:
        """By /etc/passwd and /etc/group alone: the commands' lock is held, and a name service may hang."""
        if uid not in self._callers:
            self._callers[uid] = _caller_in_files(uid)
        return self._callers[uid]


def _caller_in_files(uid: int) -> Caller:
    try:
        user = accounts.user_in_files_by_id(uid)
        if user is not None:
            return Caller(uid, user.gid, frozenset(accounts.groups_in_files(user)))
    except GuardError:
        pass
    return Caller(uid, NO_ID)


def _destination(record: bytes) -> Destination:
    _, _, _, address, port, protocol, _ = abi.REPORT.unpack(record)
    return Destination(address_of(address), port, PROTOCOLS.get(protocol, Protocol.TCP))


def merged(one: bytes, other: bytes) -> bytes:
    """Two records of one row: the counts together, all else of the earlier one."""
    a, b = abi.REPORT.unpack(one), abi.REPORT.unpack(other)
    first, second = (a, b) if a[1] <= b[1] else (b, a)
    return abi.REPORT.pack(first[0] + second[0], first[1], max(first[2], second[2]), *first[3:])


def shares_of(keys: list[bytes], generation: int) -> dict[bytes, int]:
    """How many rows each share has among these keys."""
    found: dict[bytes, int] = {}
    for key in keys:
        _, _, _, who, uid = abi.REPORT_KEY.unpack(key)
        if who != abi.WHO_OTHERS:
            share = abi.SHARE_KEY.pack(generation, abi.share_of(uid))
            found[share] = found.get(share, 0) + 1
    return found
