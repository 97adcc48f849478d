# SPDX-License-Identifier: Apache-2.0
"""Random packets with the sockets around them: right ones at the edges of what is locked, and wrong ones."""

from __future__ import annotations

import socket
from random import Random
from typing import NamedTuple

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.render_lists import number_lists
from imds_guard.policy.decide import Destination
from imds_guard.policy.filter_numbers import assigned, listeners_of
from imds_guard.policy.filters import FILTER_PORT
from imds_guard.policy.model import Policy, Protocol
from imds_guard.policy.packet import AUTHENTICATION, DESTINATION_OPTIONS, FRAGMENT, HOP_BY_HOP, ROUTING
from tests import generate, packets
from tests.packets import Extension, Ipv4, Ipv6, extension, fragment_header
from tests.vm.generate import chance, colliding
from tests.vm.values import (
    CLOSE,
    ESTABLISHED,
    ETH_P_IP,
    ETH_P_IPV6,
    IPPROTO_TCP,
    IPPROTO_UDP,
    LISTEN,
    NEW_SYN_RECV,
    SYN_RECV,
    SYN_SENT,
    TIME_WAIT,
    Packet,
    Socket,
    mapped,
)

LOOPBACK = 1
_ENDS = 32
NOT_FULL = (TIME_WAIT, NEW_SYN_RECV)
"""States in which the kernel has no whole socket, so no mark: sk_fullsock() in include/net/sock.h."""

_SOME_IPV4 = bytes((169, 254, 169, 254))
_OTHER_PROTOCOLS = (packets.ICMP, packets.IPV6_ICMP, packets.NO_NEXT_HEADER, packets.SCTP, 0, 4, 41, 50, 51, 135, 255)
_FLAGS = (
    *(packets.ACK, packets.SYN, packets.SYN | packets.ACK, packets.FIN | packets.ACK, packets.PSH | packets.ACK),
    *(packets.RST, packets.RST | packets.ACK, packets.RST | packets.SYN, packets.FIN, 0, 0xFF, 0xC0),
)
_OFFSETS = (1, 2, 0x80, 0xFF, 0x100, 0x1000, 0x1F00, 0x1FFF)
_KINDS = (HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION_OPTIONS, DESTINATION_OPTIONS)
_ROUTING_TYPES = (0, 2, 3, 4)
_STATES = (ESTABLISHED, ESTABLISHED, TIME_WAIT, NEW_SYN_RECV, SYN_SENT, SYN_RECV, LISTEN, CLOSE)
_KINDS_OF_SOCKETS = (
    *((socket.SOCK_STREAM, IPPROTO_TCP),) * 4,
    *((socket.SOCK_RAW, IPPROTO_TCP), (socket.SOCK_RAW, socket.IPPROTO_RAW), (socket.SOCK_DGRAM, IPPROTO_UDP)),
    (socket.SOCK_STREAM, socket.IPPROTO_SCTP),
)


class PacketCase(NamedTuple):
    """A packet, and the sockets that the kernel has. The packet's own is the first, where it has one."""

    packet: Packet
    sockets: tuple[Socket, ...]


class End(NamedTuple):
    """An address as it is in a packet, and a port."""

    address: bytes
    port: int


class Maker:
    """Makes packets that leave under one policy."""

    def __init__(self, r: Random, under: Policy, serial: int) -> None:
        self._r, self._marks = r, MarkMaker(under, serial)
        self._ends = {ipv4: [_end(r, under, ipv4) for _ in range(_ENDS)] for ipv4 in (False, True)}

    def case(self) -> PacketCase:
        """A packet, with sockets that are marked, or not."""
        r = self._r
        ipv4, odd = chance(r, 0.5), chance(r, 0.6)
        (source, _), (destination, protocol) = r.choice(self._ends[ipv4]), r.choice(self._ends[ipv4])
        number = packets.TCP if protocol is Protocol.TCP else packets.UDP
        if chance(r, 0.04):
            number = r.choice((*_OTHER_PROTOCOLS, r.randrange(256)))
        payload = _payload(r, number, source.port, destination.port)
        if odd:
            make = _odd_ipv4 if ipv4 else _odd_ipv6
            data = _damaged(r, make(r, source.address, destination.address, number, payload))
        elif ipv4:
            data = Ipv4(source.address, destination.address, number).packet(payload)
        else:
            data = Ipv6(source.address, destination.address, number).packet(payload)
        packet = Packet(
            data,
            protocol=_ethertype(r, ipv4),
            interface=r.choice((LOOPBACK, LOOPBACK, LOOPBACK, 0, 2, 1 << 24)),
            socket=None if chance(r, 0.25) else 0,
            uid=r.choice((0, 1001, 0xFFFE, 0xFFFFFFFE)),
        )
        return PacketCase(packet, tuple(_sockets(r, source, destination, self._marks)))


def _end(r: Random, under: Policy, ipv4: bool) -> tuple[End, Protocol]:
    wanted = generate.destination(r, under)
    listeners = listeners_of(under, assigned(under))
    if listeners and chance(r, 0.3):
        wanted = Destination(r.choice(listeners).address, FILTER_PORT)
    whole = abi.address_bytes(wanted.address if chance(r, 0.97) else r.choice(colliding()))
    if chance(r, 0.03):
        whole = mapped(bytes(4)) if chance(r, 0.7) else bytes(16)
    if ipv4:
        whole = whole[12:] if whole[:12] == mapped(b"") else _SOME_IPV4
    return End(whole, wanted.port), wanted.protocol


def _ethertype(r: Random, ipv4: bool) -> int:
    if chance(r, 0.01):
        return r.choice((0, 0x0806, 0x88CC, ETH_P_IP, ETH_P_IPV6))
    return ETH_P_IP if ipv4 else ETH_P_IPV6


def _payload(r: Random, protocol: int, source: int, destination: int) -> bytes:
    if protocol == packets.UDP:
        return packets.udp(source, destination, bytes(r.choice((0, 0, 5))))
    return packets.tcp(source, destination, r.choice(_FLAGS), bytes(r.choice((0, 0, 5))))


def _odd_ipv4(r: Random, source: bytes, destination: bytes, protocol: int, payload: bytes) -> bytes:
    fragment = 0
    if chance(r, 0.3):
        flags = r.choice((0, packets.DONT_FRAGMENT, packets.MORE_FRAGMENTS, 0x8000))
        fragment = flags | (r.choice(_OFFSETS) if chance(r, 0.5) else 0)
    head = Ipv4(source, destination, protocol, fragment, options=r.randbytes(r.choice((0, 0, 0, 4, 8, 40))))
    if chance(r, 0.04):
        head = head._replace(words=r.randrange(16))
    if chance(r, 0.04):
        head = head._replace(version=r.randrange(16))
    return head.packet(payload)


def _odd_ipv6(r: Random, source: bytes, destination: bytes, protocol: int, payload: bytes) -> bytes:
    length = r.choice((0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 6, 7, 8, 9))
    version = 6 if chance(r, 0.96) else r.randrange(16)
    chain = [_extension(r) for _ in range(length)]
    return Ipv6(source, destination, protocol, chain, version).packet(payload)


def _extension(r: Random) -> Extension:
    kind = r.choice(_KINDS)
    if kind == FRAGMENT:
        offset = r.choice(_OFFSETS) if chance(r, 0.3) else 0
        return fragment_header(offset, more=chance(r, 0.4), reserved=r.choice((0, 0, 1, 255)), bits=r.choice((0, 0, 6)))
    length = r.choice((0, 0, 0, 1, 2, 3)) if chance(r, 0.98) else 255
    made = extension(kind, length, bytes((r.choice(_ROUTING_TYPES), r.randrange(3))) + r.randbytes(4))
    return made if chance(r, 0.97) else made._replace(length=r.randrange(256))  # its length is a lie


def _damaged(r: Random, data: bytes) -> bytes:
    """The packet as it is, cut short, or with another byte somewhere."""
    if chance(r, 0.08):
        return data[: r.randrange(len(data) + 1)]
    if chance(r, 0.05):
        at = r.randrange(len(data))
        return data[:at] + r.randbytes(1) + data[at + 1 :]
    return data if chance(r, 0.995) else r.randbytes(r.randrange(70))


# --- sockets --------------------------------------------------------------------------------------------------------


class MarkMaker:
    """Makes marks of this policy and of others, for members of its lists and for strangers."""

    def __init__(self, under: Policy, serial: int) -> None:
        self._serial = serial
        self._listeners = listeners_of(under, assigned(under))
        self._lists = len(number_lists(under))
        self._users = [uid for lock in under.locks for uid in sorted(lock.allow.users | lock.deny.users)] or [5]
        self._users += [] if under.filter_uid is None else [under.filter_uid]
        self._groups = [gid for lock in under.locks for gid in sorted(lock.listed_groups)] or [5]

    def mark(self, r: Random) -> bytes | None:
        """struct ig_mark, or None for a socket without one."""
        if chance(r, 0.25):
            return None
        serial = self._serial
        if chance(r, 0.5):
            serial = r.choice((0, serial ^ 1, serial ^ 1 << 40, serial + 1))
        if self._listeners and chance(r, 0.4):
            one = r.choice(self._listeners)
            there = one.target_number << 8 | one.number
            return abi.MARK.pack(
                serial,
                r.choice(self._users),
                there ^ (chance(r, 0.2) << r.randrange(17)),
                abi.FILTER_LIST,
                abi.MARK_FILTER,
                0,
            )
        numbers = (abi.NO_LIST, self._lists, 0)
        return abi.MARK.pack(
            serial,
            r.choice(self._users) if chance(r, 0.8) else r.choice(self._groups),
            r.choice(self._groups) if chance(r, 0.8) else r.choice(self._users),
            r.randrange(self._lists) if chance(r, 0.85) else r.choice(numbers),
            r.choice((0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 255)),
            r.randrange(2),
        )

    def earlier(self, r: Random) -> bytes:
        """struct ig_earlier: some places are empty."""
        made = [self.mark(r) if chance(r, 0.5) else None for _ in range(abi.EARLIER_MARKS)]
        return b"".join(mark or bytes(abi.MARK.size) for mark in made)


def _sockets(r: Random, source: End, destination: End, marks: MarkMaker) -> list[Socket]:
    nowhere = End(bytes(len(source.address)), 0)
    local, remote = (source, destination) if chance(r, 0.4) else (nowhere, nowhere)
    sockets = [_socket(r, local, remote, r.choice(_STATES), marks)]
    if chance(r, 0.65):
        sockets.append(_near(r, _socket(r, destination, source, r.choice(_STATES), marks)))
    if chance(r, 0.4):
        sockets.append(_near(r, _socket(r, source, destination, r.choice(_STATES), marks)))
    if chance(r, 0.15):
        sockets.append(_socket(r, End(nowhere.address, destination.port), nowhere, LISTEN, marks))
    return sockets


def _socket(r: Random, local: End, remote: End, state: int, marks: MarkMaker) -> Socket:
    full = state not in NOT_FULL
    mark = marks.mark(r) if full else None
    approved = mark is not None and abi.MARK.unpack(mark)[4] != 0
    earlier = marks.earlier(r) if approved and chance(r, 0.4) else None
    made = Socket(local.address, remote.address, local.port, remote.port, state, mark, earlier, full=full)
    if chance(r, 0.5):
        return made
    kind, protocol = r.choice(_KINDS_OF_SOCKETS)
    acked = r.choice((0, 0, 0, 1, 2, 1 << 32, (1 << 64) - 1))
    first = r.getrandbits(32)
    if full and chance(r, 0.3):
        made = made._replace(mark=abi.MARK.pack(0, 0, first, 0, abi.MARK_ACCEPTED, 0))
        first = r.choice((first, first, first + 1))
    return made._replace(type=kind, protocol=protocol, acked=acked, snd_una=(first + acked) & 0xFFFFFFFF)


def _near(r: Random, one: Socket) -> Socket:
    """The socket, or one that differs in an address or a port, so that a look-up does not find it."""
    if chance(r, 0.9):
        return one
    other = one.local[:-1] + bytes((one.local[-1] ^ 1,))
    port = (one.remote_port + 1) & 0xFFFF
    return r.choice((one._replace(local=other), one._replace(remote=other), one._replace(remote_port=port)))
