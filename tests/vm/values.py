# SPDX-License-Identifier: Apache-2.0
"""What the machine is given, and what it answers: tasks, connects, packets, sockets, outcomes."""

from __future__ import annotations

import ipaddress
import socket as socket_module
from dataclasses import dataclass, field
from typing import NamedTuple

from imds_guard.backends.ebpf import abi, record
from imds_guard.policy.decide import Caller, Destination, Reason, Source
from imds_guard.policy.model import Address, Protocol, unmapped
from tests.vm.structs import AttemptC, OutcomeC, PacketC, SocketC, TaskC, Trap

PF_KTHREAD = 0x00200000  # include/linux/sched.h
IPPROTO_TCP, IPPROTO_UDP, IPPROTO_MPTCP = 6, 17, 262
ETH_P_IP, ETH_P_IPV6 = 0x0800, 0x86DD
ESTABLISHED, SYN_SENT, SYN_RECV, TIME_WAIT, CLOSE, LISTEN, NEW_SYN_RECV = 1, 2, 3, 6, 7, 10, 12
"""BPF_TCP_* in include/uapi/linux/bpf.h."""

IPV4_HOOKS = ("connect4", "sendmsg4", "getpeername4")
MESSAGE_HOOKS = ("sendmsg4", "sendmsg6")


def packed(address: str | bytes | Address) -> bytes:
    """An address as 4 or 16 bytes."""
    if isinstance(address, bytes):
        return address
    return (ipaddress.ip_address(address) if isinstance(address, str) else address).packed


def mapped(four: bytes) -> bytes:
    """An IPv4 address as an IPv4-mapped IPv6 address."""
    return bytes(10) + b"\xff\xff" + four


def port_be(port: int) -> int:
    """A port in network byte order, as a number of this machine."""
    return socket_module.htons(port)


# --- who ------------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """The task that connects. IDs as the initial user namespace has them; levels are 0 in initial namespaces."""

    fsuid: int
    fsgid: int
    groups: tuple[int, ...] = ()
    """group_info.gid[]: sorted, as the kernel keeps it. The same group may be there more than once."""
    pid_level: int = 0
    user_ns_level: int = 0
    user_ns_owner: int = 0
    flags: int = 0
    """task_struct.flags (PF_*)."""
    pid: int = 4243
    tgid: int = 4242
    cgroup_id: int = 31337
    netns_cookie: int = 4096
    comm: bytes = b"curl"
    claimed_groups: int | None = None
    """group_info.ngroups, where it is not the number of groups."""

    @property
    def caller(self) -> Caller:
        """The caller as decide() takes it."""
        thread = bool(self.flags & PF_KTHREAD)
        return Caller(
            self.fsuid,
            self.fsgid,
            self.groups_value,
            self.pid_level == 0,
            self.user_ns_level == 0,
            thread,
            repeated_groups=self.ngroups - len(self.groups_value),
        )

    @property
    def groups_value(self) -> frozenset[int]:
        """The groups as decide() takes them."""
        return frozenset(self.groups)

    @property
    def ngroups(self) -> int:
        """group_info.ngroups."""
        return len(self.groups) if self.claimed_groups is None else self.claimed_groups

    def to_c(self) -> TaskC:
        """struct task_facts."""
        facts = TaskC(
            pid_tgid=self.tgid << 32 | self.pid,
            cgroup_id=self.cgroup_id,
            netns_cookie=self.netns_cookie,
            fsuid=self.fsuid,
            fsgid=self.fsgid,
            flags=self.flags,
            pid_level=self.pid_level,
            user_ns_level=self.user_ns_level,
            user_ns_owner=self.user_ns_owner,
            groups=len(self.groups),
            claimed_groups=self.ngroups,
        )
        facts.comm[:] = self.comm.ljust(16, b"\0")
        return facts


# --- where ----------------------------------------------------------------------------------------------------------


class Socket(NamedTuple):
    """A socket. Addresses are packed()."""

    local: bytes = bytes(4)
    remote: bytes = bytes(4)
    local_port: int = 0
    remote_port: int = 0
    state: int = CLOSE
    mark: bytes | None = None
    """struct ig_mark, where it has one."""
    earlier: bytes | None = None
    """struct ig_earlier, where it has one: the marks of earlier calls."""
    device: int = 0
    """SO_BINDTODEVICE."""
    filter_mark: int | None = None
    """The digest that the listener of a filter is marked with."""
    full: bool = True
    """False for TIME_WAIT and for sockets that are only a request."""
    type: int = socket_module.SOCK_STREAM
    protocol: int = IPPROTO_TCP
    acked: int = 1
    """tcp_sock.bytes_acked. The SYN of a connect counts as one."""
    snd_una: int = 1

    def to_c(self) -> SocketC:
        """struct socket_facts."""
        facts = SocketC(
            family=socket_module.AF_INET if len(self.local) == 4 else socket_module.AF_INET6,
            state=self.state,
            local_port=port_be(self.local_port),
            remote_port=port_be(self.remote_port),
            device=self.device,
            full=self.full,
            type=self.type,
            protocol=self.protocol,
            snd_una=self.snd_una,
            bytes_acked=self.acked,
            marked=self.mark is not None,
            marked_earlier=self.earlier is not None,
            filter_marked=self.filter_mark is not None,
        )
        if self.filter_mark is not None:
            facts.filter_mark[:] = (self.filter_mark & 0xFFFFFFFF, self.filter_mark >> 32)
        facts.local[: len(self.local)] = self.local
        facts.remote[: len(self.remote)] = self.remote
        if self.mark is not None:
            facts.mark[: len(self.mark)] = self.mark
        if self.earlier is not None:
            facts.earlier[: len(self.earlier)] = self.earlier
        return facts


class Attempt(NamedTuple):
    """A connect, a sendmsg or a getpeername. Addresses are packed(): 4 bytes for hooks of IPv4, 16 for the others."""

    hook: str
    to: bytes
    port: int
    protocol: int = IPPROTO_TCP
    source: bytes | None = None
    """The address that the socket is bound to."""
    message_source: bytes | None = None
    """msg_src_ip4 and msg_src_ip6, for sendmsg: from the control message IP_PKTINFO."""
    device: int = 0
    family: int | None = None
    """Of the address that was given (0: AF_UNSPEC), where it is not that of the hook."""
    mark: bytes | None = None
    """What the socket has before."""
    repeat: int = 1
    """How often the hook runs. Counts are those of all runs."""
    others: tuple[Socket, ...] = ()
    """Other sockets in the network namespace: listeners of filters. At most ATTEMPT_SOCKETS."""

    @property
    def is_ipv4(self) -> bool:
        """Whether the hook is one for IPv4."""
        return self.hook in IPV4_HOOKS

    @property
    def has_no_address(self) -> bool:
        """A send on a connected socket with a control message: it runs the hook with an address of zeros."""
        return self.hook in MESSAGE_HOOKS and self.family == 0 and self.port == 0

    @property
    def protocol_value(self) -> Protocol | None:
        """The protocol as a policy has it; None for one that no policy locks."""
        if self.protocol in (IPPROTO_TCP, IPPROTO_MPTCP):
            return Protocol.TCP
        return Protocol.UDP if self.protocol == IPPROTO_UDP else None

    @property
    def destination(self) -> Destination | None:
        """The destination as decide() takes it; None for a protocol that no policy locks."""
        protocol = self.protocol_value
        return None if protocol is None else Destination(ipaddress.ip_address(self.to), self.port, protocol)

    @property
    def source_value(self) -> Source:
        """The source as decide() takes it."""
        bound = self.source or b""
        if self.hook == "sendmsg4":
            bound = self.message_source or b""
        elif self.hook == "sendmsg6" and self.message_source and _is_specified(self.message_source):
            bound = self.message_source
        by_device = bool(self.device) or self.protocol == IPPROTO_UDP
        return Source(ipaddress.ip_address(bound) if any(bound) else None, by_device)

    def to_c(self) -> AttemptC:
        """struct attempt."""
        nothing = bytes(4 if self.is_ipv4 else 16)
        own_family = socket_module.AF_INET if self.is_ipv4 else socket_module.AF_INET6
        attempt = AttemptC(
            family=own_family if self.family is None else self.family,
            protocol=self.protocol,
            port=port_be(self.port),
            is_ipv4=self.is_ipv4,
            is_message=self.hook in MESSAGE_HOOKS,
            repeat=self.repeat,
            socket=Socket(self.source or nothing, nothing, device=self.device, mark=self.mark).to_c(),
        )
        attempt.others_len = len(self.others)
        attempt.others[: len(self.others)] = [one.to_c() for one in self.others]
        attempt.to[: len(self.to)] = self.to
        attempt.message_source[: len(nothing)] = self.message_source or nothing
        return attempt


def _is_specified(address: bytes) -> bool:
    return int(unmapped(ipaddress.ip_address(address))) != 0


class Packet(NamedTuple):
    """A packet at egress, from its network header on."""

    data: bytes
    protocol: int = ETH_P_IP
    """EtherType."""
    interface: int = 2
    """1 is loopback."""
    socket: int | None = None
    """The number of the socket that sends it (skb->sk), in the list that the machine was given."""
    uid: int = 0xFFFE
    """bpf_get_socket_uid(); overflowuid when nobody is known."""

    def to_c(self) -> PacketC:
        """struct packet."""
        return PacketC(
            protocol=port_be(self.protocol),
            ifindex=self.interface,
            uid=self.uid,
            socket=-1 if self.socket is None else self.socket,
            len=len(self.data),
        )


# --- what came of it ------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One call of a helper: ``map_lookup_elem`` of ``MEMBERS``."""

    helper: str
    map: abi.Map | None
    instruction: int
    can_fail: bool

    def __str__(self) -> str:
        return self.helper if self.map is None else f"{self.helper}({self.map.name})"


@dataclass(frozen=True)
class Outcome:
    """What one run left behind."""

    returned: int
    """1 lets the connect or the packet through, 0 does not."""
    counts: dict[str, tuple[int, int]]
    """Counters that are not zero: label of the reason (or ``lost-events``, ``report-overflow``) to (enforced,
    audited)."""
    events: int
    """Records in the ring buffer."""
    event: bytes
    """The last record (struct ig_event), empty when there is none."""
    row: tuple[bytes, bytes] | None
    """Key and value of the first row of the report."""
    rows: int
    mark: bytes | None
    """The mark of the socket (of the first one, for a packet)."""
    earlier: bytes | None = None
    """Its marks of earlier calls: struct ig_earlier."""
    to: tuple[bytes, int] | None = None
    """The address in 16 bytes (for hooks of IPv4 4 of them) and the port, where the program has changed them."""
    traps: frozenset[str] = frozenset()
    """What the program must never do and did: structs.Trap. A test fails for any that it does not expect."""
    calls: int = field(default=0, compare=False)
    """Calls of helpers. Forms of the program differ in it."""
    loads: int = field(default=0, compare=False)
    """Plain loads of kernel memory, in the direct forms."""

    @property
    def allowed(self) -> bool:
        """Whether the connect or the packet got through."""
        return self.returned == 1

    @property
    def reason(self) -> str | None:
        """The label of the one reason that was counted; None when nothing was counted."""
        labels = [label for label in self.counts if label not in EXTRA_COUNTERS]
        assert len(labels) <= 1, self
        return labels[0] if labels else None

    @property
    def record(self) -> record.Record | None:
        """The last record of the ring buffer, decoded."""
        return record.decode(self.event) if self.event else None


EXTRA_COUNTERS = ("lost-events", "report-overflow")
_LABELS = (*(reason.label for reason in Reason), *EXTRA_COUNTERS)


def outcome_of(raw: OutcomeC, calls: int = 0, loads: int = 0) -> Outcome:
    """The outcome in a struct outcome."""
    counts = bytes(raw.counts)
    pairs = {label: (counts[2 * n], counts[2 * n + 1]) for n, label in enumerate(_LABELS)}
    return Outcome(
        returned=raw.returned,
        counts={label: pair for label, pair in pairs.items() if any(pair)},
        events=raw.events,
        event=bytes(raw.event)[: abi.EVENT.size] if raw.events else b"",
        row=(bytes(raw.row_key), bytes(raw.row)) if raw.rows else None,
        rows=raw.rows,
        mark=bytes(raw.mark)[: abi.MARK.size] if raw.marked else None,
        earlier=bytes(raw.earlier) if raw.marked_earlier else None,
        to=(bytes(raw.to), socket_module.ntohs(raw.port)) if raw.port or any(raw.to) else None,
        traps=Trap.names(raw.traps),
        calls=calls,
        loads=loads,
    )
