# SPDX-License-Identifier: Apache-2.0
"""Maps: create, describe, and read and write elements, one by one or by batch."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from imds_guard.kernel import btf_encode
from imds_guard.kernel.bpf.attr import Batch, Command, Element, Info, MapCreate, MapInfo, MapType, object_name
from imds_guard.kernel.bpf.syscall import address, call, load_btf

BATCH = 16384
"""Elements per batch command: this bounds what the kernel allocates for it."""

_FIRST_BATCH = 512
"""Elements in the first batch of a reading. Most maps have fewer, and a large buffer has its price, too."""

_ENOTSUPP = 524
"""include/linux/errno.h; C libraries do not know this errno."""


class MapShape(NamedTuple):
    """The type (a MapType), sizes in bytes, and flags (BPF_F_*) of a map."""

    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int = 0


def map_create(shape: MapShape, name: str, inner_fd: int = 0) -> int:
    """A new map's file descriptor. ``inner_fd`` is a map like those that a map of maps will hold."""
    attr = MapCreate(
        map_type=shape.type,
        key_size=shape.key_size,
        value_size=shape.value_size,
        max_entries=shape.max_entries,
        map_flags=shape.flags,
        inner_map_fd=inner_fd,
        map_name=object_name(name),
    )
    if shape.type != MapType.SK_STORAGE:
        return call(Command.MAP_CREATE, attr)
    # Socket storage must have types: bpf_local_storage_map_alloc_check() in kernel/bpf/bpf_local_storage.c.
    btf_fd = load_btf(btf_encode.u32_array(shape.value_size))
    attr.btf_fd, attr.btf_key_type_id, attr.btf_value_type_id = btf_fd, btf_encode.INT, btf_encode.ARRAY
    try:
        return call(Command.MAP_CREATE, attr)
    finally:
        os.close(btf_fd)


def describe_map(fd: int) -> tuple[int, MapShape]:
    """A map's ID and shape."""
    info = MapInfo()
    call(Command.OBJ_GET_INFO_BY_FD, Info(bpf_fd=fd, info_len=ctypes.sizeof(info), info=address(info)))
    return info.id, MapShape(info.type, info.key_size, info.value_size, info.max_entries, info.map_flags)


# --- one element ----------------------------------------------------------------------------------------------------


def map_update(fd: int, key: bytes, value: bytes) -> None:
    """Sets one element, whether it exists or not (BPF_ANY)."""
    key_buffer, value_buffer = _buffer(key), _buffer(value)
    call(Command.MAP_UPDATE_ELEM, Element(map_fd=fd, key=address(key_buffer), value=address(value_buffer)))


def map_lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """One element's value, or None. For a per-CPU map ``value_size`` is the size for all possible CPUs together."""
    key_buffer, value_buffer = _buffer(key), ctypes.create_string_buffer(value_size)
    element = Element(map_fd=fd, key=address(key_buffer), value=address(value_buffer))
    found = call(Command.MAP_LOOKUP_ELEM, element, expected=(errno.ENOENT,)) == 0
    return value_buffer.raw if found else None


def map_delete(fd: int, key: bytes) -> None:
    """Deletes one element, if it exists."""
    key_buffer = _buffer(key)
    call(Command.MAP_DELETE_ELEM, Element(map_fd=fd, key=address(key_buffer)), expected=(errno.ENOENT,))


def _buffer(content: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(content, len(content))


# --- all elements ---------------------------------------------------------------------------------------------------


def map_items(fd: int, shape: MapShape) -> list[tuple[bytes, bytes]]:
    """Every element of a hash or a trie, in no order: by batch where the kernel can, else one by one."""
    try:
        return _items_by_batch(fd, shape)
    except OSError as error:
        if not _is_unknown_batch(error):
            raise
    found = ((key, map_lookup(fd, key, shape.value_size)) for key in list(_keys_one_by_one(fd, shape.key_size)))
    return [(key, value) for key, value in found if value is not None]


def map_update_all(fd: int, items: Sequence[tuple[bytes, bytes]]) -> None:
    """Sets many elements: by batch where the kernel can, else one by one."""
    for at in range(0, len(items), BATCH):
        part = items[at : at + BATCH]
        keys, values = b"".join(key for key, _ in part), b"".join(value for _, value in part)
        try:
            _batch(Command.MAP_UPDATE_BATCH, fd, keys, values, len(part))
        except OSError as error:
            if not _is_unknown_batch(error):
                raise
            for key, value in part:
                map_update(fd, key, value)


def map_delete_all(fd: int, keys: Sequence[bytes]) -> None:
    """Deletes many elements, those of them that exist."""
    for at in range(0, len(keys), BATCH):
        part = keys[at : at + BATCH]
        try:
            _batch(Command.MAP_DELETE_BATCH, fd, b"".join(part), b"", len(part))
        except OSError as error:
            if not _is_unknown_batch(error) and error.errno != errno.ENOENT:
                raise
            for key in part:
                map_delete(fd, key)


def _keys_one_by_one(fd: int, key_size: int) -> Iterator[bytes]:
    key: ctypes.Array[ctypes.c_char] | None = None
    following = ctypes.create_string_buffer(key_size)
    while True:
        element = Element(map_fd=fd, key=address(key), value=address(following))
        if call(Command.MAP_GET_NEXT_KEY, element, expected=(errno.ENOENT,)) != 0:
            return
        yield following.raw
        key = _buffer(following.raw)


def _is_unknown_batch(error: OSError) -> bool:
    """True when this type of map has no batch commands in this kernel: ENOTSUPP, bpf_map_do_batch()."""
    return error.errno in (_ENOTSUPP, errno.EINVAL, errno.EOPNOTSUPP)


def _items_by_batch(fd: int, shape: MapShape) -> list[tuple[bytes, bytes]]:
    cursor = ctypes.create_string_buffer(max(shape.key_size, 8))
    items: list[tuple[bytes, bytes]] = []
    start, capacity = 0, min(_FIRST_BATCH, shape.max_entries)
    while True:
        # A batch of a hash table ends between two buckets: ENOSPC when one bucket has more elements than fit.
        keys = ctypes.create_string_buffer(capacity * shape.key_size)
        values = ctypes.create_string_buffer(capacity * shape.value_size)
        batch = Batch(in_batch=start, out_batch=address(cursor), keys=address(keys), values=address(values))
        batch.count, batch.map_fd = capacity, fd
        is_last = call(Command.MAP_LOOKUP_BATCH, batch, expected=(errno.ENOENT,)) == -errno.ENOENT
        items.extend(_split(keys.raw, values.raw, batch.count, shape))
        if is_last:
            return items
        start, capacity = address(cursor), min(BATCH, shape.max_entries)


def _split(keys: bytes, values: bytes, count: int, shape: MapShape) -> list[tuple[bytes, bytes]]:
    k, v = shape.key_size, shape.value_size
    return [(keys[i * k : (i + 1) * k], values[i * v : (i + 1) * v]) for i in range(count)]


def _batch(command: Command, fd: int, keys: bytes, values: bytes, count: int) -> None:
    key_buffer, value_buffer = _buffer(keys), _buffer(values) if values else None
    call(command, Batch(keys=address(key_buffer), values=address(value_buffer), count=count, map_fd=fd))


# --- per-CPU maps ---------------------------------------------------------------------------------------------------


def possible_cpus() -> int:
    """How many values a per-CPU map has for a key: the CPUs in /sys/devices/system/cpu/possible ("0-3,5")."""
    with open("/sys/devices/system/cpu/possible", encoding="ascii") as file:
        ranges = [part.partition("-") for part in file.read().strip().split(",")]
    return max(int(high or low) for low, _, high in ranges) + 1
