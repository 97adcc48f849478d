# SPDX-License-Identifier: Apache-2.0
"""Random policies and callers from a seed, for ``decide()`` and for every backend.

There are no unspecified addresses and no containers: backends differ there (differences.py), and the table covers them.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from imds_guard.errors import BadPolicy
from imds_guard.kernel.credentials import become
from imds_guard.kernel.listeners import sockaddr
from imds_guard.policy.decide import Caller, Decision, Destination, decide, find_lock
from imds_guard.policy.filters import Filter, FilterRules
from imds_guard.policy.model import Endpoint, Identities, Lock, Mode, Policy, Protocol, Verdict, make_policy
from imds_guard.policy.ports import ALL_PORTS, Ports, normal_ports
from tests.conformance.families import ADDRESSES, IPV4, IPV6, PORTS

CASES_OF_A_POLICY = 50

# Most IDs are used for users and for groups, so that mixing the two up shows.
_IDS = (0, 1, 2, 40_001, 40_002, 40_003, 40_005, 40_006, 50_001, 50_002, 2_147_483_648, 4_294_967_294)
_MANY = tuple(range(60_000, 60_060, 2))
"""IDs with gaps between them, so that they make many ranges."""
_BELOW_2_31 = tuple(number for number in (*_IDS, *_MANY) if number < 2**31)

_NETWORKS = (
    *ADDRESSES,
    IPV4.prefix,
    IPV4.shorter_prefix,
    IPV4.everything,
    "168.63.129.0/28",
    IPV6.prefix,
    IPV6.shorter_prefix,
    IPV6.everything,
    "fe80::/10",
    "fd00::/8",
)
_PORTS: tuple[Ports, ...] = (ALL_PORTS, ((80, 80),), ((0, 52), (54, 65535)), ((443, 8080),), ((53, 67), (8080, 8080)))


@dataclass(frozen=True)
class Attempt:
    """A caller and a destination. The saved user ID stays 0, so that the process can become the next caller."""

    ruid: int
    euid: int
    fsuid: int
    rgid: int
    egid: int
    fsgid: int
    groups: tuple[int, ...]
    to: str
    port: int
    protocol: Protocol


@dataclass(frozen=True)
class Block:
    """One policy, and attempts under it, made from one seed."""

    seed: int
    policy: Policy
    attempts: tuple[Attempt, ...]

    def decisions(self) -> list[Decision]:
        """The decision of the specification for each attempt."""
        return [decide(self.policy, _caller(attempt), _destination(attempt)) for attempt in self.attempts]


def make_block(seed: int, size: int = CASES_OF_A_POLICY, *, filters: bool = False) -> Block:
    """The block of a seed; the same seed gives the same block. With ``filters`` its policy has some."""
    random = Random(seed)
    policy = _policy(random, filters)
    return Block(seed, policy, tuple(_attempt(random, policy) for _ in range(size)))


def _caller(attempt: Attempt) -> Caller:
    return Caller(attempt.fsuid, attempt.fsgid, frozenset(attempt.groups))


def _destination(attempt: Attempt) -> Destination:
    return Destination(ipaddress.ip_address(attempt.to), attempt.port, attempt.protocol)


# --- random values --------------------------------------------------------------------------------------------------


def _policy(random: Random, filters: bool) -> Policy:
    mode = Mode.AUDIT if random.random() < 0.05 else Mode.ENFORCE
    containers = random.choice(tuple(Verdict))
    while True:
        locks = [_lock(random, f"lock {number}") for number in range(random.randint(1, 4))]
        some = _filters(random, locks) if filters else []
        if filters and not some:
            continue
        account = random.choice(_IDS) if some and random.random() < 0.5 else None
        try:
            return make_policy(locks, mode, containers, filters=some, filter_uid=account)
        except BadPolicy:
            continue  # two locks claim the same port: this is frequent, and not a valid policy


def _filters(random: Random, locks: Sequence[Lock]) -> list[Filter]:
    """One to three, for locks with a single address. There is none where no lock has one."""
    served = [
        (lock.name, random.choice((low, 80)) if low <= 80 <= high else low)
        for lock in locks
        for endpoint in lock.endpoints
        if endpoint.network.num_addresses == 1
        for low, high in endpoint.tcp
        if low
    ]
    return [
        Filter(f"filter {number}", (name,), _identities(random, 0.0 if everyone else 0.8), everyone, rules, port)
        for number in range(random.randint(1, 3) if served else 0)
        for name, port in [random.choice(served)]
        for everyone in [random.random() < 0.2]
        for rules in [FilterRules(allow=("GET /**",))]
    ]


def _lock(random: Random, name: str) -> Lock:
    endpoints = [_endpoint(random) for _ in range(random.randint(1, 4))]
    default = Verdict.ALLOW if random.random() < 0.25 else Verdict.DENY
    return Lock(name, tuple(endpoints), _identities(random, 0.8), _identities(random, 0.3), default)


def _endpoint(random: Random) -> Endpoint:
    ports = random.choice(_PORTS)
    if random.random() < 0.2:
        low = random.choice(PORTS)
        ports = normal_ports([(low, low + random.randrange(400))])
    shape = random.choice(("tcp", "tcp", "udp", "any"))
    network = ipaddress.ip_network(random.choice(_NETWORKS))
    return Endpoint(network, ports if shape != "udp" else (), ports if shape != "tcp" else ())


def _identities(random: Random, probability: float) -> Identities:
    return Identities(_ids(random, probability), _ids(random, probability))


def _ids(random: Random, probability: float) -> frozenset[int]:
    if random.random() > probability:
        return frozenset()
    if random.random() < 0.2:
        return frozenset(random.sample(_MANY, random.randint(9, len(_MANY))))
    return frozenset(random.sample(_IDS, random.randint(1, 4)))


def _attempt(random: Random, policy: Policy) -> Attempt:
    uids, gids = _three(random), _three(random)
    groups = random.sample((*_IDS, *_MANY), random.choice((0, 0, 1, 2, 5, 12)))
    if random.random() < 0.02:
        groups += range(100_000, 101_100)
    address, port, protocol = random.choice(_locked_places(policy) if random.random() < 0.8 else _EVERYWHERE)
    mapped = ":" not in address and random.random() < 0.4
    return Attempt(
        *uids, *gids, tuple(groups), to=f"::ffff:{address}" if mapped else address, port=port, protocol=protocol
    )


_EVERYWHERE = tuple((address, port, protocol) for address in ADDRESSES for port in PORTS for protocol in Protocol)


def _locked_places(policy: Policy) -> Sequence[tuple[str, int, Protocol]]:
    """The destinations with a listener that some lock covers; all destinations with a listener when there is none."""
    found = [
        (address, port, protocol)
        for address, port, protocol in _EVERYWHERE
        if find_lock(policy, Destination(ipaddress.ip_address(address), port, protocol)) is not None
    ]
    return found or _EVERYWHERE


def _three(random: Random) -> tuple[int, int, int]:
    """Real, effective and fs ID. Without effective ID 0, only an ID that the task already has can become the fs ID."""
    real, effective = random.choice((*_IDS, *_MANY)), random.choice((*_IDS, *_MANY))
    if random.random() < 0.7:
        return real, effective, effective
    if random.random() < 0.5:
        return real, 0, random.choice(_BELOW_2_31)
    own = random.choice(_BELOW_2_31)
    return own, random.choice(_BELOW_2_31), random.choice((own, 0))


# --- connects -------------------------------------------------------------------------------------------------------


def attempt_all(attempts: Sequence[Attempt], *, listen: bool = False) -> list[str]:
    """What became of each attempt. The calling thread, which must be root, makes them one by one.

    ``connected``, the name of the errno, or, if it is to ``listen``, the address of the filter that answered.
    """
    return [_one(attempt, listen) for attempt in attempts]


def _one(attempt: Attempt, listen: bool) -> str:
    become(
        uids=(attempt.ruid, attempt.euid, 0),
        gids=(attempt.rgid, attempt.egid, 0),
        groups=attempt.groups,
        fsuid=None if attempt.fsuid == attempt.euid else attempt.fsuid,
        fsgid=None if attempt.fsgid == attempt.egid else attempt.fsgid,
    )
    try:
        return _connect(attempt, listen)
    finally:
        become(uids=(0, 0, 0))
        become(gids=(0, 0, 0), groups=())


def _connect(attempt: Attempt, listen: bool) -> str:
    family = socket.AF_INET6 if ":" in attempt.to else socket.AF_INET
    kind = socket.SOCK_DGRAM if attempt.protocol is Protocol.UDP else socket.SOCK_STREAM
    with socket.socket(family, kind) as one:
        one.settimeout(5)
        try:
            if kind == socket.SOCK_DGRAM:
                one.sendto(b"?", sockaddr(attempt.to, attempt.port))
            else:
                # Close with a reset (SO_LINGER in socket(7)): sockets in TIME_WAIT would use up the ports.
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
                one.connect(sockaddr(attempt.to, attempt.port))
                if listen:  # the table's service says nothing
                    return one.recv(64).decode() or "connected"
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, repr(error))
    return "connected"
