# SPDX-License-Identifier: Apache-2.0
"""Attacks by other spellings of the locked address, and by other addresses that lead to it."""

from __future__ import annotations

import socket
import struct
from typing import Callable

from imds_guard.kernel.listeners import sockaddr
from imds_guard.kernel.netns import LOOPBACK_INDEX
from tests.adversary import privileges
from tests.adversary.model import Attack, Verdict, Way
from tests.adversary.rewriters import OVERRIDING, attached, rewriting
from tests.adversary.scene import (
    ALLOWED,
    ALLOWED_GID,
    ATTACKER,
    ATTACKER_GID,
    ATTACKERS_OWN,
    IPV4,
    IPV6,
    LINK_LOCAL,
    MAPPED,
    NAT64,
    NAT64_LISTED,
    OPEN4,
    PORT,
    Scene,
    alongside,
    as_attacker,
    as_root,
    by_attacker,
)
from tests.adversary.talk import answer, ask, fetch, fetch_named, make_socket, there

IP_OPTIONS, IP_UNICAST_IF, IP_PKTINFO = 4, 50, 8  # include/uapi/linux/in.h
_LOOSE_SOURCE_ROUTE = 131  # RFC 791 section 3.1
REWRITTEN = "10.66.66.9"
"""An unused address, which a DNAT rule or a program changes into the locked one."""

SPELLINGS = (
    "0xA9FEA9FE",
    "2852039166",
    "0251.0376.0251.0376",
    "0xa9.0xfe.0xa9.0xfe",
    "169.254.43518",
    "169.16689662",
    "169.254.0251.0xfe",
    "\uff11\uff16\uff19.254.169.254",
    "::ffff:169.254.169.254",
    "::ffff:a9fe:a9fe",
    "0:0:0:0:0:FFFF:A9FE:A9FE",
    "fd00:0ec2:0000:0000:0000:0000:0000:0254",
)


def _spelled(text: str) -> Callable[[], bytes]:
    return lambda: fetch_named(text)


def _with_scope() -> bytes:
    """Connects to an address with a scope ID that it does not need."""
    with make_socket(IPV6) as one:
        one.connect((IPV6, PORT, 0, LOOPBACK_INDEX))
        return ask(one)


def _flow_label() -> bytes:
    with make_socket(IPV6) as one:
        one.connect((IPV6, PORT, 0x12345, 0))
        return ask(one)


# --- 0.0.0.0 --------------------------------------------------------------------------------------------------------


def _zero(bind: str, to: str, kind: int = socket.SOCK_STREAM) -> Callable[[], bytes]:
    """Binds to the locked address and connects to the unspecified one."""

    def attack() -> bytes:
        with make_socket(bind, kind) as one:
            one.bind(sockaddr(bind, 0))
            one.connect((to, PORT))
            return ask(one)

    return attack


def _zero_by_device() -> bytes:
    """Binds to lo and connects to 0.0.0.0, which means the first address of lo: the locked one."""
    with make_socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
        one.connect(("0.0.0.0", PORT))
        return ask(one)


def _zero_by_unicast_interface() -> bytes:
    with make_socket(kind=socket.SOCK_DGRAM) as one:
        one.setsockopt(socket.IPPROTO_IP, IP_UNICAST_IF, struct.pack("!I", LOOPBACK_INDEX))
        one.connect(("0.0.0.0", PORT))
        return ask(one)


def _zero_by_packet_info(source: str, index: int) -> Callable[[], bytes]:
    """Sends to 0.0.0.0 with a control message that gives the address, or the interface that has it."""

    def attack() -> bytes:
        with make_socket(kind=socket.SOCK_DGRAM) as one:
            info = struct.pack("=i", index) + socket.inet_aton(source) + bytes(4)
            one.sendmsg([b"?"], [(socket.IPPROTO_IP, IP_PKTINFO, info)], 0, ("0.0.0.0", PORT))
            return answer(one)

    return attack


# --- source routes ----------------------------------------------------------------------------------------------------


def _source_route(kind: int, first: str, last: str) -> Callable[[], bytes]:
    """Sets a source route: the packets go to ``first``, which forwards them to ``last``, the address in connect(2)."""

    def attack() -> bytes:
        # accept_local: all hosts on the route are this one (ip-sysctl.rst).
        for place in ("all", "lo"):
            for name in ("accept_source_route", "accept_local"):
                with open(f"/proc/sys/net/ipv4/conf/{place}/{name}", "w", encoding="ascii") as switch:
                    switch.write("1")
        # Some kernels require CAP_NET_RAW for a source route.
        privileges.become_user(ATTACKER, ATTACKER_GID, capabilities=[privileges.CAP_NET_RAW])
        with make_socket(kind=kind) as one:
            # A "no operation" option pads it to a multiple of four bytes.
            option = struct.pack("=BBB4sB", _LOOSE_SOURCE_ROUTE, 7, 4, socket.inet_aton(first), 1)
            one.setsockopt(socket.IPPROTO_IP, IP_OPTIONS, option)
            one.connect((last, PORT))
            return ask(one)

    return attack


# --- other addresses --------------------------------------------------------------------------------------------------


def _translated(scene: Scene) -> bytes:
    """Connects to an address that a DNAT rule of root translates to the locked one."""
    to = f"{IPV4}:{PORT}"
    rule = ("-d", REWRITTEN, "-p", "tcp", "-j", "DNAT", "--to-destination", to)
    scene.inside(lambda: privileges.command("iptables", "-w", "-t", "nat", "-A", "OUTPUT", *rule))
    return scene.attacker(lambda: fetch(REWRITTEN))


def _relay(listening: socket.socket) -> None:
    privileges.become_user(ALLOWED, ALLOWED_GID)
    with listening.accept()[0] as client, make_socket() as upstream:
        upstream.connect(there())
        client.sendall(ask(upstream) if client.recv(4096) else b"")


def _through_a_relay() -> bytes:
    """Asks through a relay of an allowed user, like a proxy or a network helper of containers."""
    with socket.socket() as listening:
        listening.bind((OPEN4, 8080))
        listening.listen(1)
        with alongside(lambda: _relay(listening)):
            return by_attacker(_ask_the_relay)


def _ask_the_relay() -> bytes:
    with make_socket(OPEN4) as one:
        one.connect((OPEN4, 8080))
        return ask(one)


# --- programs that rewrite --------------------------------------------------------------------------------------------


def _rewritten(place: Callable[[Scene], str], code: bytes, address: str) -> Callable[[Scene], bytes]:
    def attack(scene: Scene) -> bytes:
        with attached(place(scene), code):
            return scene.attacker(lambda: fetch(address))

    return attack


def _before_ours(scene: Scene) -> str:
    """Programs of a cgroup run before those of the ones above it (compute_effective_progs() in kernel/bpf/cgroup.c)."""
    return scene.sandbox.cgroup


def _behind_ours(scene: Scene) -> str:
    return scene.guard_cgroup


_REWRITE = rewriting(REWRITTEN, IPV4)
_PROXY = "127.0.0.1"
"""The service answers here, too. It stands for a proxy of root's."""

ATTACKS = (
    Attack(
        "address-spelling",
        "The address in another spelling: as a number, in octal or hexadecimal, shortened, in full-width digits",
        Verdict.BLOCKED,
        "The hooks get the parsed address, not its spelling.",
        {text.encode("ascii", "backslashreplace").decode(): Way(as_attacker(_spelled(text))) for text in SPELLINGS},
    ),
    Attack(
        "address-mapped",
        "An IPv4 address on an IPv6 socket (`::ffff:169.254.169.254`)",
        Verdict.BLOCKED,
        "A mapped address and its IPv4 address have the same key in the maps.",
        {
            "tcp": Way(as_attacker(lambda: fetch(MAPPED))),
            "udp": Way(as_attacker(lambda: fetch(MAPPED, socket.SOCK_DGRAM))),
        },
    ),
    Attack(
        "address-scope",
        "A link-local address with its interface; an interface or a flow label where none is needed",
        Verdict.BLOCKED,
        "Interface and flow label are not part of the address that is compared.",
        {
            "link-local": Way(as_attacker(lambda: fetch(LINK_LOCAL))),
            "link-local-text": Way(as_attacker(lambda: fetch_named(f"{LINK_LOCAL}%lo"))),
            "scope": Way(as_attacker(_with_scope)),
            "flow-label": Way(as_attacker(_flow_label)),
        },
    ),
    Attack(
        "address-zero",
        "`bind(locked)`, then `connect(0.0.0.0)`, which goes to the socket's own address; the same with an interface",
        Verdict.BLOCKED,
        "The hooks judge the address that the kernel will choose. Where they can't know it, locked ports are denied.",
        {
            "bound": Way(as_attacker(_zero(IPV4, "0.0.0.0"))),
            "bound-udp": Way(as_attacker(_zero(IPV4, "0.0.0.0", socket.SOCK_DGRAM))),
            "bound-mapped": Way(as_attacker(_zero(MAPPED, "::ffff:0.0.0.0"))),
            "device": Way(as_attacker(_zero_by_device)),
            "unicast-interface": Way(as_attacker(_zero_by_unicast_interface)),
            "packet-info-source": Way(as_attacker(_zero_by_packet_info(IPV4, 0))),
            "packet-info-interface": Way(as_attacker(_zero_by_packet_info("0.0.0.0", LOOPBACK_INDEX))),
        },
    ),
    Attack(
        "source-route",
        "A source route (`IP_OPTIONS`) by way of another host",
        Verdict.BLOCKED,
        "The hooks judge the address in `connect`, not the first hop of the packet.",
        {
            "tcp": Way(as_root(_source_route(socket.SOCK_STREAM, OPEN4, IPV4)), ("source-route",), own_network=True),
            "udp": Way(as_root(_source_route(socket.SOCK_DGRAM, OPEN4, IPV4)), ("source-route",), own_network=True),
        },
    ),
    Attack(
        "nat64-listed",
        "A NAT64 form of the address (`64:ff9b:1::a9fe:a9fe`) that the policy lists",
        Verdict.BLOCKED,
        "The policy lists it, so it is locked like any other address.",
        {"tcp": Way(as_attacker(lambda: fetch(NAT64_LISTED)))},
    ),
    Attack(
        "nat64",
        "A NAT64 form (`64:ff9b::a9fe:a9fe`), or another address of the same service, that the policy does not list",
        Verdict.OPEN,
        "Only what is listed is locked. Add it with `--ip`.",
        {"tcp": Way(as_attacker(lambda: fetch(NAT64))), "loopback": Way(as_attacker(lambda: fetch("127.0.0.1")))},
    ),
    Attack(
        "dnat",
        "A DNAT rule on this machine that translates another address to the locked one",
        Verdict.STRICT,
        "Only root can make such a rule. The egress hook sees the translated address, for which the socket was not "
        "approved. A translation on another machine can't be seen.",
        {"iptables": Way(_translated, ("nat",), own_network=True)},
    ),
    Attack(
        "rewrite-before",
        "Another cgroup program that rewrites the address before ours runs (only root can attach one)",
        Verdict.BLOCKED,
        "Our hooks run later and judge the rewritten address.",
        {"connect4": Way(_rewritten(_before_ours, _REWRITE, REWRITTEN))},
    ),
    Attack(
        "rewrite-away",
        "Another cgroup program that runs before ours and sends the connect to a proxy that may connect (only root can "
        "attach one)",
        Verdict.OPEN,
        "Our hooks judge the address of the proxy. `start`, `status` and `explain` name the program. Where the kernel "
        "can order programs (Linux 6.17), those of the guard's own cgroup run behind ours and can't do this.",
        {"cgroup-below": Way(_rewritten(_before_ours, rewriting(IPV4, _PROXY), IPV4))},
    ),
    Attack(
        "rewrite-behind",
        "Another cgroup program that runs after ours and changes the address or the verdict (only root can attach one)",
        Verdict.STRICT,
        "Without `--strict`, `status` reports the guard as degraded and names the program.",
        {
            "rewrite": Way(_rewritten(_behind_ours, _REWRITE, REWRITTEN)),
            "approved-elsewhere": Way(_rewritten(_behind_ours, rewriting(ATTACKERS_OWN, IPV4), ATTACKERS_OWN)),
            "set-retval": Way(_rewritten(_behind_ours, OVERRIDING, IPV4), ("set-retval",)),
        },
    ),
    Attack(
        "proxy",
        "A proxy, or a rootless network helper (slirp4netns, pasta), that an allowed user runs",
        Verdict.OPEN,
        "The allowed user itself connects. Keep the allowlist short, with no program on it that relays.",
        {"tcp": Way(as_root(_through_a_relay))},
    ),
)
