# SPDX-License-Identifier: Apache-2.0
"""The unit that writes metrics for node_exporter: a drop-in of it names the folder, where it is not Debian's."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress

from imds_guard.commands.unit_files import MARK, escaped, read, write
from imds_guard.errors import GuardError, UsageError, system_text
from imds_guard.kernel import ownership

SERVICE = "imds-guard-metrics.service"
FOLDER = "/var/lib/prometheus/node-exporter"
"""In the unit; node_exporter of Debian reads it (/etc/default/prometheus-node-exporter)."""
FILE = "imds-guard.prom"
_DROP_IN = "textfile.conf"


def check_folder(folder: str, hidden: Sequence[str]) -> str:
    """The absolute path of a folder that the unit can write to. ``hidden``: folders that it does not see.

    Raises UsageError.
    """
    path = os.path.realpath(folder)
    if not os.path.isdir(path):
        raise UsageError(
            f"--textfile {folder}: there is no such folder; name the one that node_exporter reads "
            "(its option --collector.textfile.directory)"
        )
    if any(f"{path}/".startswith(f"{one}/") for one in hidden):
        raise UsageError(f"--textfile {folder}: services do not see that folder; take one below /var/lib")
    if not re.fullmatch(r"[\w/.+-]+", path, re.ASCII):
        raise UsageError(
            f"--textfile {folder}: take a path of letters, digits and / . _ + -, which systemd reads as it is"
        )
    return path


def drop_in(folder: str, program: str, is_of_root: bool) -> str:
    """The text; empty where the unit is right as it is."""
    if folder == FOLDER and is_of_root:
        return ""
    lines = [MARK, "[Service]", "ExecStart="]
    lines.append(f"ExecStart={escaped(program)} metrics --textfile {folder}/{FILE}")
    lines.append(f"ReadWritePaths={folder}")
    if not is_of_root:
        lines += ["# Another user than root owns the folder.", "CapabilityBoundingSet=CAP_DAC_OVERRIDE"]
    return "\n".join([*lines, ""])


def write_drop_in(folder: str, program: str, units: str) -> list[str]:
    """Makes the unit write to ``folder``. Raises GuardError."""
    path = _path(units)
    text = drop_in(folder, program, ownership.is_owned_by_root(os.stat(folder)))
    if not text:
        return remove_drop_in(units)
    if read(path) == text:
        return [f"{path} is there already"]
    try:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    except OSError as error:
        raise GuardError(f"making the folder of {path}: {system_text(error)}; the service is not installed") from error
    write(path, text)
    return [f"wrote {path}"]


def remove_drop_in(units: str) -> list[str]:
    """Removes what write_drop_in() wrote. Others' drop-ins stay."""
    path = _path(units)
    if not read(path).startswith(MARK):
        return []
    os.unlink(path)
    with suppress(OSError):  # drop-ins of the administrator are in it
        os.rmdir(os.path.dirname(path))
    return [f"removed {path}"]


def _path(units: str) -> str:
    return os.path.join(units, f"{SERVICE}.d", _DROP_IN)
