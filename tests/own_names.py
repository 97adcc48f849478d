# SPDX-License-Identifier: Apache-2.0
"""A command that sees account files and a name service of its own, in a mount namespace, and locales of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.tools import need

FILES = ("passwd", "group", "nsswitch.conf")

_WITH_FILES = f"""\
for name in {" ".join(FILES)}; do [ ! -e "$0/$name" ] || mount --bind "$0/$name" "/etc/$name"; done
exec "$@"
"""

FILES_FIRST = "passwd: files\ngroup: files\n"
THROUGH_THE_C_LIBRARY = "passwd: files [SUCCESS=return]\ngroup: files [SUCCESS=return]\n"
"""Means the same. But imds-guard does not read the files itself."""


def within(folder: Path, argv: tuple[str, ...]) -> tuple[str, ...]:
    """``argv`` with those of FILES that are in ``folder`` in place of the machine's."""
    need("unshare", "mount")
    return ("unshare", "--mount", "sh", "-ec", _WITH_FILES, str(folder), *argv)


# --- a name service that hangs ----------------------------------------------------------------------------------------

_SOURCE = """
#define _GNU_SOURCE
#include <fcntl.h>
#include <grp.h>
#include <nss.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static enum nss_status asked(const char *key)
{
    const char *hangs = getenv("HANG_ON");
    if (hangs && strcmp(hangs, key))
        return NSS_STATUS_NOTFOUND;
    int fd = open(getenv("HANG_FIFO"), O_WRONLY | O_NONBLOCK);
    if (fd >= 0 && write(fd, "x", 1) == 1)
        close(fd);
    for (;;)
        pause();
}

static enum nss_status asked_for_id(unsigned id)
{
    char key[32];
    snprintf(key, sizeof key, "#%u", id);
    return asked(key);
}

enum nss_status _nss_hang_getpwnam_r(const char *n, struct passwd *p, char *b, size_t s, int *e) { return asked(n); }
enum nss_status _nss_hang_getgrnam_r(const char *n, struct group *g, char *b, size_t s, int *e) { return asked(n); }
enum nss_status _nss_hang_getpwuid_r(uid_t u, struct passwd *p, char *b, size_t s, int *e) { return asked_for_id(u); }
enum nss_status _nss_hang_getgrgid_r(gid_t g, struct group *p, char *b, size_t s, int *e) { return asked_for_id(g); }
"""


class HangingNames:
    """A name service that never answers some questions. ``folder`` is an empty folder for its files."""

    def __init__(self, folder: Path) -> None:
        need("cc")
        self.folder = folder
        self.fifo = folder / "asked"
        source = folder / "hang.c"
        source.write_text(_SOURCE, encoding="ascii")
        library = folder / "libnss_hang.so.2"
        subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", library, source], check=True)
        (folder / "nsswitch.conf").write_text("passwd: files hang\ngroup: files hang\n", encoding="ascii")
        os.mkfifo(self.fifo)

    def environment(self, hangs_on: str = "") -> dict[str, str]:
        """For a command of within(). It hangs on that name, or ID after ``#``, and does not know others; "": on all."""
        only = {"HANG_ON": hangs_on} if hangs_on else {}
        return {"LD_LIBRARY_PATH": str(self.folder), "HANG_FIFO": str(self.fifo), **only}


# --- locales ----------------------------------------------------------------------------------------------------------

LOCALES = {"de_DE.ISO-8859-1": ("de_DE", "ISO-8859-1"), "ja_JP.EUC-JP": ("ja_JP", "EUC-JP")}
"""Name -> definition and encoding."""


def make_locale(folder: Path, name: str) -> dict[str, str]:
    """The environment of a command in this locale, which is compiled to ``folder`` unless the C library has it."""
    if name in LOCALES:
        need("localedef")
        definition, charmap = LOCALES[name]
        subprocess.run(
            ["localedef", "-i", definition, "-f", charmap, "--no-warnings=ascii", folder / name],
            check=False,  # 1 is for warnings
            capture_output=True,
        )
        assert (folder / name / "LC_CTYPE").exists(), f"localedef made no {name}"
    return {"LC_ALL": name, "LOCPATH": str(folder)}
