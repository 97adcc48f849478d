# SPDX-License-Identifier: Apache-2.0
"""Saves the configuration, each file in one step, and keeps its comments."""

from __future__ import annotations

import os

from imds_guard import CONFIG_PATH
from imds_guard.config import edit as config_edit
from imds_guard.config.read import Config, load_config
from imds_guard.config.source import drop_ins, read_source, read_text
from imds_guard.config.write import dump_config
from imds_guard.errors import GuardError, system_text
from imds_guard.kernel import files


def check_saving_to(path: str) -> None:
    """Raises BadPolicy or Unsupported when save_config() could not keep the comments of the file ``path``."""
    if os.path.exists(path) and not _is_generated(path):
        config_edit.require_tomlkit(path)


def _is_generated(path: str) -> bool:
    """True for a file that is exactly as dump_config() writes it, so that overwriting it loses nothing."""
    return not drop_ins(path) and read_text(path) == dump_config(load_config(path, use_stored_ids=True))


def save_config(config: Config, path: str = CONFIG_PATH) -> None:
    """Writes the configuration: a reader sees the old content of a file or the new one. Raises GuardError.

    An existing file keeps its comments, its order, and the spelling of every lock that does not change. It also keeps
    its owner and mode, and a symbolic link still leads to it. A lock stays in the file where it stands, a drop-in or
    ``path``; a new lock is written to ``path``.
    """
    if not os.path.exists(path) or _is_generated(path):
        _write(dump_config(config), path)
        return
    source = read_source(path)
    edited = config_edit.edit(source, config)
    for part in reversed(source.parts):  # drop-ins first: what is taken from them may be new in ``path``
        if edited[part.name] != part.text:
            _write(edited[part.name], part.name)


def _write(text: str, path: str) -> None:
    try:
        file = os.path.realpath(path)
        os.makedirs(os.path.dirname(file), mode=0o755, exist_ok=True)
        files.replace(file, text.encode(), like=os.stat(file) if os.path.exists(file) else None)
    except OSError as error:
        raise GuardError(f"the configuration {path} could not be written: {system_text(error)}") from error
