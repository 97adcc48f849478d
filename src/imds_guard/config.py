# SPDX-License-Identifier: Apache-2.0
"""Policies as they are written: read from the configuration file, written to it, or said on the command line."""

from __future__ import annotations

import os
from typing import Callable, Iterable, List, Sequence

from imds_guard.command_policy import policy_from_words
from imds_guard.config_reader import CONFIG_PATH, Config, load_config, parse_config
from imds_guard.endpoint_words import endpoint_words, parse_endpoint
from imds_guard.errors import BadPolicy, GuardError, system_words
from imds_guard.identity import group_id, group_name, user_id, user_name
from imds_guard.policy import Lock, Verdict

__all__ = [
    "CONFIG_PATH",
    "Config",
    "dump_config",
    "endpoint_words",
    "load_config",
    "parse_config",
    "parse_endpoint",
    "policy_from_words",
    "save_config",
]


def dump_config(config: Config) -> str:
    """TOML that parse_config() reads as the same configuration. Names stand with their IDs."""
    lines = ["# Written by imds-guard --save.", ""]
    lines.append(f"mode = {_quoted(config.policy.mode.value)}")
    lines.append(f"containers = {_quoted(config.policy.containers.value)}")
    lines.append(f"on_error = {_quoted(config.on_error)}")
    lines.append(f"backend = {_quoted(config.backend)}")
    if config.cgroup is not None:
        lines.append(f"cgroup = {_quoted(config.cgroup)}")
    for lock in config.policy.locks:
        lines += _dump_lock(lock)
    return "\n".join(lines) + "\n"


def _dump_lock(lock: Lock) -> List[str]:
    lines = ["", f"[lock.{_quoted(lock.name)}]"]
    lines += _dump_list("endpoints", [_quoted(word) for item in lock.endpoints for word in endpoint_words(item)])
    lines += _dump_list("users", _dump_ids(lock.allow.users, user_name, user_id))
    lines += _dump_list("groups", _dump_ids(lock.allow.groups, group_name, group_id))
    lines += _dump_list("deny_users", _dump_ids(lock.deny.users, user_name, user_id))
    lines += _dump_list("deny_groups", _dump_ids(lock.deny.groups, group_name, group_id))
    lines.append(f"default = {_quoted(lock.default.value)}")
    if not lock.allow and lock.default is Verdict.DENY:
        lines.append("nobody = true")
    return lines


def _dump_list(key: str, items: Sequence[str]) -> List[str]:
    return [f"{key} = [", *(f"  {item}," for item in items), "]"] if items else []


def _dump_ids(ids: Iterable[int], name_of: Callable[[int], str], id_of: Callable[[str], int]) -> List[str]:
    return [_dump_id(number, name_of(number), id_of) for number in sorted(ids)]


def _dump_id(number: int, name: str, id_of: Callable[[str], int]) -> str:
    """The name with its ID; the ID alone where no name leads back to it, or none that TOML could hold."""
    if name == str(number) or not name.isprintable():
        return str(number)
    try:
        leads_back = id_of(name) == number
    except BadPolicy:
        leads_back = False
    return f"{{ name = {_quoted(name)}, id = {number} }}" if leads_back else str(number)


def _quoted(text: str) -> str:
    """A TOML basic string (https://toml.io/en/v1.0.0#string)."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(f"\\u{ord(c):04x}" if c < " " or c == "\x7f" else c for c in escaped) + '"'


def save_config(config: Config, path: str = CONFIG_PATH) -> None:
    """Writes the file in one step: a reader sees the old one or the new one. Raises GuardError."""
    import tempfile  # noqa: PLC0415 -- start-up time: it is slow to import, and few commands save

    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, mode=0o755, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".config-")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(dump_config(config))
                os.fchmod(file.fileno(), 0o644)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise GuardError(f"the configuration {path} could not be written: {system_words(error)}") from error
