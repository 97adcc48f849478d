# SPDX-License-Identifier: Apache-2.0
"""Saves the configuration, each file in one step, and keeps its comments."""

from __future__ import annotations

import os
from collections.abc import Sequence

from imds_guard import CONFIG_PATH
from imds_guard.config import edit as config_edit
from imds_guard.config.read import Config, load_config
from imds_guard.config.source import drop_ins, read_source, read_text
from imds_guard.config.spelling import NO_PRESETS, known_presets
from imds_guard.config.write import dump_config
from imds_guard.errors import GuardError, system_text
from imds_guard.kernel import files


def check_saving_to(path: str) -> None:
    """Raises BadPolicy or Unsupported when save_config() could not keep the comments of the file ``path``."""
    if os.path.exists(path) and not _is_generated(path):
        config_edit.require_tomlkit(path)


def _is_generated(path: str) -> bool:
    """True for a file that is exactly as dump_config() writes it, so that overwriting it loses nothing."""
    config = load_config(path, use_stored_ids=True)
    # Earlier versions wrote the endpoints of presets.
    texts = (dump_config(config, presets) for presets in (known_presets(), NO_PRESETS))
    return not drop_ins(path) and read_text(path) in texts


def save_config(config: Config, path: str = CONFIG_PATH, presets: Sequence[str] = ()) -> None:
    """Writes the configuration: a reader sees the old content of a file or the new one. Raises GuardError.

    An existing file keeps its comments, its order, and the spelling of every lock that does not change. It also keeps
    its owner and mode, and a symbolic link still leads to it. A lock stays in the file where it stands, a drop-in or
    ``path``; a new lock is written to ``path``. Endpoints of ``presets``, those that somebody has named, and of the
    default ones are written by the name of the preset.
    """
    known = known_presets(presets)
    if not os.path.exists(path) or _is_generated(path):
        _write(dump_config(config, known), path)
        return
    source = read_source(path)
    edited = config_edit.edit(source, config, known)
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
