# SPDX-License-Identifier: Apache-2.0
"""Random tasks, and random connects and sendmsgs: what tests/generate.py makes, and what only the hooks know."""

from __future__ import annotations

import functools
import ipaddress
from random import Random

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.render import require_fits
from imds_guard.errors import Unsupported
from imds_guard.policy.decide import MAX_SEARCHED_GROUPS, Caller, Destination
from imds_guard.policy.filter_numbers import assigned, listeners_of
from imds_guard.policy.filters import FILTER_PORT, Target
from imds_guard.policy.model import MAX_ID, Address, Identities, Policy, Protocol, unmapped
from tests import generate
from tests.vm.programs import ADDRESS_HOOKS
from tests.vm.values import (
    ESTABLISHED,
    IPPROTO_MPTCP,
    IPPROTO_TCP,
    IPPROTO_UDP,
    IPV4_HOOKS,
    LISTEN,
    MESSAGE_HOOKS,
    PF_KTHREAD,
    Attempt,
    Socket,
    Task,
    mapped,
    packed,
)

_OTHER_PROTOCOLS = (0, 1, 33, 58, 132, 136, 255)
_MOST_GROUPS = 65536  # NGROUPS_MAX, include/uapi/linux/limits.h
_MANY = (1019, 1023, 1024, 1025, 1026, 1028, 1500)
"""Numbers of groups around those that are compared one by one (IG_MAX_WALKED_GROUPS)."""
_SAME_BIT = (512, -512, 1 << 31)
"""A group this much beyond a listed one has the same bit in gid_bitmap of the list."""
_SOME_IPV4 = packed("169.254.169.254")


def chance(r: Random, share: float) -> bool:
    """True in this share of the cases."""
    return r.random() < share


def policy(r: Random, strict: bool | None = None, *, filters: bool = True) -> Policy:
    """A policy that the maps can hold; with ``filters`` some have filters."""
    while True:
        made = generate.policy(r, strict=strict, filters=chance(r, 0.4) and filters)
        if chance(r, 0.15):
            made = _with_many_groups(r, made)
        try:
            require_fits(made)
        except Unsupported:
            continue
        return made


def _with_many_groups(r: Random, policy: Policy) -> Policy:
    """One lock lists about as many groups as are looked for among those of a caller with very many."""
    number, count = r.randrange(len(policy.locks)), r.choice((127, 128, 129, 130, 200))
    lock = policy.locks[number]
    some = frozenset(range(70_000, 70_000 + count - len(lock.listed_groups)))
    more = lock._replace(allow=Identities(lock.allow.users, lock.allow.groups | some))
    return policy._replace(locks=(*policy.locks[:number], more, *policy.locks[number + 1 :]))


# --- who ------------------------------------------------------------------------------------------------------------


def task(r: Random, under: Policy) -> Task:
    """A task, often one that the policy names."""
    caller = generate.caller(r, under)
    flags = r.getrandbits(32) & ~PF_KTHREAD
    return Task(
        caller.fsuid,
        caller.fsgid,
        _group_info(r, under, caller),
        pid_level=0 if caller.pid_namespace_is_initial else r.choice((1, 2, 32)),
        user_ns_level=0 if caller.user_namespace_is_initial else r.choice((1, 2, 33)),
        user_ns_owner=r.choice((0, 1000, 165_536, r.getrandbits(32))),
        flags=flags | (PF_KTHREAD if caller.kernel_thread else 0),
        pid=r.getrandbits(22),
        tgid=r.getrandbits(22),
        cgroup_id=r.getrandbits(64),
        netns_cookie=r.getrandbits(64),
        comm=r.randbytes(r.choice((15, 15, 4))).ljust(16, b"\0"),
    )


def _group_info(r: Random, under: Policy, caller: Caller) -> tuple[int, ...]:
    """group_info.gid[]: sorted, and a group may be there more than once (setgroups(2) takes what it is given)."""
    listed = sorted(
        {group for lock in under.locks for group in lock.listed_groups}.union(
            *(one.who.groups for one in under.filters)
        )
    )
    some = sorted(caller.groups)
    if listed and chance(r, 0.2):
        some.append(min(MAX_ID, max(0, r.choice(listed) + r.choice(_SAME_BIT))))
    if some and chance(r, 0.15):
        some += [r.choice(some)] * r.choice((1, 3, 5))
    if some and len(some) < 100 and chance(r, 0.2 if len(listed) > MAX_SEARCHED_GROUPS else 0.08):
        wanted = r.choice(_MANY) - len(some)
        some += [r.choice(some)] * wanted if chance(r, 0.5) else range(100_000, 100_000 + wanted)
    if chance(r, 0.001):
        some += range(_MOST_GROUPS - len(some))
    return tuple(sorted(some))


# --- where ----------------------------------------------------------------------------------------------------------


@functools.cache
def colliding() -> tuple[Address, ...]:
    """Addresses that have the bit of a well-known one in the bitmap of single addresses, and are not locked."""
    r = Random(5)
    found: list[Address] = []
    wanted = {abi.host_bit(abi.address_bytes(ipaddress.ip_address(address))) for address in _KNOWN}
    while len(found) < 6:
        address: Address = ipaddress.IPv4Address(r.getrandbits(32))
        if abi.host_bit(abi.address_bytes(address)) in wanted:
            found.append(address)
    return tuple(found)


_KNOWN = ("169.254.169.254", "169.254.170.2", "10.1.2.3", "168.63.129.16", "100.100.100.200", "fd00:ec2::254", "::1")


def attempt(r: Random, under: Policy, serial: int = 0) -> Attempt:
    """A connect or sendmsg to an endpoint, to its neighbour, or nowhere near."""
    hook = r.choice((*ADDRESS_HOOKS, "connect4", "connect6"))
    wanted = generate.destination(r, under)
    made = Attempt(
        hook,
        _as_given_to(hook, wanted.address if chance(r, 0.95) else r.choice(colliding())),
        wanted.port,
        _protocol(r, hook, wanted.protocol),
        mark=None if chance(r, 0.5) else _mark(r, serial),
        repeat=r.choice((1, 1, 2)),
        others=listening(r, under, wanted),
    )
    unspecified = chance(r, 0.17)
    if unspecified:
        made = made._replace(to=bytes(4) if made.is_ipv4 else r.choice((bytes(16), mapped(bytes(4)))))
    if unspecified or chance(r, 0.3):
        message = _from(r, under, hook) if hook in MESSAGE_HOOKS else None
        device = r.choice((0, 0, 0, 1, 7, 1 << 31))
        made = made._replace(source=_from(r, under, hook), message_source=message, device=device)
    if hook in MESSAGE_HOOKS and chance(r, 0.05):  # a control message on a connected socket
        made = made._replace(family=0, port=r.choice((0, made.port)))
    return made


def listening(r: Random, under: Policy, wanted: Destination) -> tuple[Socket, ...]:
    """Listeners of filters for a destination: as they should be, or not quite."""
    listeners = listeners_of(under, assigned(under))
    meant = [one for one in listeners if one.target == Target(unmapped(wanted.address), wanted.port)] or listeners
    found = []
    for one in r.sample(meant, min(len(meant), r.choice((0, 1, 2, 2)))):
        made = Socket(one.address.packed, local_port=FILTER_PORT, state=LISTEN, filter_mark=one.digest)
        odd = (
            made._replace(filter_mark=None),
            made._replace(filter_mark=r.choice((one.digest ^ 1, one.digest ^ 1 << 63, r.choice(listeners).digest))),
            made._replace(state=ESTABLISHED),
            made._replace(local=bytes(4)),
            made._replace(local=mapped(made.local)),
            made._replace(local_port=FILTER_PORT + 1),
        )
        found.append(made if chance(r, 0.75) else r.choice(odd))
    return tuple(found)


def _mark(r: Random, serial: int) -> bytes:
    """What an earlier call has left on the socket: of any policy, of a kind that is known or not."""
    kind = r.choice((0, 1, 2, 3, 4, 5, 6, 255))
    number = r.choice((0, 1, 2, 8, r.getrandbits(16)))
    serial = serial if chance(r, 0.4) else r.getrandbits(64)
    return abi.MARK.pack(serial, r.getrandbits(32), r.getrandbits(32), number, kind, r.getrandbits(8))


def _protocol(r: Random, hook: str, wanted: Protocol) -> int:
    if chance(r, 0.04):
        return r.choice(_OTHER_PROTOCOLS)
    if wanted is Protocol.UDP or (hook in MESSAGE_HOOKS and chance(r, 0.9)):  # these hooks run for UDP alone
        return IPPROTO_UDP
    return IPPROTO_MPTCP if chance(r, 0.2) else IPPROTO_TCP


def _as_given_to(hook: str, address: Address) -> bytes:
    """In the bytes that this hook has for an address; another one where it can't have that one."""
    whole = abi.address_bytes(address)
    if hook not in IPV4_HOOKS:
        return whole
    return whole[12:] if whole[:12] == mapped(b"") else _SOME_IPV4


def _from(r: Random, under: Policy, hook: str) -> bytes:
    if chance(r, 0.5):
        return bytes(4) if hook in IPV4_HOOKS else r.choice((bytes(16), mapped(bytes(4))))
    return _as_given_to(hook, generate.destination(r, under).address)
