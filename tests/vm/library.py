# SPDX-License-Identifier: Apache-2.0
"""Compiles tests/vm/c/ to a shared library, once for each state of its source, and declares its functions."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from ctypes import c_bool, c_char_p, c_int, c_int32, c_uint8, c_uint32, c_uint64, c_void_p
from pathlib import Path

from tests.tools import missing
from tests.vm.structs import SIZES

SOURCE = Path(__file__).parent / "c"
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")

_MACHINE, _U32, _U64 = c_void_p, c_uint32, c_uint64
_FUNCTIONS: dict[str, tuple[object, tuple[object, ...]]] = {
    "vm_open": (c_void_p, (_U64,)),
    "vm_close": (None, (_MACHINE,)),
    "vm_roles": (None, (_MACHINE, *(c_int32,) * 6)),
    "vm_program": (None, (_MACHINE, _U32, c_char_p, _U32, c_bool)),
    "vm_patch": (None, (_MACHINE, _U32, _U32, c_char_p)),
    "vm_coverage": (None, (_MACHINE, _U32, c_void_p, c_void_p)),
    "vm_coverage_clear": (None, (_MACHINE, _U32)),
    "vm_controls": (None, (_MACHINE, c_void_p)),
    "vm_attempt": (None, (_MACHINE, _U32, c_void_p, _U32, c_void_p)),
    "vm_packet": (None, (_MACHINE, _U32, c_void_p, c_char_p, _U32, c_void_p)),
    "vm_packets": (None, (_MACHINE, _U32, c_char_p, _U32, c_char_p, c_void_p)),
    "vm_cross": (None, (_MACHINE, c_void_p, c_void_p, _U32, _U32, c_void_p)),
    "vm_replay_record": (None, (_MACHINE, c_void_p, _U32, c_char_p, c_void_p, c_void_p)),
    "vm_replay_differs": (_U32, (_MACHINE, c_void_p, _U32, c_char_p, c_void_p, c_void_p, _U32, _U32, c_void_p)),
    "vm_trace": (_U32, (_MACHINE, c_void_p, _U32)),
    "vm_loads": (_U32, (_MACHINE,)),
    "vm_total_runs": (_U64, (_MACHINE,)),
    "vm_total_steps": (_U64, (_MACHINE,)),
    "vm_raw": (_U64, (_MACHINE, _U32, _U64, _U64, ctypes.POINTER(c_uint32))),
    "vm_sizes": (None, (c_void_p,)),
    "vm_map_define": (c_int, (_MACHINE, _U32, _U32, _U32, _U32, _U32)),
    "vm_map_limit": (None, (_MACHINE, _U32, _U32)),
    "vm_maps_reset": (None, (_MACHINE,)),
    "vm_map_update": (c_int, (_MACHINE, _U32, c_char_p, c_char_p, _U64)),
    "vm_map_delete": (c_int, (_MACHINE, _U32, c_char_p)),
    "vm_map_lookup": (c_int, (_MACHINE, _U32, c_char_p, c_void_p)),
    "vm_map_count": (_U32, (_MACHINE, _U32)),
    "vm_map_items": (None, (_MACHINE, _U32, c_void_p, c_void_p)),
    "vm_map_clear": (None, (_MACHINE, _U32)),
    "vm_reuse_freed": (None, (_MACHINE, c_bool)),
    "vm_journal_begin": (None, (_MACHINE,)),
    "vm_journal_undo": (None, (_MACHINE,)),
    "vm_layout": (None, (_MACHINE, c_void_p)),
    "vm_tasks_reset": (None, (_MACHINE,)),
    "vm_task": (None, (_MACHINE, _U32, c_void_p, c_char_p)),
    "vm_task_poke": (None, (_MACHINE, _U32, _U32, _U32, c_char_p, _U32)),
    "vm_socket": (None, (_MACHINE, _U32, c_void_p)),
    "vm_sockets_reset": (None, (_MACHINE,)),
    "vm_stored": (c_bool, (_MACHINE, c_int32, _U32, c_void_p)),
    "vm_helper_name": (c_char_p, (_U32,)),
    "vm_helper_can_fail": (c_bool, (_U32,)),
}
"""interface.h: result and arguments."""


@functools.cache
def library() -> ctypes.CDLL:
    """The machine. Skips the test where there is no C compiler."""
    loaded = ctypes.CDLL(str(_built()))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    sizes = (c_uint32 * len(SIZES))()
    loaded.vm_sizes(sizes)
    assert list(sizes) == [ctypes.sizeof(struct) for struct in SIZES], "structs.py and machine.h differ"
    return loaded


def _built() -> Path:
    compiler = shutil.which("clang") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        missing("no C compiler is installed (clang or gcc), and tests/vm needs one")
    sources = sorted(SOURCE.glob("*.[ch]"))
    state = hashlib.sha256(repr((compiler, FLAGS)).encode())
    for path in sources:
        state.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"imds-guard-vm-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()  # root loads what is in there
    assert stat.S_ISDIR(found.st_mode), f"{folder} is not a folder"
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (os.getuid(), 0o700), f"others can write to {folder}"
    built = folder / f"{state.hexdigest()[:16]}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "machine.so"
            command = [str(compiler), *FLAGS, "-o", str(made), *(str(path) for path in sources if path.suffix == ".c")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            os.replace(made, built)  # another run of the tests may do the same at this moment
    return built


def words(values: list[int]) -> bytes:
    """uint32_t[] of these numbers."""
    return bytes((c_uint32 * len(values))(*values))


def buffer(size: int) -> ctypes.Array[c_uint8]:
    """Memory for the library to write to."""
    return (c_uint8 * size)()
