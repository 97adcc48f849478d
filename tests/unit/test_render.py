# SPDX-License-Identifier: Apache-2.0
"""The records of a generation mean what the policy says, and the policy can be read back from them.

The tests look records up as the kernel does: the longest prefix, the range with the port, the list by its number.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import struct
from collections.abc import Iterable
from typing import Callable

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.backends.ebpf.image import Image, Stamp, parse_settings, settings_of, stamp_of
from imds_guard.backends.ebpf.parse import parse
from imds_guard.backends.ebpf.reader import Snapshot
from imds_guard.backends.ebpf.render import render, require_fits
from imds_guard.backends.ebpf.state import policy_of
from imds_guard.errors import GuardError, Unsupported
from imds_guard.policy.decide import Caller, Destination, Reason, Source, decide, find_lock
from imds_guard.policy.model import (
    NOBODY,
    Endpoint,
    Identities,
    Lock,
    Mode,
    Policy,
    Protocol,
    Verdict,
    make_policy,
    unmapped,
)
from imds_guard.policy.ports import ALL_PORTS
from tests.strategies import addresses, callers, destinations, patient, policies

GENERATIONS = st.sampled_from(abi.GENERATIONS)


def rendered(policy: Policy, generation: int = 1) -> Image:
    """The image of a policy. A policy with too many ranges is no example."""
    try:
        return render(policy, generation)
    except Unsupported:
        assume(False)
        raise


def single(address: str, tcp: tuple[tuple[int, int], ...] = ALL_PORTS) -> Endpoint:
    return Endpoint(ipaddress.ip_network(address), tcp)


def one_lock(*endpoints: Endpoint, allow: Identities = NOBODY, deny: Identities = NOBODY) -> Policy:
    return make_policy([Lock("a", endpoints, allow, deny)])


# --- how the kernel looks up a record ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Found:
    """The result of a look-up: the list of the range, and the name of its lock. Some ranges have no lock."""

    lock: str | None
    list: int


def look_up(image: Image, destination: Destination) -> Found | None:
    """The range for a destination in the value of the longest key that matches, as in an LPM_TRIE."""
    wanted = struct.pack("=B3x", image.generation) + abi.address_bytes(destination.address)
    matching = [
        (struct.unpack_from("=I", key)[0], value)
        for key, value in image.items[Map.ENDPOINTS]
        if first_bits(key[4:], struct.unpack_from("=I", key)[0]) == first_bits(wanted, struct.unpack_from("=I", key)[0])
    ]
    ranges = abi.endpoint_ranges(max(matching)[1]) if matching else []
    bit = abi.TCP if destination.protocol is Protocol.TCP else abi.UDP
    hits = [r for r in ranges if r[0] <= destination.port <= r[1] and r[4] & bit]
    assert len(hits) <= 1, "the ranges of one protocol overlap"
    if not hits:
        return None
    _, _, lock, number, *_ = hits[0]
    return Found(None if number == abi.NO_LIST else lock_names(image)[lock], number)


def first_bits(data: bytes, bits: int) -> int:
    return int.from_bytes(data, "big") >> (len(data) * 8 - bits)


def lock_names(image: Image) -> dict[int, str]:
    return {
        abi.SMALL_KEY.unpack(key)[1]: abi.LOCK.unpack(value)[2].rstrip(b"\0").decode()
        for key, value in image.items[Map.LOCKS]
    }


def members_of(image: Image, number: int, kind: int, verdict: int) -> frozenset[int]:
    rows = ((abi.MEMBER.unpack(key), abi.MEMBER_VALUE.unpack(value)[0]) for key, value in image.items[Map.MEMBERS])
    return frozenset(i for (_, k, n, i), bits in rows if (k, n) == (kind, number) and bits & verdict)


def list_record(image: Image, number: int) -> tuple[int, ...]:
    return abi.LIST.unpack(dict(image.items[Map.LISTS])[abi.list_key(image.generation, number)])


def bit_is_set(bitmap: bytes, base: int, bit: int) -> bool:
    return bool(struct.unpack_from("=I", bitmap, base + (bit >> 5) * 4)[0] >> (bit & 31) & 1)


def may_be_locked(image: Image, packed: bytes) -> bool:
    """The address bitmap for an address in 16 bytes: the bit of the host, or that of the address's first 16 bits."""
    [(_, bitmap)] = image.items[Map.ADDRESS_BITMAP]
    is_v4 = packed[:12] == bytes(10) + b"\xff\xff"
    network = int.from_bytes(packed[12:14] if is_v4 else packed[:2], "big")
    base = abi.HOST_BYTES if is_v4 else abi.HOST_BYTES + abi.NETWORK_BYTES
    return bit_is_set(bitmap, 0, abi.host_bit(packed)) or bit_is_set(bitmap, base, network)


# --- written and read back --------------------------------------------------------------------------------------------


@patient
@given(policy=policies(), generation=GENERATIONS)
def test_a_policy_is_read_back_as_it_was_written(policy: Policy, generation: int) -> None:
    image = rendered(policy, generation)
    assert parse(image, settings_of(policy)) == policy


@patient
@given(policy=policies(), generation=GENERATIONS)
def test_settings_are_read_back_with_their_digest(policy: Policy, generation: int) -> None:
    digest = rendered(policy, generation).digest()
    assert parse_settings(settings_of(policy).pack(digest, 7)) == (settings_of(policy), digest)


@patient
@given(policy=policies(), generation=GENERATIONS)
def test_every_record_names_its_generation(policy: Policy, generation: int) -> None:
    items = rendered(policy, generation).items
    found = {key[at] for number, at in abi.GENERATION_AT.items() for key, _ in items.get(number, ())}
    assert found <= {generation}
    assert [key for key, _ in items[Map.ADDRESS_BITMAP]] == [struct.pack("=I", generation)]
    lists = [struct.unpack("=I", key)[0] for key, _ in items[Map.LISTS]]
    assert lists == [(generation - 1) * abi.LISTS + n for n in range(len(lists))]


@patient
@given(policy=policies(), generation=GENERATIONS)
def test_records_have_the_sizes_of_their_maps_and_no_key_twice(policy: Policy, generation: int) -> None:
    for number, items in rendered(policy, generation).items.items():
        shape = abi.SHAPES[number]
        assert {(len(key), len(value)) for key, value in items} <= {(shape.key_size, shape.value_size)}
        assert len({key for key, _ in items}) == len(items)


@patient
@given(one=policies(), other=policies())
def test_digests_of_different_policies_differ(one: Policy, other: Policy) -> None:
    same_records = one._replace(mode=other.mode, containers=other.containers) == other
    assert (rendered(one).digest() == rendered(other).digest()) == same_records


@patient
@given(policy=policies(), data=st.data())
def test_the_digest_depends_on_every_byte_and_not_on_the_order(policy: Policy, data: st.DataObject) -> None:
    image = rendered(policy)
    turned = Image(1, {number: tuple(reversed(items)) for number, items in image.items.items()})
    assert turned.digest() == image.digest()
    number = data.draw(st.sampled_from([n for n, items in sorted(image.items.items()) if items]))
    key, value = data.draw(st.sampled_from(image.items[number]))
    at = data.draw(st.integers(0, len(value) - 1))
    changed = value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]
    forged = {**image.items, number: tuple((k, changed if k == key else v) for k, v in image.items[number])}
    assert Image(1, forged).digest() != image.digest()


@pytest.mark.parametrize("at", [0, 4, 12], ids=["not valid", "unknown mode", "another ABI"])
def test_settings_that_are_not_understood_are_none(at: int) -> None:
    record = bytearray(settings_of(one_lock(single("192.0.2.1"))).pack(bytes(16), 1))
    struct.pack_into("=I", record, at, 0)
    assert parse_settings(bytes(record)) is None


@pytest.mark.parametrize("size", [abi.SETTINGS.size, abi.SETTINGS.size + 16])
def test_the_stamp_is_read_from_settings_of_any_layout(size: int) -> None:
    """``valid`` at byte 0, ``abi`` at 12 and ``serial`` at 40 never move: an upgrade keeps marks by them."""
    record = bytearray(size)
    struct.pack_into("=I", record, 0, 1)
    struct.pack_into("=I", record, 12, 9)
    struct.pack_into("=Q", record, 40, 7)
    assert stamp_of(bytes(record)) == Stamp(9, 7)
    record[0] = 0
    assert stamp_of(bytes(record)) == Stamp(0, 7)


@pytest.mark.parametrize("number", [Map.LISTS, Map.ENDPOINTS])
def test_a_lock_without_its_list_or_endpoint_is_a_contradiction(number: Map) -> None:
    policy = one_lock(single("192.0.2.1"))
    broken = Image(1, {**render(policy, 1).items, number: ()})
    with pytest.raises(GuardError, match="no list or no endpoint"):
        parse(broken, settings_of(policy))


# --- what a look-up finds ---------------------------------------------------------------------------------------------

NESTED = make_policy(
    [
        Lock("wide", (Endpoint(ipaddress.ip_network("10.0.0.0/8"), ALL_PORTS, ALL_PORTS),)),
        Lock("narrow", (single("10.1.2.3", ((80, 80),)),), Identities(frozenset({7}))),
        Lock("everything", (single("::/0"),)),
    ]
)


@patient
@given(policy=policies(), generation=GENERATIONS, data=st.data())
def test_the_trie_has_the_lock_and_the_list_of_the_most_specific_endpoint(
    policy: Policy, generation: int, data: st.DataObject
) -> None:
    drawn = data.draw(destinations(policy))
    destination = drawn._replace(address=unmapped(drawn.address))
    assume(int(destination.address) != 0)
    image = rendered(policy, generation)
    expected, found = find_lock(policy, destination), look_up(image, destination)
    assert (found and found.lock) == (expected and expected.name)
    if expected is not None and found is not None:
        assert members_of(image, found.list, abi.USER, abi.ALLOW) == expected.allow.users
        assert members_of(image, found.list, abi.GROUP, abi.ALLOW) == expected.allow.groups
        assert members_of(image, found.list, abi.USER, abi.DENY) == expected.deny.users
        assert members_of(image, found.list, abi.GROUP, abi.DENY) == expected.deny.groups
        default = list_record(image, found.list)[0] & abi.LIST_DEFAULT_ALLOW
        assert bool(default) == (expected.default is Verdict.ALLOW)


@patient
@given(policy=policies(), caller=callers(), data=st.data())
def test_what_the_trie_does_not_have_is_what_the_policy_does_not_lock(
    policy: Policy, caller: Caller, data: st.DataObject
) -> None:
    drawn = data.draw(destinations(policy))
    address = unmapped(drawn.address)
    assume(int(address) != 0)
    found = look_up(rendered(policy), drawn._replace(address=address))
    decision = decide(policy, caller, drawn)
    assert (found is None) == (decision.reason is Reason.NOT_LOCKED)


@pytest.mark.parametrize(
    ("address", "port", "protocol", "lock"),
    [
        ("10.1.2.3", 80, Protocol.TCP, "narrow"),
        ("10.1.2.3", 443, Protocol.TCP, "wide"),
        ("10.1.2.3", 80, Protocol.UDP, "wide"),
        ("10.1.2.4", 80, Protocol.TCP, "wide"),
        ("192.0.2.1", 80, Protocol.TCP, None),  # ::/0 locks IPv6 only, though IPv4 is in the same trie
        ("fd00:ec2::254", 80, Protocol.TCP, "everything"),
        ("fd00:ec2::254", 80, Protocol.UDP, None),
    ],
)
def test_a_port_that_the_narrow_lock_leaves_belongs_to_the_wide_one(
    address: str, port: int, protocol: Protocol, lock: str | None
) -> None:
    found = look_up(render(NESTED, 2), Destination(ipaddress.ip_address(address), port, protocol))
    assert (found and found.lock) == lock


@patient
@given(policy=policies(), port=st.sampled_from((0, 53, 80, 443, 65535)), protocol=st.sampled_from(Protocol))
@example(policy=NESTED, port=80, protocol=Protocol.TCP)
def test_0000_is_denied_by_the_trie_where_its_interface_is_unknown_and_the_port_is_locked_somewhere(
    policy: Policy, port: int, protocol: Protocol
) -> None:
    destination = Destination(ipaddress.ip_address("0.0.0.0"), port, protocol)
    found = look_up(rendered(policy), destination)
    assert found in (None, Found(None, abi.NO_LIST))
    # The reason is the same for every caller, so that one is enough.
    reason = decide(policy, Caller(fsuid=1001, fsgid=2002), destination, Source(by_device=True)).reason
    assert reason is (Reason.NOT_LOCKED if found is None else Reason.UNSPECIFIED_DESTINATION)


# --- the address bitmap -----------------------------------------------------------------------------------------------


@patient
@given(policy=policies(), data=st.data())
def test_the_address_bitmap_never_says_no_for_a_locked_address(policy: Policy, data: st.DataObject) -> None:
    drawn = data.draw(destinations(policy))
    image = rendered(policy)
    destination = drawn._replace(address=unmapped(drawn.address))
    if look_up(image, destination) is not None:
        assert may_be_locked(image, abi.address_bytes(destination.address))


@patient
@given(address=addresses())
def test_the_address_bitmap_says_no_for_nearly_every_other_address(address: ipaddress.IPv4Address) -> None:
    image = render(one_lock(single("169.254.169.254"), single("fd00:ec2::254")), 1)
    packed = abi.address_bytes(unmapped(address))
    bits = {abi.host_bit(abi.address_bytes(ipaddress.ip_address(a))) for a in ("169.254.169.254", "fd00:ec2::254")}
    bits.add(abi.host_bit(abi.address_bytes(ipaddress.ip_address("0.0.0.0"))))
    assert may_be_locked(image, packed) == (abi.host_bit(packed) in bits)


# --- lists ------------------------------------------------------------------------------------------------------------


@patient
@given(
    allowed=st.frozensets(st.integers(0, 3000), max_size=100),
    denied=st.frozensets(st.integers(0, 3000), max_size=100),
)
@example(allowed=frozenset(range(128)), denied=frozenset())
@example(allowed=frozenset(range(127)), denied=frozenset({127, 128}))
def test_a_list_has_a_bit_for_each_group_and_short_lists_are_searched(
    allowed: frozenset[int], denied: frozenset[int]
) -> None:
    groups = {"allow": Identities(groups=allowed), "deny": Identities(groups=denied)}
    image = render(one_lock(single("192.0.2.1"), **groups), 1)
    flags, zero, *bitmap = list_record(image, 0)
    assert zero == 0
    assert {n * 32 + b for n, word in enumerate(bitmap) for b in range(32) if word >> b & 1} == {
        gid % 512 for gid in allowed | denied
    }
    assert bool(flags & abi.LIST_VALID)
    assert bool(flags & abi.LIST_GROUPS) == bool(allowed | denied)
    assert bool(flags & abi.LIST_DENY_GROUPS) == bool(denied)
    assert bool(flags & abi.LIST_SMALL) == (len(allowed | denied) <= abi.MAX_SEARCHED_GROUPS)
    assert searched(image) == (sorted(denied), sorted(allowed - denied), flags & abi.LIST_SMALL)


def searched(image: Image) -> tuple[list[int], list[int], int]:
    """The denied and the allowed groups in the record that is searched, and LIST_SMALL when there should be one."""
    records = [abi.GROUPS.unpack(value) for _, value in image.items[Map.GROUPS]]
    if not records:
        listed = [members_of(image, 0, abi.GROUP, verdict) for verdict in (abi.DENY, abi.ALLOW)]
        large = len(listed[0] | listed[1]) > abi.MAX_SEARCHED_GROUPS
        return sorted(listed[0]), sorted(listed[1] - listed[0]), 0 if large else abi.LIST_SMALL
    [(denied, length, *gids)] = records
    return gids[:denied], gids[denied:length], abi.LIST_SMALL


def test_locks_with_the_same_lists_share_one() -> None:
    same = Identities(frozenset({1, 2}))
    locks = [Lock(name, (single(f"192.0.2.{n}"),), same) for n, name in enumerate("abc")]
    image = render(make_policy([*locks, Lock("d", (single("192.0.2.9"),))]), 1)
    assert len(image.items[Map.LISTS]) == 2
    assert len(image.items[Map.MEMBERS]) == 2


def test_a_user_and_a_group_with_the_same_number_are_two_members() -> None:
    image = render(one_lock(single("192.0.2.1"), allow=Identities(frozenset({0}), frozenset())), 1)
    assert members_of(image, 0, abi.USER, abi.ALLOW) == {0}
    assert members_of(image, 0, abi.GROUP, abi.ALLOW) == frozenset()


# --- limits -----------------------------------------------------------------------------------------------------------


def many(count: int) -> Iterable[ipaddress.IPv4Network]:
    return (ipaddress.IPv4Network((0x0A000000 + n, 32)) for n in range(count))


def with_locks(count: int) -> Policy:
    return make_policy(Lock(str(n), (Endpoint(network, ALL_PORTS),)) for n, network in enumerate(many(count)))


def with_lists(count: int) -> Policy:
    locks = (
        Lock(str(n), (Endpoint(network, ALL_PORTS),), Identities(frozenset({n})))
        for n, network in enumerate(many(count))
    )
    return make_policy(locks)


def with_members(count: int) -> Policy:
    half = frozenset(range(count // 2))
    return one_lock(single("192.0.2.1"), allow=Identities(half, frozenset(range(count - len(half)))))


def with_endpoints(count: int) -> Policy:
    """0.0.0.0 takes one entry more, for connects with an unknown destination."""
    return one_lock(*(Endpoint(network, ALL_PORTS) for network in many(count - 1)))


def with_ranges(count: int) -> Policy:
    return one_lock(single("192.0.2.1", tuple((2 * n, 2 * n) for n in range(count))))


def inheriting_ranges(count: int) -> Policy:
    """Two ranges of the address itself, the others of the prefix around it."""
    around = tuple((10 + 2 * n, 10 + 2 * n) for n in range(count - 2))
    return one_lock(single("192.0.2.1", ((1, 1), (3, 3))), single("192.0.2.0/24", around))


@pytest.mark.parametrize(
    ("make", "maximum", "message"),
    [
        (with_locks, 16384, "it has 16385 locks, and the maximum is 16384"),
        (with_lists, 4096, "it has 4097 different allowlists, and the maximum is 4096"),
        (with_members, 131072, "it has 131073 users and groups, and the maximum is 131072"),
        (with_endpoints, 32768, "it has 32769 endpoints, and the maximum is 32768"),
        (with_ranges, 24, "192.0.2.1/32 has 25 ranges of ports, .* and the maximum is 24"),
        (inheriting_ranges, 24, "192.0.2.1/32 has 25 ranges of ports, those of the prefixes around it included"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused_and_the_largest_is_not(
    make: Callable[[int], Policy], maximum: int, message: str
) -> None:
    assert len(render(make(maximum), 1).items) == len(RENDERED_MAPS)
    require_fits(make(maximum))
    for refusing in (lambda policy: render(policy, 1), require_fits):
        with pytest.raises(Unsupported, match=message):
            refusing(make(maximum + 1))


RENDERED_MAPS = (
    *(Map.ADDRESS_BITMAP, Map.ENDPOINTS, Map.LISTS, Map.MEMBERS, Map.GROUPS, Map.LOCKS),
    *(Map.FILTERS, Map.TARGETS, Map.FILTER_TEXTS),
)


def test_mode_and_containers_are_in_the_settings_and_in_no_other_record() -> None:
    audited = make_policy([Lock("a", (single("192.0.2.1"),))], Mode.AUDIT, Verdict.ALLOW)
    assert render(audited, 1).items == render(one_lock(single("192.0.2.1")), 1).items
    assert abi.SETTINGS.unpack(settings_of(audited).pack(bytes(16), 1))[:4] == (1, abi.MODE_AUDIT, 1, abi.ABI)


def test_records_that_render_would_not_write_are_reported() -> None:
    """Also with the digest of those records: whoever can write to the maps can compute it."""
    policy = one_lock(single("192.0.2.1"), allow=Identities(frozenset({7})))
    image = render(policy, 1)
    assert policy_of(Snapshot(image, settings_of(policy), image.digest())) == (policy, [])
    ((key, bitmap),) = image.items[Map.ADDRESS_BITMAP]
    forged = Image(1, {**image.items, Map.ADDRESS_BITMAP: ((key, bytes(len(bitmap))),)})
    found, faults = policy_of(Snapshot(forged, settings_of(policy), forged.digest()))
    assert (found, len(faults)) == (policy, 1)
    assert "someone else changed them" in faults[0]
