# SPDX-License-Identifier: Apache-2.0
"""Saves the configuration, each file in one step, and keeps its comments."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress

from imds_guard import CONFIG_PATH
from imds_guard.config import edit as config_edit
from imds_guard.config.names import PresentNames
from imds_guard.config.read import Config, config_of, load_config
from imds_guard.config.source import DROP_INS, Source, drop_ins, parse_source, read_source, with_drop_ins
from imds_guard.config.spelling import NO_PRESETS, known_presets
from imds_guard.config.write import dump_config
from imds_guard.errors import GuardError, system_text
from imds_guard.kernel import files

_NEW = '# Written by imds-guard --save.\n\nmode = "enforce"\n'
"""The file that is changed where there are only drop-ins."""


def check_saving_to(path: str) -> None:
    """Raises BadPolicy or Unsupported when save_config() could not keep the comments of the file ``path``."""
    source = _source(path)
    if source is not None and not _is_generated(source):
        config_edit.require_tomlkit(path)


def _source(path: str) -> Source | None:
    """The usable configuration that is there; None without any file. Raises BadPolicy."""
    if not os.path.exists(path) and not drop_ins(path):
        return None
    source = read_source(path) if os.path.exists(path) else with_drop_ins(parse_source(_NEW, path))
    config_of(source, PresentNames(use_stored_ids=True))
    return source


def _is_generated(source: Source) -> bool:
    """True for a file that is exactly as dump_config() writes it, so that overwriting it loses nothing."""
    if source.drop_ins:
        return False
    config = load_config(source.name, use_stored_ids=True)
    # Earlier versions wrote the endpoints of presets.
    return source.text in (dump_config(config, presets) for presets in (known_presets(), NO_PRESETS))


def save_config(config: Config, path: str = CONFIG_PATH, presets: Sequence[str] = ()) -> list[str]:
    """Writes the configuration, and returns the files that it changed. Raises GuardError; then all are as they were.

    A reader sees the old content of a file or the new one. An existing file keeps its comments, its order, and the
    spelling of every lock that does not change. It also keeps its owner and mode, and a symbolic link still leads to
    it. A lock stays in the file where it stands, a drop-in or ``path``; a new lock is written to ``path``. Endpoints of
    ``presets``, those that somebody has named, and of the default ones are written by the name of the preset.
    """
    known = known_presets(presets)
    source = _source(path)
    if source is None or _is_generated(source):
        _write(dump_config(config, known), path)
        return [path]
    edited = config_edit.edit(source, config, known)
    texts = {part.name: edited[part.name] for part in source.parts if edited[part.name] != part.text}
    if not os.path.exists(path):
        texts = {path: edited[path], **texts}
    _write_all(texts)
    return list(texts)


def _write_all(texts: Mapping[str, str]) -> None:
    """Writes all files, or none. The file itself comes first.

    An endpoint moves from a drop-in to it when allow --ip splits a lock. A boot in between finds it in both, and puts
    the emergency lock on. In the other order it would find the endpoint nowhere, and not lock it.
    """
    written: dict[str, bytes | None] = {}
    try:
        for path, text in texts.items():
            before = _content(path)
            _write(text, path)
            written[path] = before
    except GuardError:
        for path, before in written.items():
            with suppress(OSError):  # the first error is the one to report
                _put_back(path, before)
        raise


def _content(path: str) -> bytes | None:
    try:
        return files.read_regular(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise GuardError(f"the configuration {path} could not be read: {system_text(error)}") from error


def _put_back(path: str, content: bytes | None) -> None:
    file = os.path.realpath(path)
    if content is None:
        os.unlink(file)
    else:
        files.replace(file, content, like=os.stat(file))


def _write(text: str, path: str) -> None:
    try:
        file = os.path.realpath(path)
        os.makedirs(os.path.dirname(file), mode=0o755, exist_ok=True)
        files.replace(file, text.encode(), like=os.stat(file) if os.path.exists(file) else None)
    except OSError as error:
        raise GuardError(f"the configuration {path} could not be written: {system_text(error)}") from error


def make_folder(path: str = CONFIG_PATH) -> str | None:
    """Makes the folder of the drop-ins of ``path``, and returns it; None where there is nothing to make."""
    folder = DROP_INS.get(path)
    if folder is None or os.path.lexists(folder):
        return None
    try:
        os.makedirs(folder, exist_ok=True)
        os.chmod(folder, 0o755)  # noqa: S103 -- whatever the umask is; all may read it
    except OSError as error:
        raise GuardError(f"the folder {folder} could not be made: {system_text(error)}") from error
    return folder
