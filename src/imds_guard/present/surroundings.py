# SPDX-License-Identifier: Apache-2.0
"""What status shows beside the guard that it is about, as text and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from imds_guard.present.guards import guard_values, other_guard_lines
from imds_guard.present.wrap import WIDTH, wrapped
from imds_guard.text import escaped
from imds_guard.watch.timestamps import iso_time, utc_text

if TYPE_CHECKING:
    from imds_guard.commands.surroundings import ConfigFile, Surroundings, WrongLine

_ENABLED = ("enabled", "enabled-runtime", "alias", "static", "indirect", "generated")
"""Words of systemctl is-enabled for a unit that something starts."""


def surroundings_lines(seen: Surroundings, in_force: bool) -> list[str]:
    """Since when, what the next boot does, what the file says, and the other guards."""
    since = [] if seen.since is None else [f"in force since: {utc_text(seen.since)}"]
    # Else those whose cgroup is gone are faults.
    others = other_guard_lines(seen.others, with_gone=in_force and seen.cgroup is not None)
    return [*since, *_boot_lines(seen.unit), *_file_lines(seen.file, in_force), *others]


def _boot_lines(unit: str | None) -> list[str]:
    if unit is None:
        text = "systemd is not the init here: nothing of imds-guard starts at boot by itself"
    elif unit in _ENABLED:
        text = f"imds-guard.service is {unit}"
    elif unit == "unknown":
        text = "systemd does not say whether imds-guard.service is enabled"
    else:
        text = f"imds-guard.service is {unit}: nothing is locked after a boot (imds-guard install-service)"
    return wrapped("at boot: ", text)


def _file_lines(file: ConfigFile, in_force: bool) -> list[str]:
    if not file.exists:
        return [f"file: there is no {file.path}"]
    if file.error is not None:
        return [*wrapped("file: ", f"unusable: {escaped(file.error)}"), *_wrong_line(file.line)]
    if file.is_in_force is None:
        text = "has names that only the name service knows, so it was not compared with what is in force"
    elif file.is_in_force:
        text = "says what is in force"
    else:
        text = "says another policy than the one in force (imds-guard start --dry-run shows what differs)"
        text = text if in_force else "is not in force"
    return wrapped("file: ", f"{file.path} {text}")


def _wrong_line(line: WrongLine | None) -> list[str]:
    """The line as it stands there, cut off where the screen ends."""
    if line is None:
        return []
    title = f"  line {line.number}: "
    text = escaped(line.text.strip())
    room = WIDTH - len(title)
    return [title + (text if len(text) <= room else f"{text[: room - 3]}...")]


def surroundings_values(seen: Surroundings) -> dict[str, Any]:
    """The same as plain values for JSON."""
    file, line = seen.file, seen.file.line
    return {
        "since": None if seen.since is None else iso_time(seen.since),
        "guards": [guard_values(one) for one in seen.guards],
        "boot": {"unit": seen.unit},
        "file": {
            "path": file.path,
            "exists": file.exists,
            "error": file.error,
            "line": None if line is None else {"file": line.file, "number": line.number, "text": line.text},
            "in_force": file.is_in_force,
        },
    }
