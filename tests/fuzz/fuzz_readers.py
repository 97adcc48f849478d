# SPDX-License-Identifier: Apache-2.0
"""Fuzzes one reader with atheris: ``python -m tests.fuzz.fuzz_readers TARGET [libFuzzer's options] [CORPUS]``.

The tests do not need atheris (PyPI): install it where you run this (python -m pip install atheris).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Start with the seeds of the target. libFuzzer writes failing inputs to ./crash-*."""
    import atheris  # type: ignore[import-untyped, unused-ignore]

    with atheris.instrument_imports(include=["imds_guard", "tomllib"]):
        from tests.fuzz.seeds import FOUND, seeds
        from tests.fuzz.targets import TARGETS

    name = sys.argv[1]
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    found = [data for target, data in FOUND if target == name]
    for number, data in enumerate([*seeds()[name], *found]):
        (folder / f"seed-{number}").write_bytes(data)
    atheris.Setup([sys.argv[0], *sys.argv[2:], str(folder)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
