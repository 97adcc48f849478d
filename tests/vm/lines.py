# SPDX-License-Identifier: Apache-2.0
"""The line of source that each instruction comes from, by bcc's debug information.

    python3 -m tests.vm.lines FORM    prints a JSON object: function -> list of [file, line, text], one per instruction

It runs in a process of its own, because libbcc writes to standard error.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from imds_guard.backends.ebpf import abi, program
from tests.vm.programs import ALL_FORMS, compiled

_DEBUG_SOURCE = 8
"""DEBUG_SOURCE in bcc's src/python/bcc/__init__.py."""
_INCLUDE = re.compile(r'#include "(\w+\.h)"$')
_SOURCE = re.compile(r"; (?P<text>.*) // Line *(?P<line>\d+)$")
_INSTRUCTION = re.compile(r" *(?P<at>\d+):\t")
_FUNCTION = re.compile(r"Disassembly of function (?P<name>\w+)$")


class Line(NamedTuple):
    """A line of a file in bpf/."""

    file: str
    number: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number}: {self.text}"


@functools.cache
def lines(form: str, hook: str) -> tuple[Line, ...]:
    """For each instruction of a hook its line."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "tests.vm.lines", form]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = {name: [Line(*one) for one in some] for name, some in json.loads(done.stdout).items()}
    whole = compiled(form)[hook]
    made = list(found[abi.HOOKS[hook].function])
    for name, begin in whole.functions[1:]:
        assert begin == len(made), "with debug information the code is another one"
        made += [found[name][0], *found[name]]  # the loader makes the first instruction of a callback
    assert len(made) == len(whole.instructions) // 8, "with debug information the code is another one"
    return tuple(made)


def _flattened() -> tuple[str, list[Line]]:
    """The source with its headers in place: bcc shows lines of the main file alone."""
    origin: list[Line] = []
    seen: set[str] = set()

    def add(file: str) -> None:
        for number, line in enumerate((program.source_folder() / file).read_text(encoding="utf-8").splitlines(), 1):
            header = _INCLUDE.match(line)
            if header is None:
                origin.append(Line(file, number, line.strip()))
            elif header[1] not in seen:
                seen.add(header[1])
                add(header[1])

    add("imds_guard.bpf.c")
    return "\n".join(_unstripped(one) for one in origin) + "\n", origin


def _unstripped(line: Line) -> str:
    return (program.source_folder() / line.file).read_text(encoding="utf-8").splitlines()[line.number - 1]


def _nearest(origin: list[Line], text: str, number: int) -> Line:
    """bcc puts some lines of its own between ours, so its numbers are a little too high."""
    same = [(abs(number - at), line) for at, line in enumerate(origin) if line.text == text]
    return min(same)[1] if same else Line("?", 0, text)


def _parsed(text: str, origin: list[Line]) -> dict[str, list[Line]]:
    made: dict[str, list[Line]] = {}
    some: list[Line] = []
    now = Line("?", 0, "")
    for one in text.splitlines():
        if found := _FUNCTION.match(one):
            some = made.setdefault(found["name"], [])
            now = Line("?", 0, "")
        elif found := _SOURCE.match(one):
            now = _nearest(origin, found["text"], int(found["line"]))
        elif found := _INSTRUCTION.match(one):
            some += [now] * (int(found["at"]) + 1 - len(some))
    return made


def _main(form: str) -> None:
    import bcc

    source, origin = _flattened()
    folder = program.source_folder()
    os.environ["BCC_KERNEL_SOURCE"] = str(folder / "include")
    flags = [f"-I{folder}", *(f"-D{name}={value}" for name, value in program.kernel_offsets() + ALL_FORMS[form])]
    log = Path(f"/proc/self/fd/{os.memfd_create('log')}")
    saved = os.dup(2)
    with log.open("r+") as file:
        os.dup2(file.fileno(), 2)
        module = bcc.BPF(text=source.encode(), cflags=flags, debug=_DEBUG_SOURCE)
        os.dup2(saved, 2)
    found = _parsed(log.read_text(), origin)
    json.dump({name: some[: len(module.dump_func(name.encode())) // 8] for name, some in found.items()}, sys.stdout)


if __name__ == "__main__":
    _main(sys.argv[1])
