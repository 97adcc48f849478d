# SPDX-License-Identifier: Apache-2.0
"""The configuration file on disk: written in one step, with its comments kept."""

from __future__ import annotations

import os

from imds_guard import CONFIG_PATH
from imds_guard.config import edit as config_edit
from imds_guard.config.read import Config, load_config, read_text
from imds_guard.config.write import dump_config
from imds_guard.errors import GuardError, system_text
from imds_guard.kernel import files


def check_saving_to(path: str) -> None:
    """Raises where save_config() could not keep what stands in the file ``path``: BadPolicy, Unsupported."""
    if os.path.exists(path) and not _is_our_own(path):
        config_edit.require_tomlkit(path)


def _is_our_own(path: str) -> bool:
    """True for a file that holds just what dump_config() writes: a new one loses nothing."""
    return read_text(path) == dump_config(load_config(path, use_stored_ids=True))


def save_config(config: Config, path: str = CONFIG_PATH) -> None:
    """Writes the file in one step: a reader sees the old one or the new one. Raises GuardError.

    A file that is there keeps its comments, its order and the words of every lock that says the same as before.
    """
    if not os.path.exists(path) or _is_our_own(path):
        text = dump_config(config)
    else:
        text = config_edit.edit(read_text(path), path, config)
    _write(text, path)


def _write(text: str, path: str) -> None:
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), mode=0o755, exist_ok=True)
        files.replace(path, text.encode())
    except OSError as error:
        raise GuardError(f"the configuration {path} could not be written: {system_text(error)}") from error
