# SPDX-License-Identifier: Apache-2.0
"""bpf(2) for maps and pins, on the maps of machines: the real store writes to them, and each change is recorded.

It takes the place of two system calls alone, syscalls.bpf() and syscalls.membarrier(). What the kernel does element by
element (generic_map_update_batch() and its neighbours in kernel/bpf/syscall.c) is one operation for each element.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, NamedTuple, Protocol
from unittest import mock

from imds_guard.backends.ebpf.abi import Map
from imds_guard.kernel import bpf, syscalls
from imds_guard.kernel.bpf.attr import Batch, BtfLoad, Command, Element, Info, MapCreate, MapInfo, MapType, Pin
from tests.vm.machine import Machine


class Operation(NamedTuple):
    """One change of a map: an element gets a value, or is removed (None)."""

    machine: Machine
    number: Map
    key: bytes
    value: bytes | None

    def apply(self) -> None:
        """Does it again."""
        if self.value is not None:
            self.machine.map_update(self.number, self.key, self.value)
        elif self.machine.map_lookup(self.number, self.key) is not None:
            self.machine.map_delete(self.number, self.key)


class Step(Protocol):
    """Something that a command did to the kernel."""

    def apply(self) -> None:
        """Does it again."""


class Steps(NamedTuple):
    """What a command did, in order."""

    operations: tuple[Step, ...]
    waits: tuple[int, ...]
    """How many of them were done when it waited for a grace period."""

    def on(self, number: Map) -> list[Operation]:
        """The changes of one map."""
        return [one for one in self.operations if isinstance(one, Operation) and one.number is number]


@dataclass
class MapObject:
    """A map. ``number`` is None for the two maps of kernel/grace.py."""

    identity: int
    machine: Machine
    shape: bpf.MapShape
    number: Map | None

    def items(self) -> list[tuple[bytes, bytes]]:
        """All elements, in an order that does not change while none is added or removed.

        The report is always empty: a case compares the one row that its hook has written, so commands must not move
        rows of the case before. tests/system/test_report.py moves rows in a kernel.
        """
        assert self.number is not None
        if self.number in (Map.REPORT, Map.SHARES):
            return []
        assert self.shape.type in (MapType.HASH, MapType.LPM_TRIE)
        return self.machine.map_items(self.number)


_NUMBERS = {f"ig_{number.pin_name}"[:15].encode(): number for number in Map}


class MapCalls:
    """The system calls. ``machine`` gets the maps that are made; ``batches``: whether the kernel has batch commands."""

    def __init__(self, machine: Machine, *, batches: bool = True) -> None:
        self.machine = machine
        self.batches = batches
        self._objects: dict[int, Any] = {}
        """By file descriptor: a true one, which the tool closes."""
        self._pinned: dict[int, Any] = {}
        """By inode of the file that stands for the pin."""
        self._identities = itertools.count(1)
        self.fails: Callable[[int], bool] = lambda _: False
        """Whether a change of an element fails, by how many were tried before it in this record()."""
        self._tried = 0
        self._operations: list[Step] = []
        self._waits: list[int] = []
        self._commands: dict[int, tuple[type[Any], Callable[[Any], int]]] = {
            Command.MAP_CREATE: (MapCreate, self._create),
            Command.MAP_UPDATE_ELEM: (Element, self._update),
            Command.MAP_LOOKUP_ELEM: (Element, self._lookup),
            Command.MAP_DELETE_ELEM: (Element, self._delete),
            Command.MAP_GET_NEXT_KEY: (Element, self._next_key),
            Command.MAP_UPDATE_BATCH: (Batch, self._update_batch),
            Command.MAP_LOOKUP_BATCH: (Batch, self._lookup_batch),
            Command.MAP_DELETE_BATCH: (Batch, self._delete_batch),
            Command.OBJ_GET_INFO_BY_FD: (Info, self._describe),
            Command.OBJ_PIN: (Pin, self._pin),
            Command.OBJ_GET: (Pin, self._get),
            Command.BTF_LOAD: (BtfLoad, lambda _: os.open(os.devnull, os.O_RDONLY)),
        }

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block they are the system calls of this process."""
        with mock.patch.object(syscalls, "bpf", self._bpf), mock.patch.object(syscalls, "membarrier", self._membarrier):
            yield

    def record(self, change: Callable[[], object]) -> Steps:
        """What ``change`` does to the maps."""
        self._operations, self._waits, self._tried = [], [], 0
        with self.in_place():
            change()
        return Steps(tuple(self._operations), tuple(self._waits))

    def _membarrier(self, command: int) -> None:
        assert command == syscalls.MEMBARRIER_GLOBAL
        self._waits.append(len(self._operations))

    def _bpf(self, command: int, buffer: ctypes.Array[ctypes.c_char], size: int) -> tuple[int, int]:
        kind, handle = self._commands[command]
        attr = kind.from_buffer_copy(buffer.raw[:size])
        try:
            return handle(attr), 0
        except OSError as error:
            return -1, error.errno or errno.EIO
        finally:
            ctypes.memmove(buffer, bytes(attr), size)  # also after an error: the count of a batch

    def _do(self, of: MapObject, key: bytes, value: bytes | None) -> None:
        assert of.number is not None
        self._tried += 1
        if self.fails(self._tried - 1):
            raise error(errno.ENOMEM)
        if value is None:
            of.machine.map_delete(of.number, key)
        else:
            of.machine.map_update(of.number, key, value)
        self._operations.append(Operation(of.machine, of.number, key, value))

    # --- elements -----------------------------------------------------------------------------------------------------

    def _update(self, attr: Element) -> int:
        of: MapObject = self._objects[attr.map_fd]
        if of.number is None:  # the array of maps of kernel/grace.py
            self._waits.append(len(self._operations))
        else:
            self._do(of, read(attr.key, of.shape.key_size), read(attr.value, of.shape.value_size))
        return 0

    def _lookup(self, attr: Element) -> int:
        of: MapObject = self._objects[attr.map_fd]
        assert of.number is not None
        value = of.machine.map_lookup(of.number, read(attr.key, of.shape.key_size))
        if value is None:
            raise error(errno.ENOENT)
        ctypes.memmove(attr.value, value, len(value))
        return 0

    def _delete(self, attr: Element) -> int:
        of: MapObject = self._objects[attr.map_fd]
        self._do(of, read(attr.key, of.shape.key_size), None)
        return 0

    def _next_key(self, attr: Element) -> int:
        """The key after the given one; the first one for NULL, and for a key that is not there."""
        of: MapObject = self._objects[attr.map_fd]
        keys = [key for key, _ in of.items()]
        given = read(attr.key, of.shape.key_size) if attr.key else None
        at = keys.index(given) + 1 if given in keys else 0
        if at == len(keys):
            raise error(errno.ENOENT)
        ctypes.memmove(attr.value, keys[at], len(keys[at]))
        return 0

    # --- batches ------------------------------------------------------------------------------------------------------

    def _update_batch(self, attr: Batch) -> int:
        of = self._batch_of(attr)
        keys = _parts(attr.keys, attr.count, of.shape.key_size)
        values = _parts(attr.values, attr.count, of.shape.value_size)
        attr.count = 0
        for key, value in zip(keys, values):
            self._do(of, key, value)
            attr.count += 1
        return 0

    def _delete_batch(self, attr: Batch) -> int:
        of = self._batch_of(attr)
        keys = _parts(attr.keys, attr.count, of.shape.key_size)
        attr.count = 0
        for key in keys:
            self._do(of, key, None)
            attr.count += 1
        return 0

    def _lookup_batch(self, attr: Batch) -> int:
        of = self._batch_of(attr)
        items = of.items()
        start = int.from_bytes(read(attr.in_batch, 4), "little") if attr.in_batch else 0
        part = items[start : start + attr.count]
        for at, (key, value) in enumerate(part):
            ctypes.memmove(attr.keys + at * len(key), key, len(key))
            ctypes.memmove(attr.values + at * len(value), value, len(value))
        attr.count = len(part)
        if start + len(part) == len(items):
            raise error(errno.ENOENT)
        ctypes.memmove(attr.out_batch, (start + len(part)).to_bytes(4, "little"), 4)
        return 0

    def _batch_of(self, attr: Batch) -> MapObject:
        if not self.batches:
            raise error(errno.EINVAL)
        of: MapObject = self._objects[attr.map_fd]
        return of

    # --- maps and pins ------------------------------------------------------------------------------------------------

    def _create(self, attr: MapCreate) -> int:
        shape = bpf.MapShape(attr.map_type, attr.key_size, attr.value_size, attr.max_entries, attr.map_flags)
        number = None if attr.map_name.startswith(b"ig_grace") else _NUMBERS[attr.map_name]
        return self._fd(MapObject(next(self._identities), self.machine, shape, number))

    def _fd(self, of: object) -> int:
        fd = os.open(os.devnull, os.O_RDONLY)
        self._objects[fd] = of
        return fd

    def _describe(self, attr: Info) -> int:
        of: MapObject = self._objects[attr.bpf_fd]
        info = MapInfo(of.shape.type, of.identity, *of.shape[1:])
        ctypes.memmove(attr.info, bytes(info), ctypes.sizeof(info))
        return 0

    def _pin(self, attr: Pin) -> int:
        path = Path(os.fsdecode(ctypes.string_at(attr.pathname)))
        path.touch(exist_ok=False)
        self._pinned[path.stat().st_ino] = self._objects[attr.bpf_fd]
        return 0

    def _get(self, attr: Pin) -> int:
        path = os.fsdecode(ctypes.string_at(attr.pathname))
        return self._fd(self._pinned[os.stat(path).st_ino])


def error(number: int) -> OSError:
    """What a system call fails with."""
    return OSError(number, os.strerror(number))


def read(at: int, size: int) -> bytes:
    """Memory that the caller passed the address of."""
    return ctypes.string_at(at, size)


def _parts(at: int, count: int, size: int) -> list[bytes]:
    whole = read(at, count * size)
    return [whole[start : start + size] for start in range(0, len(whole), size)]
