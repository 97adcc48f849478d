# SPDX-License-Identifier: Apache-2.0
"""bpf(2) by ctypes: one function a command, ints and octets in, ints and octets out.

``call()`` is the one door; layouts are those of union bpf_attr in include/uapi/linux/bpf.h. Every failure is an OSError
that carries the errno; what it means is for the caller to say.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from imds_guard.errors import system_words
from imds_guard.kernel import btf_made

_SYSCALL_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}
_libc = ctypes.CDLL(None, use_errno=True)

MAP_CREATE, MAP_LOOKUP_ELEM, MAP_UPDATE_ELEM, MAP_DELETE_ELEM, MAP_GET_NEXT_KEY, PROG_LOAD = range(6)
OBJ_PIN, OBJ_GET, PROG_ATTACH, PROG_DETACH, PROG_TEST_RUN = range(6, 11)
PROG_GET_NEXT_ID, MAP_GET_NEXT_ID, PROG_GET_FD_BY_ID, MAP_GET_FD_BY_ID, OBJ_GET_INFO_BY_FD, PROG_QUERY = range(11, 17)
BTF_LOAD = 18
MAP_LOOKUP_BATCH, MAP_UPDATE_BATCH, MAP_DELETE_BATCH = 24, 26, 27
LINK_CREATE, LINK_UPDATE, LINK_GET_FD_BY_ID, LINK_GET_NEXT_ID, ENABLE_STATS = 28, 29, 30, 31, 32
LINK_DETACH = 34
_COMMANDS = {number: name for name, number in list(globals().items()) if name.isupper() and isinstance(number, int)}

MAP_TYPE_HASH, MAP_TYPE_ARRAY, MAP_TYPE_PERCPU_ARRAY, MAP_TYPE_LPM_TRIE, MAP_TYPE_ARRAY_OF_MAPS = 1, 2, 6, 11, 12
MAP_TYPE_SK_STORAGE, MAP_TYPE_RINGBUF = 24, 27
F_NO_PREALLOC = 1
F_AFTER = 16

PROG_TYPE_CGROUP_SKB, PROG_TYPE_CGROUP_SOCK_ADDR = 8, 18
LINK_TYPE_CGROUP = 3
ATTACH_INET_EGRESS = 1
ATTACH_CONNECT4, ATTACH_CONNECT6, ATTACH_SENDMSG4, ATTACH_SENDMSG6 = 10, 11, 14, 15

BATCH = 16384
"""Elements a batch command is given at a time: bounds what the kernel allocates for it."""

_FEW = 512
"""Elements there is room for in the first batch of a reading: most maps hold fewer, and room has its price, too."""

_LOG_OCTETS = (1 << 20, 256 << 20)
"""Room for the verifier's words: at most 1 GiB (UINT_MAX >> 2); ENOSPC says that it was too little."""

_ATTR_ROOM = 512
"""Octets behind the pointer to union bpf_attr, whatever size the kernel is told. Linux 6.18.15 writes query.revision,
octets 56 to 63, also where BPF_PROG_QUERY of a cgroup was given fewer (__cgroup_bpf_query(); 6.18.44 and 7.2 do not):
it would write over whatever lies behind a shorter buffer."""

_ENOTSUPP = 524  # include/linux/errno.h; not an errno that C knows


def invoke(command: int, attr: bytes) -> tuple[int, int, bytes]:
    """The door itself: the result, the errno (0 on success), and union bpf_attr as the kernel left it."""
    number = _SYSCALL_NUMBERS.get(os.uname().machine)
    if number is None:
        return -1, errno.ENOSYS, attr
    buffer = ctypes.create_string_buffer(attr, _ATTR_ROOM)
    result = _libc.syscall(number, command, buffer, len(attr))
    return result, 0 if result >= 0 else ctypes.get_errno(), buffer.raw[: len(attr)]


def call(command: int, attr: bytes) -> tuple[int, bytes]:
    """bpf(2): the result, and union bpf_attr as the kernel left it. Raises OSError."""
    for _ in range(5):
        result, code, after = invoke(command, attr)
        if code == 0:
            return result, after
        if code != errno.EAGAIN or command != PROG_LOAD:  # the verifier gives up when a signal is pending: do_check()
            break
    raise _refusal(command, code)


def _refusal(command: int, code: int) -> OSError:
    """The error, with the command's name where other errors have the file's."""
    return OSError(code, os.strerror(code), f"bpf(BPF_{_COMMANDS.get(command, command)})")


def _pointer(buffer: ctypes.Array[ctypes.c_char] | None) -> int:
    return 0 if buffer is None else ctypes.addressof(buffer)


def _name(text: str) -> bytes:
    """A BPF_OBJ_NAME: up to 15 octets of [A-Za-z0-9_.], bpf_obj_name_cpy() in kernel/bpf/syscall.c."""
    return text.encode()[:15].ljust(16, b"\0")


# --- maps -----------------------------------------------------------------------------------------------------------


class MapShape(NamedTuple):
    """What a map is: BPF_MAP_TYPE_*, sizes in octets, BPF_F_* flags."""

    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int = 0


def map_create(shape: MapShape, name: str, inner_fd: int = 0) -> int:
    """A new map's file descriptor."""
    if shape.type != MAP_TYPE_SK_STORAGE:
        return _map_create(shape, name, inner_fd)
    # Socket storage is made with types alone: bpf_local_storage_map_alloc_check() in kernel/bpf/bpf_local_storage.c.
    btf_fd = _load_btf(btf_made.words(shape.value_size))
    try:
        return _map_create(shape, name, inner_fd, (btf_fd, 1, 2))
    finally:
        os.close(btf_fd)


def _map_create(shape: MapShape, name: str, inner_fd: int, types: tuple[int, int, int] = (0, 0, 0)) -> int:
    """``types``: a BTF object's fd, and in it the number of the key's type and of the value's."""
    attr = struct.pack(
        "=7I16s4I",
        shape.type,
        shape.key_size,
        shape.value_size,
        shape.max_entries,
        shape.flags,
        inner_fd,
        0,
        _name(name),
        0,  # map_ifindex
        *types,
    )
    return call(MAP_CREATE, attr)[0]


def _load_btf(octets: bytes) -> int:
    buffer = ctypes.create_string_buffer(octets, len(octets))
    return call(BTF_LOAD, struct.pack("=QQIII", _pointer(buffer), 0, len(octets), 0, 0))[0]


def _element(fd: int, key: ctypes.Array[ctypes.c_char] | None, value: int, flags: int = 0) -> bytes:
    return struct.pack("=IIQQQ", fd, 0, _pointer(key), value, flags)


def map_update(fd: int, key: bytes, value: bytes) -> None:
    """Sets one element (BPF_ANY)."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    value_buffer = ctypes.create_string_buffer(value, len(value))
    call(MAP_UPDATE_ELEM, _element(fd, key_buffer, _pointer(value_buffer)))


def map_lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """One element's value, or None. For a per-CPU map ``value_size`` is that of all possible CPUs together."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    value_buffer = ctypes.create_string_buffer(value_size)
    try:
        call(MAP_LOOKUP_ELEM, _element(fd, key_buffer, _pointer(value_buffer)))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return value_buffer.raw


def map_delete(fd: int, key: bytes) -> None:
    """Deletes one element; one that is not there is fine."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    try:
        call(MAP_DELETE_ELEM, _element(fd, key_buffer, 0))
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def _keys_one_by_one(fd: int, key_size: int) -> Iterator[bytes]:
    key: ctypes.Array[ctypes.c_char] | None = None
    following = ctypes.create_string_buffer(key_size)
    while True:
        try:
            call(MAP_GET_NEXT_KEY, _element(fd, key, _pointer(following)))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            raise
        yield following.raw
        key = ctypes.create_string_buffer(following.raw, key_size)


def _unknown_batch(error: OSError) -> bool:
    """True when this type of map has no batch commands in this kernel: ENOTSUPP, bpf_map_do_batch()."""
    return error.errno in (_ENOTSUPP, errno.EINVAL, errno.EOPNOTSUPP)


def _batch_attr(fd: int, start: int, end: int, keys: int, values: int, count: int) -> bytes:
    return struct.pack("=QQQQIIQQ", start, end, keys, values, count, fd, 0, 0)


def map_items(fd: int, shape: MapShape) -> list[tuple[bytes, bytes]]:
    """Every element of a hash or a trie, in no order: by batch where the kernel can, else one by one."""
    try:
        return _items_by_batch(fd, shape)
    except OSError as error:
        if not _unknown_batch(error):
            raise
    found = ((key, map_lookup(fd, key, shape.value_size)) for key in list(_keys_one_by_one(fd, shape.key_size)))
    return [(key, value) for key, value in found if value is not None]


def _items_by_batch(fd: int, shape: MapShape) -> list[tuple[bytes, bytes]]:
    cursor = ctypes.create_string_buffer(max(shape.key_size, 8))
    items: list[tuple[bytes, bytes]] = []
    start, room = 0, min(_FEW, shape.max_entries)
    while True:
        # A batch of a hash table stops at whole buckets: ENOSPC when one has more elements than there is room for.
        keys = ctypes.create_string_buffer(room * shape.key_size)
        values = ctypes.create_string_buffer(room * shape.value_size)
        attr = _batch_attr(fd, start, _pointer(cursor), _pointer(keys), _pointer(values), room)
        count, last = _lookup_batch(attr)
        items.extend(_split(keys.raw, values.raw, count, shape))
        if last:
            return items
        start, room = _pointer(cursor), min(BATCH, shape.max_entries)


def _lookup_batch(attr: bytes) -> tuple[int, bool]:
    """How many elements were copied, and whether they were the last ones (ENOENT)."""
    _, code, after = invoke(MAP_LOOKUP_BATCH, attr)
    if code not in (0, errno.ENOENT):
        raise _refusal(MAP_LOOKUP_BATCH, code)
    return struct.unpack_from("=I", after, 32)[0], code == errno.ENOENT


def _split(keys: bytes, values: bytes, count: int, shape: MapShape) -> list[tuple[bytes, bytes]]:
    k, v = shape.key_size, shape.value_size
    return [(keys[i * k : (i + 1) * k], values[i * v : (i + 1) * v]) for i in range(count)]


def map_update_all(fd: int, items: Sequence[tuple[bytes, bytes]]) -> None:
    """Sets many elements: by batch where the kernel can, else one by one."""
    for at in range(0, len(items), BATCH):
        part = items[at : at + BATCH]
        keys, values = b"".join(key for key, _ in part), b"".join(value for _, value in part)
        try:
            _batch(MAP_UPDATE_BATCH, fd, keys, values, len(part))
        except OSError as error:
            if not _unknown_batch(error):
                raise
            for key, value in part:
                map_update(fd, key, value)


def map_delete_all(fd: int, keys: Sequence[bytes]) -> None:
    """Deletes many elements; ones that are not there are fine."""
    for at in range(0, len(keys), BATCH):
        part = keys[at : at + BATCH]
        try:
            _batch(MAP_DELETE_BATCH, fd, b"".join(part), b"", len(part))
        except OSError as error:
            if not _unknown_batch(error) and error.errno != errno.ENOENT:
                raise
            for key in part:
                map_delete(fd, key)


def _batch(command: int, fd: int, keys: bytes, values: bytes, count: int) -> None:
    key_buffer = ctypes.create_string_buffer(keys, len(keys))
    value_buffer = ctypes.create_string_buffer(values, len(values)) if values else None
    call(command, _batch_attr(fd, 0, 0, _pointer(key_buffer), _pointer(value_buffer), count))


# --- programs -------------------------------------------------------------------------------------------------------


def _program_type(attach_type: int) -> int:
    return PROG_TYPE_CGROUP_SKB if attach_type == ATTACH_INET_EGRESS else PROG_TYPE_CGROUP_SOCK_ADDR


def prog_load(
    instructions: bytes,
    name: str,
    attach_type: int,
    log: ctypes.Array[ctypes.c_char] | None = None,
    functions: Sequence[tuple[str, int]] = (),
) -> int:
    """The file descriptor of a verified program for a cgroup's hook; the verifier's words go to ``log``.

    ``functions``: the name and the first instruction of each, when there are several: one that the kernel is to call
    back must have a type (check_ld_imm() in kernel/bpf/verifier.c).
    """
    if len(functions) < 2:
        return _prog_load(instructions, name, attach_type, log, bytes(20))
    records = b"".join(struct.pack("=II", at, btf_made.FIRST_FUNCTION + n) for n, (_, at) in enumerate(functions))
    buffer = ctypes.create_string_buffer(records, len(records))
    btf_fd = _load_btf(btf_made.functions([function for function, _ in functions]))
    try:
        types = struct.pack("=IIQI", btf_fd, 8, _pointer(buffer), len(functions))
        return _prog_load(instructions, name, attach_type, log, types)
    finally:
        os.close(btf_fd)


def _prog_load(
    instructions: bytes, name: str, attach_type: int, log: ctypes.Array[ctypes.c_char] | None, types: bytes
) -> int:
    """``types``: prog_btf_fd, func_info_rec_size, func_info, func_info_cnt."""
    code = ctypes.create_string_buffer(instructions, len(instructions))
    licence = ctypes.create_string_buffer(b"Dual BSD/GPL")
    attr = struct.pack(
        "=IIQQIIQII16sII",
        _program_type(attach_type),
        len(instructions) // 8,
        _pointer(code),
        _pointer(licence),
        0 if log is None else 1,
        0 if log is None else len(log),
        _pointer(log),
        0,  # kern_version
        0,  # prog_flags
        _name(name),
        0,  # prog_ifindex
        attach_type,
    )
    return call(PROG_LOAD, attr + types)[0]


def prog_load_explained(
    instructions: bytes, name: str, attach_type: int, functions: Sequence[tuple[str, int]] = ()
) -> tuple[int, str]:
    """A program's fd and "", or -1 and the last lines of the verifier's log.

    The log is asked for only after a failure: a buffer that is too small for it is ENOSPC, not a rejected program.
    """
    try:
        return prog_load(instructions, name, attach_type, None, functions), ""
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES, errno.E2BIG, errno.EFAULT):
            raise
        refusal = error
    for octets in _LOG_OCTETS:
        log = ctypes.create_string_buffer(octets)
        try:
            return prog_load(instructions, name, attach_type, log, functions), ""
        except OSError as error:
            if error.errno != errno.ENOSPC:
                break
    words = log.value.decode(errors="replace").strip().splitlines()[-4:]
    return -1, "; ".join([system_words(refusal), *words])


class ProgramDescription(NamedTuple):
    """From struct bpf_prog_info: what runs, and on which maps. Times in nanoseconds, zero unless counted."""

    id: int
    name: str
    map_ids: tuple[int, ...]
    run_time_ns: int
    run_count: int


def describe_program(fd: int) -> ProgramDescription:
    """BPF_OBJ_GET_INFO_BY_FD of a program."""
    map_ids = (ctypes.c_uint32 * 64)()
    head = bytearray(232)
    struct.pack_into("=I", head, 52, 64)  # nr_map_ids: room
    struct.pack_into("=Q", head, 56, ctypes.addressof(map_ids))
    raw = _object_description(fd, bytes(head))
    identity = struct.unpack_from("=I", raw, 4)[0]
    count = min(struct.unpack_from("=I", raw, 52)[0], 64)
    name = raw[64:80].split(b"\0")[0].decode(errors="replace")
    run_time_ns, run_count = struct.unpack_from("=QQ", raw, 192)
    return ProgramDescription(identity, name, tuple(map_ids[:count]), run_time_ns, run_count)


def _object_description(fd: int, room: bytes) -> bytes:
    buffer = ctypes.create_string_buffer(room, len(room))
    call(OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", fd, len(room), _pointer(buffer)))
    return buffer.raw


def describe_map(fd: int) -> tuple[int, MapShape]:
    """A map's ID and shape, from struct bpf_map_info."""
    kind, identity, key_size, value_size, max_entries, flags = struct.unpack_from(
        "=6I", _object_description(fd, bytes(80))
    )
    return identity, MapShape(kind, key_size, value_size, max_entries, flags)


# --- links and cgroups ----------------------------------------------------------------------------------------------


class LinkDescription(NamedTuple):
    """A cgroup link, from struct bpf_link_info."""

    id: int
    type: int
    prog_id: int
    cgroup_id: int
    attach_type: int


def link_create(prog_fd: int, cgroup_fd: int, attach_type: int) -> int:
    """A link's fd: the program is attached beside all others ("multi"), in the last place.

    BPF_F_AFTER asks for the last place; a kernel that does not know it for cgroups says EINVAL, and attaches last
    anyway.
    """
    try:
        return call(LINK_CREATE, struct.pack("=4I", prog_fd, cgroup_fd, attach_type, F_AFTER))[0]
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return call(LINK_CREATE, struct.pack("=4I", prog_fd, cgroup_fd, attach_type, 0))[0]


def link_update(link_fd: int, prog_fd: int) -> None:
    """Puts another program in a link's place, with no moment without one."""
    call(LINK_UPDATE, struct.pack("=4I", link_fd, prog_fd, 0, 0))


def link_detach(link_fd: int) -> None:
    """Detaches a link at once; unpinning alone does so some time later."""
    call(LINK_DETACH, struct.pack("=I", link_fd))


def describe_link(fd: int) -> LinkDescription:
    """BPF_OBJ_GET_INFO_BY_FD of a link; cgroup fields are zero for links of other types."""
    raw = _object_description(fd, bytes(64))
    kind, identity, prog_id = struct.unpack_from("=3I", raw)
    cgroup_id, attach_type = struct.unpack_from("=QI", raw, 16) if kind == LINK_TYPE_CGROUP else (0, 0)
    return LinkDescription(identity, kind, prog_id, cgroup_id, attach_type)


def attached_programs(cgroup_fd: int, attach_type: int) -> list[int]:
    """IDs of the programs attached to this very cgroup at a hook, in the order they run (BPF_PROG_QUERY)."""
    ids = (ctypes.c_uint32 * 1024)()
    attr = struct.pack("=4IQII", cgroup_fd, attach_type, 0, 0, ctypes.addressof(ids), 1024, 0)
    _, after = call(PROG_QUERY, attr)
    return list(ids[: struct.unpack_from("=I", after, 24)[0]])


def _ids(command: int) -> Iterator[int]:
    current = 0
    while True:
        try:
            _, after = call(command, struct.pack("=III", current, 0, 0))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            raise
        current = struct.unpack_from("=I", after, 4)[0]
        yield current


def _fd_by_id(command: int, identity: int) -> int | None:
    try:
        return call(command, struct.pack("=III", identity, 0, 0))[0]
    except OSError as error:
        if error.errno == errno.ENOENT:  # gone since
            return None
        raise


def program_by_id(identity: int) -> int | None:
    """A program's fd, or None when it is gone."""
    return _fd_by_id(PROG_GET_FD_BY_ID, identity)


def links_of_cgroup(cgroup_id: int) -> list[tuple[int, LinkDescription]]:
    """(fd, description) of every link on a cgroup; the caller closes the fds."""
    found: list[tuple[int, LinkDescription]] = []
    for identity in _ids(LINK_GET_NEXT_ID):
        fd = _fd_by_id(LINK_GET_FD_BY_ID, identity)
        if fd is None:
            continue
        link = describe_link(fd)
        if link.type == LINK_TYPE_CGROUP and link.cgroup_id == cgroup_id:
            found.append((fd, link))
        else:
            os.close(fd)
    return found


# --- pins and statistics --------------------------------------------------------------------------------------------


def pin(fd: int, path: str) -> None:
    """Pins a map, program or link at a path in a bpffs."""
    _pin_call(OBJ_PIN, path, fd)


def pinned(path: str) -> int:
    """The fd of what is pinned at a path."""
    return _pin_call(OBJ_GET, path, 0)


def _pin_call(command: int, path: str, fd: int) -> int:
    name = ctypes.create_string_buffer(os.fsencode(path))
    return call(command, struct.pack("=QII", _pointer(name), fd, 0))[0]


def enable_run_statistics() -> int:
    """An fd; while it is open the kernel counts each program's runs and time (BPF_ENABLE_STATS, v5.8)."""
    return call(ENABLE_STATS, struct.pack("=I", 0))[0]


def possible_cpus() -> int:
    """How many values a per-CPU map has for a key: CPUs in /sys/devices/system/cpu/possible ("0-3,5")."""
    with open("/sys/devices/system/cpu/possible", encoding="ascii") as file:
        parts: dict[int, None] = {}
        for part in file.read().strip().split(","):
            low, _, high = part.partition("-")
            parts.update(dict.fromkeys(range(int(low), int(high or low) + 1)))
    return max(parts) + 1
