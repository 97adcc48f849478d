# SPDX-License-Identifier: Apache-2.0
"""The texts of a configuration: a file, and for the machine's own file the drop-ins in config.d beside it."""

from __future__ import annotations

import codecs
import os
from typing import Any, NamedTuple

from imds_guard import CONFIG_PATH
from imds_guard.config.toml_lines import load_toml
from imds_guard.errors import BadPolicy, system_text
from imds_guard.kernel import files

DROP_INS = {CONFIG_PATH: os.path.join(os.path.dirname(CONFIG_PATH), "config.d")}
"""The file that has drop-ins, and their folder. Any other file stands alone, like one that is to be tried."""
SUFFIX = ".toml"


class Source(NamedTuple):
    """A text that is TOML, and may still be no usable configuration. ``name`` is the file's in errors."""

    name: str
    text: str
    values: dict[str, Any]
    drop_ins: tuple[Source, ...] = ()

    @property
    def parts(self) -> tuple[Source, ...]:
        """The file itself, then its drop-ins."""
        return (self, *self.drop_ins)

    def string(self, key: str) -> str | None:
        """The string value of a key outside all tables; None when it has none."""
        value = self.values.get(key)
        return value if isinstance(value, str) else None


def read_source(path: str) -> Source:
    """The file ``path`` and its drop-ins. Raises BadPolicy."""
    return with_drop_ins(read_file(path))


def with_drop_ins(file: Source) -> Source:
    """``file`` with the drop-ins that are read now. Raises BadPolicy."""
    return file._replace(drop_ins=tuple(read_file(one) for one in drop_ins(file.name)))


def read_file(path: str) -> Source:
    """One file. Raises BadPolicy."""
    return parse_source(read_text(path), path)


def drop_ins(path: str) -> list[str]:
    """The drop-ins of the configuration ``path``, in the order in which they count. Raises BadPolicy.

    Every ``*.toml`` is one; names that begin with a dot are those of editors and of package managers.
    """
    folder = DROP_INS.get(path)
    if folder is None:
        return []
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(SUFFIX) and not name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BadPolicy(f"the folder {folder} of the configuration could not be read: {system_text(error)}") from error
    return [os.path.join(folder, name) for name in names]


def read_text(path: str) -> str:
    """The text of a configuration file, its line ends unchanged, without a byte order mark. Raises BadPolicy."""
    try:
        content = files.read_regular(path)
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise BadPolicy(f"{path}: this is not TOML: it is UTF-16; save it as UTF-8")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise BadPolicy(f"the configuration {path} could not be read: {system_text(error)}") from error
    except UnicodeDecodeError as error:
        raise BadPolicy(f"{path}: this is not TOML: byte {error.start} is not UTF-8") from error


def parse_source(text: str, name: str) -> Source:
    """Raises BadPolicy, with the line, where the text is no TOML."""
    try:
        return Source(name, text, load_toml(text, name))
    except MemoryError:
        raise BadPolicy(f"{name}: it takes more memory than there is") from None
