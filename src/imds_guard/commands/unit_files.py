# SPDX-License-Identifier: Apache-2.0
"""Files that install-service writes below /etc/systemd/system, and words of their syntax."""

from __future__ import annotations

from imds_guard.errors import GuardError, system_text
from imds_guard.kernel import files

MARK = "# Written by imds-guard install-service."

PROGRAM = "/usr/bin/imds-guard"
"""The program in the units of data/systemd."""


def escaped(program: str) -> str:
    """The path as one argument of ExecStart= (systemd.service(5), "Command lines")."""
    plain = program.replace("%", "%%").replace("$", "$$")
    if all(character.isalnum() or character in "/._+-%$" for character in plain):
        return plain
    return '"' + plain.replace("\\", "\\\\").replace('"', '\\"') + '"'


def read(path: str) -> str:
    """The text; empty where there is no such file. Raises GuardError."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise GuardError(f"reading {path}: {error}; check what it is and move it away") from error


def write(path: str, text: str) -> None:
    """Replaces the file in one step. Raises GuardError."""
    try:
        files.replace(path, text.encode())
    except OSError as error:
        raise GuardError(f"writing {path}: {system_text(error)}; the service is not installed") from error
