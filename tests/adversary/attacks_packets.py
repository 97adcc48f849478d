# SPDX-License-Identifier: Apache-2.0
"""Attacks by packets that are sent without a connect."""

from __future__ import annotations

import ctypes
import fcntl
import os
import secrets
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Callable

from tests.adversary import privileges, remote
from tests.adversary.model import Attack, Run, Verdict, Way
from tests.adversary.packets import (
    Flow,
    Receive,
    Send,
    ask_by_datagram,
    ask_in_fragments,
    ask_with_options,
    shake_hands_and_ask,
    udp_packet_ipv6,
)
from tests.adversary.privileges import CAP_NET_ADMIN, CAP_NET_RAW
from tests.adversary.scene import (
    ATTACKER,
    ATTACKER_GID,
    IPV4,
    IPV6,
    OPEN6,
    PORT,
    WAIT_S,
    Scene,
    as_attacker,
    as_root,
    by_attacker,
)
from tests.adversary.talk import answer, make_socket, there
from tests.adversary.xdp import XdpSender

_ETH_P_ALL, _ETH_P_IP = 0x0003, 0x0800  # include/uapi/linux/if_ether.h
IPV6_HDRINCL = 36  # include/uapi/linux/in6.h
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # include/uapi/linux/if_tun.h
SOL_PACKET, PACKET_QDISC_BYPASS = 263, 20  # include/linux/socket.h, include/uapi/linux/if_packet.h
IP_TRANSPARENT = 19  # include/uapi/linux/in.h
MANY = 9
"""A number of extension headers: more than the guard reads, fewer than 12, which Linux 7.3 refuses."""
_OPEN_PORT = 53
_CABLE = ("cable",)
NOBODY = "10.66.66.66"
"""An address that is routed to lo but not assigned: the kernel does not answer what the service sends to it."""
BEHIND_THE_TUNNEL = "10.77.0.2"

_libc = ctypes.CDLL(None, use_errno=True)

Ask = Callable[[Flow, Send, Receive], bytes]


def _from(source: str) -> Flow:
    """A flow from a new port: the service may still have the connection of another attack."""
    return Flow(source, 32_768 + secrets.randbelow(28_000), IPV4, PORT)


def _sniffer(interface: str = "lo") -> socket.socket:
    """A packet socket that receives every packet of an interface (packet(7))."""
    one = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
    one.bind((interface, _ETH_P_ALL))
    one.settimeout(WAIT_S)
    return one


def _raw_ip(ask: Ask) -> Run:
    """Sends through a raw socket, with its own IP header (IP_HDRINCL in raw(7))."""

    def attack() -> bytes:
        with _sniffer() as seen, socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as one:
            return ask(_from(NOBODY), lambda packet: one.sendto(packet, (IPV4, 0)), lambda: seen.recv(65536))

    return as_attacker(attack, CAP_NET_RAW)


def ask_by_raw_ipv6(to: str, options: int = 0, *, fragment: bool = False) -> bytes:
    """The answer to a datagram that is sent through a raw socket. An ordinary socket receives it."""
    with make_socket(OPEN6, socket.SOCK_DGRAM) as waiting:
        waiting.bind((OPEN6, 0))
        flow = Flow(OPEN6, waiting.getsockname()[1], to, PORT)
        with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW) as one:
            one.setsockopt(socket.IPPROTO_IPV6, IPV6_HDRINCL, 1)
            one.sendto(udp_packet_ipv6(flow, b"?", options, fragment=fragment), (to, 0))
        return answer(waiting)


def _raw_ipv6(options: int = 0, *, fragment: bool = False) -> Run:
    return as_attacker(lambda: ask_by_raw_ipv6(IPV6, options, fragment=fragment), CAP_NET_RAW)


def _raw_protocol() -> bytes:
    """Sends through a connected raw socket of protocol UDP. The payload has the UDP header."""
    with make_socket(OPEN6, socket.SOCK_DGRAM) as waiting:
        waiting.bind((OPEN6, 0))
        flow = Flow(OPEN6, waiting.getsockname()[1], IPV6, PORT)
        with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_UDP) as one:
            one.bind((OPEN6, 0))
            one.connect(there(IPV6))
            one.send(udp_packet_ipv6(flow, b"?")[40:])
        return answer(waiting)


# --- a routing header -------------------------------------------------------------------------------------------------

_ANAGRAM = "fd00:ec2::254:0"
"""An address that is not locked. It has the words of IPV6 in another order, so UDP's checksum is right for both."""


def add_routing_header(one: socket.socket) -> None:
    """A segment routing header without segments left: the kernel puts its segment into the header as the destination.

    Sources: RFC 8754, section 2; ipv6_push_rthdr4() in Linux net/ipv6/exthdrs.c.
    """
    header = struct.pack("!6B2x", 0, 2, 4, 0, 0, 0) + socket.inet_pton(socket.AF_INET6, IPV6)
    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RTHDR, header)


def _datagram_by_routing_header() -> bytes:
    with make_socket(OPEN6, socket.SOCK_DGRAM) as one:
        one.bind((OPEN6, 0))
        add_routing_header(one)
        one.sendto(b"?", (_ANAGRAM, PORT))
        return answer(one)


def _raw_by_routing_header() -> bytes:
    with make_socket(OPEN6, socket.SOCK_DGRAM) as waiting:
        waiting.bind((OPEN6, 0))
        flow = Flow(OPEN6, waiting.getsockname()[1], IPV6, PORT)
        with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_UDP) as one:
            one.bind((OPEN6, 0))
            add_routing_header(one)
            one.sendto(udp_packet_ipv6(flow, b"?")[40:], (_ANAGRAM, 0))
        return answer(waiting)


def _by_routing_header(attack: Callable[[], bytes], *capabilities: int) -> Run:
    """The service's machine takes part in segment routing; else it drops such packets."""

    def prepared() -> bytes:
        for interface in ("all", "lo"):
            with open(f"/proc/sys/net/ipv6/conf/{interface}/seg6_enabled", "w", encoding="ascii") as file:
                file.write("1")
        return by_attacker(attack, *capabilities)

    return lambda scene: scene.inside(prepared)


# --- forged answers ---------------------------------------------------------------------------------------------------


def _remotely(prepare: Callable[[socket.socket, Flow], object]) -> Run:
    """Forges a handshake with a service on another machine, so that it looks like an answer to that machine.

    ``prepare`` makes a socket seem the owner of the forged packets: it gets the port of the service, and the guard
    has approved it for an open port of the service's address.
    """

    def attack() -> bytes:
        flow = _from(remote.NOBODY)
        with make_socket() as bait, _sniffer(remote.CABLE) as seen:
            bait.connect_ex((IPV4, _OPEN_PORT))
            unspecified = struct.pack("=H14x", socket.AF_UNSPEC)
            _libc.connect(bait.fileno(), unspecified, len(unspecified))
            prepare(bait, flow)
            with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as one:
                return shake_hands_and_ask(flow, lambda packet: one.sendto(packet, (IPV4, 0)), lambda: seen.recv(65536))

    def prepared(scene: Scene) -> bytes:
        with remote.remote_service(scene):
            remote.allow_low_ports()
            return by_attacker(attack, CAP_NET_RAW)

    return lambda scene: scene.inside(lambda: prepared(scene))


def _listen(bait: socket.socket, flow: Flow) -> None:
    bait.bind(("0.0.0.0", PORT))
    bait.listen(1)


def _begin_a_connect(bait: socket.socket, flow: Flow) -> None:
    """Connects from the service's address to the source of the forged packets (IP_TRANSPARENT in ip(7))."""
    bait.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
    bait.bind((IPV4, PORT))
    bait.setblocking(False)
    bait.connect_ex((flow.source, flow.source_port))


def _link_layer(ask: Ask, *options: tuple[int, int]) -> Run:
    """Sends frames through a packet socket, below IP (packet(7))."""

    def attack() -> bytes:
        with _sniffer() as one:
            for option in options:
                one.setsockopt(SOL_PACKET, *option)
            to = ("lo", _ETH_P_IP, 0, 0, bytes(6))
            return ask(_from(NOBODY), lambda packet: one.sendto(packet, to), lambda: one.recv(65536))

    return as_attacker(attack, CAP_NET_RAW)


def _by_an_interface_above(kind: str) -> Run:
    """Sends frames through an interface that stands on that of the machine, and has an address of its own."""

    def attack() -> bytes:
        flow = _from(remote.NOBODY)
        with _sniffer(remote.CABLE) as seen, socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM) as one:
            to = ("above", _ETH_P_IP, 0, 0, bytes.fromhex(remote.FAR_MAC.replace(":", "")))
            return shake_hands_and_ask(flow, lambda packet: one.sendto(packet, to), lambda: seen.recv(65536))

    def prepared(scene: Scene) -> bytes:
        with remote.remote_service(scene):
            privileges.command("ip", "link", "add", "above", "link", remote.CABLE, "type", *kind.split())
            privileges.command("ip", "link", "set", "above", "up")
            return by_attacker(attack, CAP_NET_RAW)

    return lambda scene: scene.inside(lambda: prepared(scene))


def _xdp(ask: Ask) -> Run:
    """Sends frames by an AF_XDP socket."""

    def attack() -> bytes:
        with _sniffer() as seen, XdpSender("lo") as one:
            head = bytes(12) + struct.pack("!H", _ETH_P_IP)
            return ask(_from(NOBODY), lambda packet: one.send(head + packet), lambda: seen.recv(65536))

    return as_attacker(attack, CAP_NET_RAW)


@contextmanager
def _tunnel() -> Iterator[int]:
    """A tun interface, whose packets this process reads and writes (Documentation/networking/tuntap.rst)."""
    with ExitStack() as stack:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"adversary", _IFF_TUN | _IFF_NO_PI))
        privileges.command("ip", "address", "add", "10.77.0.1/24", "dev", "adversary")
        privileges.command("ip", "link", "set", "adversary", "up")
        yield fd


def _through_a_tunnel() -> bytes:
    """Writes packets to a tun interface: the kernel receives them as if from another machine."""
    with _tunnel() as fd:
        privileges.become_user(ATTACKER, ATTACKER_GID, capabilities=[CAP_NET_ADMIN])

        def receive() -> bytes:
            if not select.select([fd], [], [], WAIT_S)[0]:
                raise TimeoutError("nothing came out of the tunnel")
            return os.read(fd, 65536)

        return shake_hands_and_ask(_from(BEHIND_THE_TUNNEL), lambda packet: os.write(fd, packet), receive)


ATTACKS = (
    Attack(
        "raw-ip",
        "Raw IP sockets with `CAP_NET_RAW`: forged packets and whole TCP connections (`IP_HDRINCL`), fragments, "
        "options, extension headers",
        Verdict.STRICT,
        "There is no connect to judge. With `--strict`, packets of a socket that no hook has approved are dropped.",
        {
            "tcp": Way(_raw_ip(shake_hands_and_ask)),
            "udp": Way(_raw_ip(ask_by_datagram)),
            "remote": Way(_remotely(lambda bait, flow: None), _CABLE),
            "answer-to-a-listener": Way(_remotely(_listen), _CABLE),
            "answer-to-a-connect": Way(_remotely(_begin_a_connect), _CABLE),
            "options": Way(_raw_ip(ask_with_options)),
            "fragments": Way(_raw_ip(ask_in_fragments)),
            "ipv6": Way(_raw_ipv6()),
            "ipv6-extension": Way(_raw_ipv6(1)),
            "ipv6-fragment": Way(_raw_ipv6(fragment=True)),
            "ipv6-many-extensions": Way(_raw_ipv6(MANY, fragment=True), ("many-extensions",)),
            "protocol-udp": Way(as_attacker(_raw_protocol, CAP_NET_RAW)),
        },
    ),
    Attack(
        "routing-header",
        "An IPv6 routing header (type 4, no segments left) with the locked address, on a UDP or raw socket that sends "
        "to another address",
        Verdict.STRICT,
        "The hooks see the address that the caller gave. The packet has the locked one, and `--strict` judges it by "
        "that. Linux takes such a packet only where `seg6_enabled` is on, and refuses this header in a control "
        "message. TCP can't connect so: the answer comes from another address than the one that was asked.",
        {
            "udp": Way(_by_routing_header(_datagram_by_routing_header), ("routing-header",), own_network=True),
            "raw": Way(_by_routing_header(_raw_by_routing_header, CAP_NET_RAW), ("routing-header",), own_network=True),
        },
    ),
    Attack(
        "packet-socket",
        "Packet sockets (`AF_PACKET`) with `CAP_NET_RAW`: frames below IP",
        Verdict.OPEN,
        "No cgroup hook sees them, and a filter at the egress of interfaces would not see all of them "
        "([why](how-it-works.md#packet-sockets)). Remove `CAP_NET_RAW` from services and containers.",
        {
            "tcp": Way(_link_layer(shake_hands_and_ask)),
            "udp": Way(_link_layer(ask_by_datagram)),
            "qdisc-bypass": Way(_link_layer(shake_hands_and_ask, (PACKET_QDISC_BYPASS, 1))),
            "macvlan": Way(_by_an_interface_above("macvlan mode bridge"), (*_CABLE, "macvlan")),
            "ipvlan": Way(_by_an_interface_above("ipvlan mode l2"), (*_CABLE, "ipvlan")),
        },
    ),
    Attack(
        "xdp-socket",
        "AF_XDP sockets with `CAP_NET_RAW`: frames that go to the driver, past every filter for packets that leave",
        Verdict.OPEN,
        "No hook sees them. Remove `CAP_NET_RAW` from services and containers.",
        {"tcp": Way(_xdp(shake_hands_and_ask), ("xdp",)), "udp": Way(_xdp(ask_by_datagram), ("xdp",))},
    ),
    Attack(
        "forwarded-packets",
        "Packets that this machine forwards: containers and virtual machines, a beginning in two fragments, a forged "
        "first packet, IPv4 and IPv6, with and without conntrack",
        Verdict.BLOCKED,
        "No user is known for them, so the rules for forwarded packets let none begin a connection, before the rules "
        "of Docker and firewalls are asked. Fragments of TCP to a locked address are dropped. Not with "
        '`--forwarded leave` or `containers = "allow"`.',
        test="kernel/test_forwarded_packets.py",
    ),
    Attack(
        "tunnel",
        "A tun interface with `CAP_NET_ADMIN`: packets that seem to come from another machine",
        Verdict.OPEN,
        "No process of this machine sends them. If the locked address is on another machine they are forwarded, and "
        "the rules for forwarded packets reject them (`tests/kernel/test_forwarded.py`).",
        {"tun": Way(as_root(_through_a_tunnel), ("tun",), own_network=True)},
    ),
)
