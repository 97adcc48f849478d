# SPDX-License-Identifier: Apache-2.0
"""The parts of a row of the conformance table, and the arguments of ``decide()`` that follow from them."""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from imds_guard.policy.decide import Caller, Destination, Reason, Source
from imds_guard.policy.model import Policy, Protocol
from tests.conformance.witness import BROKEN

USER_NAMESPACE_OFFSET = 500_000
"""In the user namespaces of the table, inside ID + this number = outside ID."""


class Setting(enum.Enum):
    """The kind of task that takes the caller's IDs and connects."""

    PROCESS = "a process"
    THREAD = "a thread with its own IDs; the process stays root"
    CHILD = "a child of a process with other groups"
    UNSHARED_PID = "a process that called unshare(CLONE_NEWPID), which moves only its children"
    PID_NAMESPACE = "the first process of a PID namespace"
    USER_NAMESPACE = "a process in a user namespace with mapped IDs"
    NETWORK_NAMESPACE = "a process in a network namespace that was made after the policy was applied"
    KERNEL_THREAD = "a kernel thread, which no test can make"


@dataclass(frozen=True)
class Who:
    """The IDs of the caller: real, effective and saved. The fs IDs are the effective ones unless they are given."""

    uids: tuple[int, int, int]
    gids: tuple[int, int, int]
    groups: tuple[int, ...] = ()
    fsuid: int | None = None
    fsgid: int | None = None
    setting: Setting = Setting.PROCESS
    socket_first: bool = False
    """Root makes the socket before the IDs are taken."""
    parent_groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class PacketInfo:
    """An IP_PKTINFO control message (ip(7)). The interface is lo, or the kernel chooses it."""

    interface: bool = False
    source: str | None = None


@dataclass(frozen=True)
class Attempt:
    """How the caller connects. ``form`` is a key of attempts.FORMS."""

    to: str
    port: int = 80
    form: str = "connect"
    bind: str | None = None
    device: bool = False
    """The socket is bound to lo by SO_BINDTODEVICE. The primary IPv4 address of lo is the locked one."""
    packet_info: PacketInfo | None = None
    greeted: bool = False
    """The listener of a filter accepts: it sends its own address."""

    @property
    def protocol(self) -> Protocol:
        """UDP for forms whose name begins with "udp", else TCP."""
        return Protocol.UDP if self.form.startswith("udp") else Protocol.TCP


@dataclass(frozen=True)
class Case:
    """One row: a policy, a caller, an attempt, and the expected verdict with its reason."""

    name: str
    family: str
    policy: Policy
    who: Who
    attempt: Attempt
    expected: Reason
    allowed: bool
    requires: tuple[str, ...] = ()
    """Keys of probes.PROBES: features that the kernel must have, else the row is skipped."""
    filter: str | None = None
    """The name of the caller's filter."""

    @property
    def id(self) -> str:
        """``name/family``, unique in the table."""
        return f"{self.name}/{self.family}"


def model_caller(case: Case) -> Caller:
    """The credentials that the kernel has for the connecting task, as IDs of the initial user namespace."""
    who = case.who
    inside_user_namespace = who.setting is Setting.USER_NAMESPACE
    offset = USER_NAMESPACE_OFFSET if inside_user_namespace else 0
    return Caller(
        fsuid=offset + (who.uids[1] if who.fsuid is None else who.fsuid),
        fsgid=offset + (who.gids[1] if who.fsgid is None else who.fsgid),
        groups=frozenset(offset + gid for gid in who.groups),
        pid_namespace_is_initial=who.setting is not Setting.PID_NAMESPACE,
        user_namespace_is_initial=not inside_user_namespace,
        kernel_thread=who.setting is Setting.KERNEL_THREAD,
        repeated_groups=len(who.groups) - len(set(who.groups)),
    )


def model_destination(case: Case) -> Destination:
    """The destination as the caller gives it to the system call."""
    attempt = case.attempt
    return Destination(ipaddress.ip_address(attempt.to), attempt.port, attempt.protocol)


def model_source(case: Case) -> Source:
    """The source address as the kernel sees it. An IP_PKTINFO replaces the socket's own address, even if it has none.

    Source: udp_sendmsg() in Linux net/ipv4/udp.c, ``ipc.addr``, and ip_cmsg_send() in net/ipv4/ip_sockglue.c.
    """
    attempt = case.attempt
    own = attempt.bind if attempt.packet_info is None else attempt.packet_info.source
    by_device = attempt.device or attempt.protocol is Protocol.UDP
    return Source(None if own is None else ipaddress.ip_address(own), by_device)


def model_filter_listens(case: Case) -> bool:
    """Whether the listener of the caller's filter is there: as the name of the filter says, in the first namespace."""
    return case.filter not in BROKEN and case.who.setting is not Setting.NETWORK_NAMESPACE


def unique(cases: Iterable[Case]) -> tuple[Case, ...]:
    """The same cases. Raises ValueError when two have the same id."""
    table = tuple(cases)
    ids = [case.id for case in table]
    repeated = sorted({one for one in ids if ids.count(one) > 1})
    if repeated:
        raise ValueError(f"rows with the same id: {', '.join(repeated)}")
    return table
