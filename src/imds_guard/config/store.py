# SPDX-License-Identifier: Apache-2.0
"""Saves the configuration file in one step, and keeps its comments."""

from __future__ import annotations

import os

from imds_guard import CONFIG_PATH
from imds_guard.config import edit as config_edit
from imds_guard.config.read import Config, load_config, read_text
from imds_guard.config.write import dump_config
from imds_guard.errors import GuardError, system_text
from imds_guard.kernel import files


def check_saving_to(path: str) -> None:
    """Raises BadPolicy or Unsupported when save_config() could not keep the comments of the file ``path``."""
    if os.path.exists(path) and not _is_generated(path):
        config_edit.require_tomlkit(path)


def _is_generated(path: str) -> bool:
    """True for a file that is exactly as dump_config() writes it, so that overwriting it loses nothing."""
    return read_text(path) == dump_config(load_config(path, use_stored_ids=True))


def save_config(config: Config, path: str = CONFIG_PATH) -> None:
    """Write the file in one step: a reader sees the old content or the new one. Raises GuardError.

    An existing file keeps its comments, its order, and the spelling of every lock that does not change. It also keeps
    its owner and mode, and a symbolic link still leads to it.
    """
    if not os.path.exists(path) or _is_generated(path):
        text = dump_config(config)
    else:
        text = config_edit.edit(read_text(path), path, config)
    _write(text, path)


def _write(text: str, path: str) -> None:
    try:
        file = os.path.realpath(path)
        os.makedirs(os.path.dirname(file), mode=0o755, exist_ok=True)
        files.replace(file, text.encode(), like=os.stat(file) if os.path.exists(file) else None)
    except OSError as error:
        raise GuardError(f"the configuration {path} could not be written: {system_text(error)}") from error
