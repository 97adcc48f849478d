# SPDX-License-Identifier: Apache-2.0
"""The records that the hooks write into the ring buffer (struct ig_event), decoded."""

from __future__ import annotations

from typing import NamedTuple

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.reader import PROTOCOLS, address_of, reason_of
from imds_guard.policy.decide import Reason
from imds_guard.policy.model import Address, Protocol

HOOK_NAMES = {
    abi.HOOK_CONNECT4: "connect4",
    abi.HOOK_CONNECT6: "connect6",
    abi.HOOK_SENDMSG4: "sendmsg4",
    abi.HOOK_SENDMSG6: "sendmsg6",
    abi.HOOK_EGRESS: "egress",
}
VERDICT_NAMES = {abi.VERDICT_DENIED: "denied", abi.VERDICT_AUDITED: "audited", abi.VERDICT_ALLOWED: "allowed"}
_VERDICT_OFFSET = 83


class Record(NamedTuple):
    """struct ig_event. For a packet (hook ``egress``) the kernel knows no process: pid, tgid and cgroup_id are 0."""

    time_ns: int
    """CLOCK_BOOTTIME."""
    cgroup_id: int
    netns_cookie: int
    pid: int
    """The thread."""
    tgid: int
    """The process."""
    fsuid: int
    fsgid: int
    groups: int
    """The number of supplementary groups."""
    address: Address
    port: int
    protocol: Protocol | None
    lock: int | None
    """The number of the lock in ``generation``."""
    generation: int
    comm: bytes
    """The caller chooses it."""
    hook: str
    reason: Reason
    verdict: str
    """``denied``, ``audited`` (denied by the policy, let through in audit mode) or ``allowed``."""


def decode(raw: bytes) -> Record:
    """The record in the 88 bytes of a struct ig_event. Raises GuardError for a reason that is not known."""
    time_ns, cgroup_id, netns, pid, tgid, fsuid, fsgid, groups, port, lock, *rest = abi.EVENT.unpack(raw)
    address, comm, generation, hook, reason, verdict, protocol = rest
    return Record(
        time_ns,
        cgroup_id,
        netns,
        pid,
        tgid,
        fsuid,
        fsgid,
        groups,
        address_of(address),
        port,
        PROTOCOLS.get(protocol),
        None if lock == abi.NO_LOCK else lock,
        generation,
        comm.split(b"\0")[0],
        HOOK_NAMES.get(hook, str(hook)),
        reason_of(reason),
        VERDICT_NAMES.get(verdict, str(verdict)),
    )


def similarity_key(raw: bytes) -> bytes:
    """Equal for records that differ only in time, process, thread and number of groups. Slices are fast in a flood."""
    return raw[8:24] + raw[32:40] + raw[44:]


def process_key(raw: bytes) -> bytes:
    """The bytes of ``tgid``."""
    return raw[28:32]


def is_allowed(raw: bytes) -> bool:
    """True for a record of a connect that the policy allows."""
    return raw[_VERDICT_OFFSET] == abi.VERDICT_ALLOWED
