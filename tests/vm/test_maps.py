# SPDX-License-Identifier: Apache-2.0
"""The machine's maps do what the kernel's do, and what their documentation says."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from typing import Callable, NamedTuple

import pytest

from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf.abi import Map
from imds_guard.kernel import bpf
from imds_guard.kernel.bpf.attr import Command, Element
from imds_guard.kernel.bpf.syscall import call
from tests.vm import in_kernel, layouts
from tests.vm.machine import Machine

OPERATIONS = 2000
LIMIT = 40
"""Elements of the maps here: few, so that they are full at times."""


@pytest.fixture
def bare() -> Iterator[Machine]:
    """A machine without hooks, with small maps."""
    with Machine(forms=(), offsets=layouts.recorded()["6.12-debian-x86_64"]) as made:
        for number in (Map.ENDPOINTS, Map.MEMBERS):
            made.map_limit(number, LIMIT)
        yield made


class Access(NamedTuple):
    """The four operations of one map. Each gives the errno in place of an error."""

    update: Callable[[bytes, bytes], object]
    delete: Callable[[bytes], object]
    lookup: Callable[[bytes], object]
    items: Callable[[], list[tuple[bytes, bytes]]]


def errno_of(operation: Callable[..., object]) -> Callable[..., object]:
    """The operation, with the errno as its result when it fails."""

    def attempt(*arguments: bytes) -> object:
        try:
            return operation(*arguments)
        except OSError as error:
            return error.errno

    return attempt


def of_machine(machine: Machine, number: Map) -> Access:
    """A map of the machine."""
    return Access(
        errno_of(lambda key, value: machine.map_update(number, key, value)),
        errno_of(lambda key: machine.map_delete(number, key)),
        lambda key: machine.map_lookup(number, key),
        lambda: machine.map_items(number),
    )


def _delete(fd: int, key: bytes) -> None:
    buffer = ctypes.create_string_buffer(key, len(key))
    call(Command.MAP_DELETE_ELEM, Element(map_fd=fd, key=ctypes.addressof(buffer)))


def of_kernel(fd: int, shape: bpf.MapShape) -> Access:
    """A map of the kernel."""
    return Access(
        errno_of(lambda key, value: bpf.map_update(fd, key, value)),
        errno_of(lambda key: _delete(fd, key)),
        lambda key: bpf.map_lookup(fd, key, shape.value_size),
        lambda: list(bpf.map_items(fd, shape)),
    )


def a_key(r: random.Random, number: Map) -> bytes:
    """One of few, which nest where the map is a trie."""
    if number is Map.MEMBERS:
        return abi.MEMBER.pack(r.choice((1, 2)), r.choice((1, 2)), r.randrange(3), r.randrange(8))
    address = bytes(10) + b"\xff\xff" + bytes([10, r.choice((0, 1, 128)), r.choice((0, 255)), r.randrange(4)])
    if r.random() < 0.2:
        address = bytes([0xFD, *bytes(14), r.randrange(3)])
    length = r.choice((0, 8, 32, 33, 48, 128, 136, 137, 144, 152, 158, 159, 160, 160))
    return abi.ENDPOINT_KEY.pack(length, r.choice((1, 2)), address)


def a_seed() -> int:
    """A fresh one. A failure prints it."""
    return random.SystemRandom().getrandbits(32)


def play(seed: int, number: Map, maps: tuple[Access, ...], operations: int = OPERATIONS) -> None:
    """The same random operations on each map give the same results."""
    r = random.Random(seed)
    value_size = abi.SHAPES[number].value_size
    for step in range(operations):
        key, kind = a_key(r, number), r.random()
        if kind < 0.35:
            value = r.randbytes(4).ljust(value_size, b"\0")
            results = [one.update(key, value) for one in maps]
        elif kind < 0.6:
            results = [one.delete(key) for one in maps]
        elif kind < 0.99:
            if number is Map.ENDPOINTS and r.random() < 0.7:  # as the hooks do it
                key = abi.ENDPOINT_KEY.pack(160, *abi.ENDPOINT_KEY.unpack(key)[1:])
            results = [one.lookup(key) for one in maps]
        else:
            results = [sorted(one.items()) for one in maps]
        assert all(result == results[0] for result in results), (seed, step, kind, key.hex(), results)


class ByTheBook:
    """A hash, or a trie as Documentation/bpf/map_lpm_trie.rst has it, by comparing bits."""

    def __init__(self, number: Map) -> None:
        self._trie = number is Map.ENDPOINTS
        self._elements: dict[str, tuple[bytes, bytes]] = {}

    def _bits(self, key: bytes) -> str:
        whole = "".join(f"{one:08b}" for one in key[4:])
        return whole[: int.from_bytes(key[:4], "little")] if self._trie else key.hex()

    def update(self, key: bytes, value: bytes) -> object:
        """ENOSPC or E2BIG when it is full."""
        if self._bits(key) not in self._elements and len(self._elements) >= LIMIT:
            return 28 if self._trie else 7
        self._elements[self._bits(key)] = key, value
        return None

    def delete(self, key: bytes) -> object:
        """ENOENT when it is not there."""
        return None if self._elements.pop(self._bits(key), None) else 2

    def lookup(self, key: bytes) -> object:
        """The longest prefix."""
        bits = self._bits(key)
        found = [one for one in self._elements if (bits.startswith(one) if self._trie else bits == one)]
        return self._elements[max(found, key=len)][1] if found else None

    def items(self) -> list[tuple[bytes, bytes]]:
        """All."""
        return list(self._elements.values())


@pytest.mark.parametrize("number", [Map.ENDPOINTS, Map.MEMBERS])
def test_a_map_does_what_its_documentation_says(bare: Machine, number: Map) -> None:
    book = ByTheBook(number)
    access = Access(book.update, book.delete, book.lookup, book.items)
    play(a_seed(), number, (of_machine(bare, number), access))


@pytest.mark.parametrize("number", [Map.ENDPOINTS, Map.MEMBERS])
def test_a_map_does_what_the_kernels_does(bare: Machine, number: Map) -> None:
    in_kernel.need_bpf()
    shape = abi.SHAPES[number]._replace(max_entries=LIMIT)
    with in_kernel.made_map(shape) as fd:
        play(a_seed(), number, (of_machine(bare, number), of_kernel(fd, shape)))


@pytest.mark.parametrize("reuse", [False, True])
def test_rollback_undoes_everything(bare: Machine, reuse: bool) -> None:
    r, book = random.Random(3), {number: of_machine(bare, number) for number in (Map.ENDPOINTS, Map.MEMBERS)}
    bare.reuse_freed(reuse)
    for number, access in book.items():
        for _ in range(30):
            access.update(a_key(r, number), bytes(abi.SHAPES[number].value_size))
    before = {number: sorted(access.items()) for number, access in book.items()}
    for seed in range(20):
        with bare.rollback():
            bare.map_update(Map.CONFIG, bytes(4), abi.CONFIG.pack(2))
            for number, access in book.items():
                play(seed, number, (access,), 100)
        assert before == {number: sorted(access.items()) for number, access in book.items()}
        assert bare.map_lookup(Map.CONFIG, bytes(4)) == bytes(8)
