# SPDX-License-Identifier: Apache-2.0
"""The user that the compiler runs as, and its failures. Other tests show that the compiled programs are right."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Callable

import pytest

from imds_guard.errors import Unsupported
from imds_guard.kernel import compiler

NOBODY = 65534


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], bytes]], bytes]]:
    """compile_functions() with a bcc that calls a function of the test and returns its result as the instructions."""

    def compile_by(act: Callable[[], bytes]) -> bytes:
        class Module:
            def __init__(self, **_: Any) -> None:
                self._made = act()

            def dump_func(self, _: bytes) -> bytes:
                return self._made

        made = ModuleType("bcc")
        made.BPF = Module  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "bcc", made)
        monkeypatch.setattr(compiler, "has_bcc", lambda: True)
        compiler.compile_functions.cache_clear()
        return compiler.compile_functions("", "/", "/", ("f",), ())["f"]

    yield compile_by
    compiler.compile_functions.cache_clear()


def test_the_child_is_not_root_and_this_process_is(compiled: Callable[[Callable[[], bytes]], bytes]) -> None:
    """libbcc reads all of the kernel's symbols when it runs as root."""
    assert compiled(lambda: str(os.geteuid()).encode()) == str(NOBODY).encode()
    assert os.getresuid() == (0, 0, 0)


def test_the_child_reads_files_of_root_alone(compiled: Callable[[Callable[[], bytes]], bytes], tmp_path: Path) -> None:
    """The headers may be below a home folder of mode 700."""
    header = tmp_path / "header.h"
    header.write_bytes(b"root's")
    header.chmod(0o600)
    tmp_path.chmod(0o700)
    assert compiled(header.read_bytes) == b"root's"


def test_the_reason_is_in_the_sentence(compiled: Callable[[Callable[[], bytes]], bytes]) -> None:
    """The last lines on stderr, after the message of Python's bcc, which says only that it failed."""

    def fails() -> bytes:
        os.write(2, b"header.h:7: error: no\n")
        raise Exception("Failed to compile BPF module")  # as bcc does

    with pytest.raises(Unsupported) as refused:
        compiled(fails)
    assert str(refused.value).startswith(
        "compiling the eBPF programs with bcc: Failed to compile BPF module: header.h:7: error: no; please report it"
    )


def test_a_crash_of_the_compiler_is_an_error(compiled: Callable[[Callable[[], bytes]], bytes]) -> None:
    """The compiler runs in a process of its own."""

    def crashes() -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        return b""

    with pytest.raises(Unsupported, match="compiling the eBPF programs with bcc: a child ended before it had a result"):
        compiled(crashes)


def test_a_bcc_that_can_not_be_imported_is_an_error(
    compiled: Callable[[Callable[[], bytes]], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its module is there, and the library that it loads is not."""
    compiled(lambda: b"")
    compiler.compile_functions.cache_clear()
    monkeypatch.setitem(sys.modules, "bcc", None)
    with pytest.raises(Unsupported, match="compiling the eBPF programs with bcc: import of bcc halted"):
        compiler.compile_functions("", "/", "/", ("f",), ())
