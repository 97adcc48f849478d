# SPDX-License-Identifier: Apache-2.0
"""What a connect or sendmsg must leave behind, from decide() and the meaning of the records in bpf/imds_guard.h."""

from __future__ import annotations

import ctypes
import ipaddress
import struct
from collections.abc import Sequence
from typing import NamedTuple

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.filter_records import parse_numbers
from imds_guard.backends.ebpf.image import Image
from imds_guard.policy.decide import Decision, Reason, decide, resolve_unspecified
from imds_guard.policy.filter_address import Listener
from imds_guard.policy.filter_numbers import listeners_of
from imds_guard.policy.filters import FILTER_PORT, Target
from imds_guard.policy.model import Address, Mode, Policy, Protocol, Verdict
from tests.vm.structs import COUNTS, EARLIER_BYTES, EVENT_BYTES, MARK_BYTES, ROW_BYTES, ROW_KEY_BYTES, OutcomeC
from tests.vm.values import (
    IPPROTO_MPTCP,
    LISTEN,
    MESSAGE_HOOKS,
    Attempt,
    Outcome,
    Socket,
    Task,
    mapped,
    outcome_of,
    port_be,
)

OUTCOME = struct.Struct(f"=Q6I{COUNTS}s{EVENT_BYTES}s{ROW_KEY_BYTES}s{ROW_BYTES}s{MARK_BYTES}s{EARLIER_BYTES}s16s4x")
"""struct outcome."""
assert OUTCOME.size == ctypes.sizeof(OutcomeC)
_GID_AT = OUTCOME.size - 4 - 16 - EARLIER_BYTES - MARK_BYTES + 12
"""Where the group of the mark is in a struct outcome."""

_COUNTED = {
    (reason, audited, times): bytes(2 * reason + audited) + bytes([times])
    for reason in range(abi.REASONS)
    for audited in (False, True)
    for times in (1, 2)
}
_PROTOCOLS = {Protocol.TCP: abi.TCP, Protocol.UDP: abi.UDP}
_MARKS = {
    Reason.ALLOWED_USER: abi.MARK_USER,
    Reason.ALLOWED_GROUP: abi.MARK_GROUP,
    Reason.DEFAULT_ALLOW: abi.MARK_DEFAULT,
}
_NOTHING = b""


class Expected(NamedTuple):
    """A struct outcome, and the groups that may be in its mark: any that allows the caller will do."""

    raw: bytes
    reason: Reason
    mark_groups: frozenset[int] = frozenset()

    @property
    def outcome(self) -> Outcome:
        """The same with names."""
        return outcome_of(OutcomeC.from_buffer_copy(self.raw))

    def accepts(self, raw: bytes) -> bool:
        """Whether a struct outcome is as expected."""
        return raw == self.raw or (bool(self.mark_groups) and raw == self.with_group_of(raw))

    def with_group_of(self, raw: bytes) -> bytes:
        """The expected outcome with the group that another one has in its mark, if it may have that."""
        gid = raw[_GID_AT : _GID_AT + 4]
        if int.from_bytes(gid, "little") not in self.mark_groups:
            return self.raw
        return self.raw[:_GID_AT] + gid + self.raw[_GID_AT + 4 :]


class Model:
    """One policy as it is in the maps. The image tells which number a lock and its lists have."""

    def __init__(self, policy: Policy, image: Image, serial: int, log_allowed: bool, time_ns: int) -> None:
        self.policy, self.serial, self.log_allowed, self.time_ns = policy, serial, log_allowed, time_ns
        self.generation = image.generation
        self._locks: dict[str | None, tuple[int, int]] = {None: (abi.NO_LOCK, abi.NO_LIST)}
        for key, value in image.items[Map.LOCKS]:
            number, name = abi.SMALL_KEY.unpack(key)[1], abi.LOCK.unpack(value)[2].rstrip(b"\0").decode()
            self._locks[name] = number, abi.LOCK.unpack(value)[0]
        self._groups = {lock.name: lock.allow.groups for lock in policy.locks}
        listeners = listeners_of(policy, parse_numbers(image, policy.filters))
        self._listeners = {(one.filter, one.target): one for one in listeners}
        ((_, self._bitmap),) = image.items[Map.ADDRESS_BITMAP]

    def expected(self, task: Task, attempt: Attempt) -> Expected:
        """What ``attempt`` by ``task`` leaves behind. Before it the counters and the report are empty."""
        destination = attempt.destination
        if attempt.has_no_address or destination is None:
            return self._passes(attempt)
        decision = decide(self.policy, task.caller, destination, attempt.source_value)
        if decision.reason is Reason.NOT_LOCKED:
            return self._passes(attempt, self._sets_open_mark(attempt))
        if decision.filter is None:
            return self._decided(task, attempt, decision, None)
        if attempt.hook in MESSAGE_HOOKS:  # they run for UDP alone; for anything else, nothing is redirected there
            return self._decided(task, attempt, decision._replace(reason=Reason.NOT_SERVED), None)
        listener = self._listener(attempt, decision.filter)
        if listener is None or not _is_there(listener, attempt.others):
            decision = decide(self.policy, task.caller, destination, attempt.source_value, filter_listens=False)
        return self._decided(task, attempt, decision, listener)

    def _listener(self, attempt: Attempt, name: str) -> Listener | None:
        """Of the caller's filter for this destination."""
        address = resolve_unspecified(ipaddress.ip_address(attempt.to), attempt.source_value)
        return None if address is None else self._listeners.get((name, Target(address, attempt.port)))

    # --- what is not locked -------------------------------------------------------------------------------------------

    def _passes(self, attempt: Attempt, open_mark: bool = False) -> Expected:
        mark = attempt.mark
        if open_mark:  # the rest of the mark stays as it is
            before = abi.MARK.unpack(mark or bytes(abi.MARK.size))
            mark = abi.MARK.pack(*before[:4], abi.MARK_OPEN, before[5])
        return _expected(Reason.NOT_LOCKED, 1, marked=mark)

    def _sets_open_mark(self, attempt: Attempt) -> bool:
        """Under strict, for TCP to an address that the first look does not exclude."""
        tcp = attempt.protocol_value is Protocol.TCP
        return self.policy.strict and tcp and self.may_be_locked(ipaddress.ip_address(attempt.to))

    def may_be_locked(self, address: Address) -> bool:
        """ig_may_be_locked() in bpf/address.h: an address whose bits are clear is looked at no further."""
        whole = abi.address_bytes(address)
        if not any(whole[:10]) and whole[10:12] in (b"\0\0", b"\xff\xff") and not any(whole[12:]):
            return True
        ipv4 = whole[:12] == bytes(10) + b"\xff\xff"
        first = int.from_bytes(whole[12:14] if ipv4 else whole[:2], "big")
        networks = abi.HOST_BYTES + (0 if ipv4 else abi.NETWORK_BYTES)
        return self._bit(0, abi.host_bit(whole)) or self._bit(networks, first)

    def _bit(self, base: int, bit: int) -> bool:
        word = struct.unpack_from("=I", self._bitmap, base + (bit >> 5) * 4)[0]
        return bool(word >> (bit & 31) & 1)

    # --- what is locked -----------------------------------------------------------------------------------------------

    def _decided(self, task: Task, attempt: Attempt, decision: Decision, listener: Listener | None) -> Expected:
        reason = decision.reason
        if self.policy.strict and attempt.protocol == IPPROTO_MPTCP and reason.permits:
            reason = Reason.UNAPPROVED_SOCKET  # its packets would come from other sockets, without the mark
        audited = (not reason.permits or reason is Reason.FILTERED) and self.policy.mode is Mode.AUDIT
        denied = not reason.permits and not audited
        lock, numbered_list = self._locks[decision.lock]
        if reason is Reason.FILTER_ADDRESS:
            numbered_list = abi.FILTER_LIST
        event = row_key = row = _NOTHING
        if denied or audited or self.log_allowed:
            event = self._event(task, attempt, lock, reason, audited)
        if denied or audited:
            row_key = abi.REPORT_KEY.pack(self.generation, reason, lock, *_who(task))
            row = self._row(task, attempt)
        marked, earlier, groups = attempt.mark, _NOTHING, frozenset[int]()
        to = listener if reason is Reason.FILTERED and not audited else None
        if to is not None and self.policy.strict:
            numbers = to.target_number << 8 | to.number
            marked = abi.MARK.pack(self.serial, task.fsuid, numbers, abi.FILTER_LIST, abi.MARK_FILTER, 0)
        elif self.policy.strict and not denied and attempt.protocol != IPPROTO_MPTCP:
            groups = self._groups_of(task, decision) if reason is Reason.ALLOWED_GROUP else frozenset()
            marked = self._mark(task, reason, numbered_list)
            earlier = self._kept(attempt.mark, numbered_list)
        counts = _COUNTED[reason, audited, attempt.repeat]
        expected = _expected(
            reason, int(not denied), attempt.repeat, counts, event, row_key, row, marked, groups, earlier
        )
        return expected if to is None else _redirected(expected, attempt, to)

    def _groups_of(self, task: Task, decision: Decision) -> frozenset[int]:
        assert decision.lock is not None
        return self._groups[decision.lock] & (task.groups_value | {task.fsgid})

    def _mark(self, task: Task, reason: Reason, numbered_list: int) -> bytes:
        kind = _MARKS.get(reason, abi.MARK_AUDIT)
        unchecked = self.policy.containers is Verdict.ALLOW
        return abi.MARK.pack(self.serial, task.fsuid, 0, numbered_list, kind, unchecked)

    def _kept(self, mark: bytes | None, numbered_list: int) -> bytes:
        """struct ig_earlier after a call for this list: the mark before it, if another list or policy approved it."""
        if mark is None:
            return _NOTHING
        serial, _, _, number, kind, _ = abi.MARK.unpack(mark)
        if not abi.MARK_USER <= kind <= abi.MARK_AUDIT or (serial, number) == (self.serial, numbered_list):
            return _NOTHING
        return (bytes(number % abi.EARLIER_MARKS * abi.MARK.size) + mark).ljust(EARLIER_BYTES, b"\0")

    def _event(self, task: Task, attempt: Attempt, lock: int, reason: Reason, audited: bool) -> bytes:
        allowed = abi.VERDICT_ALLOWED if reason.permits else abi.VERDICT_DENIED
        return abi.EVENT.pack(
            self.time_ns + attempt.repeat - 1,
            task.cgroup_id,
            task.netns_cookie,
            task.pid,
            task.tgid,
            task.fsuid,
            task.fsgid,
            task.ngroups,
            attempt.port,
            lock,
            _judged(attempt),
            task.comm,
            self.generation,
            abi.HOOKS[attempt.hook].number,
            reason,
            abi.VERDICT_AUDITED if audited else allowed,
            _protocol_of(attempt),
        )

    def _row(self, task: Task, attempt: Attempt) -> bytes:
        first, last = self.time_ns, self.time_ns + attempt.repeat - 1
        judged, protocol = _judged(attempt), _protocol_of(attempt)
        return abi.REPORT.pack(attempt.repeat, first, last, judged, attempt.port, protocol, task.comm)


def _judged(attempt: Attempt) -> bytes:
    """The address as it was judged: 0.0.0.0 and :: are resolved, where a hook can know where they lead."""
    address = resolve_unspecified(ipaddress.ip_address(attempt.to), attempt.source_value)
    return abi.address_bytes(ipaddress.IPv4Address(0) if address is None else address)


def _who(task: Task) -> tuple[int, int]:
    """Whom the row of the report is about."""
    return (abi.WHO_NAMESPACES, task.user_ns_owner) if task.user_ns_level else (abi.WHO_USER, task.fsuid)


def _protocol_of(attempt: Attempt) -> int:
    protocol = attempt.protocol_value
    assert protocol is not None
    return _PROTOCOLS[protocol]


def _expected(
    reason: Reason,
    returned: int,
    repeat: int = 1,
    counts: bytes = _NOTHING,
    event: bytes = _NOTHING,
    row_key: bytes = _NOTHING,
    row: bytes = _NOTHING,
    marked: bytes | None = None,
    groups: frozenset[int] = frozenset(),
    earlier: bytes = _NOTHING,
) -> Expected:
    events = repeat if event else 0
    has_mark = marked is not None
    # A socket without a mark has storage of zeros, which nobody reads.
    flags = bool(row), has_mark, bool(earlier)
    kept = marked or _NOTHING, earlier
    raw = OUTCOME.pack(returned, 0, events, *flags, 0, counts, event, row_key, row, *kept, _NOTHING)
    return Expected(raw, reason, groups)


def _redirected(expected: Expected, attempt: Attempt, listener: Listener) -> Expected:
    to = listener.address.packed if attempt.is_ipv4 else mapped(listener.address.packed)
    fields = list(OUTCOME.unpack(expected.raw))
    fields[6], fields[-1] = port_be(FILTER_PORT), to
    return expected._replace(raw=OUTCOME.pack(*fields))


def _is_there(listener: Listener, sockets: Sequence[Socket]) -> bool:
    """Whether the kernel finds the listener: the more specific one of two that could be meant."""
    at = [one for one in sockets if one.local_port == FILTER_PORT and one.state == LISTEN and len(one.local) == 4]
    exact = [one for one in at if one.local == listener.address.packed]
    found = exact or [one for one in at if not any(one.local)]
    return bool(found) and found[0].full and found[0].filter_mark == listener.digest
