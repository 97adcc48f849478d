# SPDX-License-Identifier: Apache-2.0
"""Who the compiler runs as, and what becomes of its failures. What it makes of our C, the other tests show."""

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
    """What comes of compile_functions() where bcc does what one wants, and it is the compiler's only function."""

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


def test_it_is_not_root_there_and_root_here(compiled: Callable[[Callable[[], bytes]], bytes]) -> None:
    """libbcc reads all of the kernel's symbols when it is."""
    assert compiled(lambda: str(os.geteuid()).encode()) == str(NOBODY).encode()
    assert os.getresuid() == (0, 0, 0)


def test_it_reads_what_root_alone_may_read(compiled: Callable[[Callable[[], bytes]], bytes], tmp_path: Path) -> None:
    """The headers may lie below a home of mode 700."""
    header = tmp_path / "header.h"
    header.write_bytes(b"root's")
    header.chmod(0o600)
    tmp_path.chmod(0o700)
    assert compiled(header.read_bytes) == b"root's"


def test_its_words_are_in_the_sentence(compiled: Callable[[Callable[[], bytes]], bytes]) -> None:
    """The last that it wrote to stderr, and that of Python's bcc, which knows no more than that it failed."""

    def fails() -> bytes:
        os.write(2, b"header.h:7: error: no\n")
        raise Exception("Failed to compile BPF module")  # as bcc does

    with pytest.raises(Unsupported) as refused:
        compiled(fails)
    assert str(refused.value).startswith(
        "compiling the eBPF programs with bcc: Failed to compile BPF module: header.h:7: error: no; please report it"
    )


def test_where_it_crashes_we_do_not(compiled: Callable[[Callable[[], bytes]], bytes]) -> None:
    """A compiler of a hundred megabytes is a process of its own."""

    def crashes() -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        return b""

    with pytest.raises(Unsupported, match="compiling the eBPF programs with bcc: a child ended before it had a result"):
        compiled(crashes)


def test_a_bcc_that_can_not_be_imported_is_told(
    compiled: Callable[[Callable[[], bytes]], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its module is there, and what that loads is not."""
    compiled(lambda: b"")
    compiler.compile_functions.cache_clear()
    monkeypatch.setitem(sys.modules, "bcc", None)
    with pytest.raises(Unsupported, match="compiling the eBPF programs with bcc: import of bcc halted"):
        compiler.compile_functions("", "/", "/", ("f",), ())
