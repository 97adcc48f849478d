# SPDX-License-Identifier: Apache-2.0
"""What compiling made, and what BTF says, kept for the next command: a start needs neither the compiler nor BTF then.

The name of a file is a digest of everything that went in. So a file is never out of date: another source, kernel,
compiler or version looks for another file.
"""

from __future__ import annotations

import binascii
import importlib.util
import json
import os
import sysconfig
from collections.abc import Mapping
from typing import Callable

from imds_guard import __version__
from imds_guard.kernel.cache_folder import CacheFolder, key

FOLDER = CacheFolder("/var/cache/imds-guard")
"""hier(7). A unit of systemd gets it by CacheDirectory=."""

Instructions = Mapping[str, bytes]

_LIBRARY = "libbcc.so.0"
_FORMAT = 1


def instructions(ingredients: object, compile_them: Callable[[], Instructions]) -> Instructions:
    """Function -> instructions: as they were compiled of the same ingredients before, or compiled now."""
    compiler = _compiler()
    if compiler is None:
        return compile_them()
    kernel = os.uname()
    name = key(_FORMAT, __version__, compiler, kernel.release, kernel.version, kernel.machine, ingredients)
    text = FOLDER.read(name)
    if text is not None:
        return decoded(text)
    made = compile_them()
    FOLDER.write(name, encoded(made))
    return made


def encoded(made: Instructions) -> bytes:
    """As they are in a file."""
    return json.dumps({name: binascii.b2a_base64(code, newline=False).decode() for name, code in made.items()}).encode()


def decoded(text: bytes) -> Instructions:
    """The other way round."""
    return {str(name): binascii.a2b_base64(code) for name, code in json.loads(text).items()}


def offsets(ingredients: object, read_them: Callable[[], Mapping[str, int]]) -> Mapping[str, int]:
    """Name -> offset, for ingredients that name the BTF."""
    name = key(_FORMAT, __version__, "offsets", ingredients)
    text = FOLDER.read(name)
    if text is not None:
        return {str(macro): int(offset) for macro, offset in json.loads(text).items()}
    found = read_them()
    FOLDER.write(name, json.dumps(dict(found)).encode())
    return found


def _compiler() -> object | None:
    """What tells one compiler from another, without loading it; None where that can't be told."""
    if "LD_LIBRARY_PATH" in os.environ or "LD_PRELOAD" in os.environ:
        return None
    module = importlib.util.find_spec("bcc")
    if module is None or module.origin is None:
        return None
    places = [sysconfig.get_config_var("LIBDIR"), f"/usr/lib/{sysconfig.get_config_var('MULTIARCH')}", *_FOLDERS]
    found = [_identity(os.path.join(str(place), _LIBRARY)) for place in dict.fromkeys(places)]
    libraries = [one for one in found if one is not None]
    version = _identity(os.path.join(os.path.dirname(module.origin), "version.py"))
    if not libraries or version is None:
        return None
    return (_identity(module.origin), version, libraries)


_FOLDERS = ("/usr/local/lib", "/usr/local/lib64", "/usr/lib64", "/usr/lib", "/lib64", "/lib")
"""Where ld.so(8) finds libraries on the distributions that have bcc."""


def _identity(path: str) -> tuple[str, int, int, int] | None:
    """A file that was installed anew differs in one of these."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return os.path.realpath(path), found.st_size, found.st_mtime_ns, found.st_ino
