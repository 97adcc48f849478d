# SPDX-License-Identifier: Apache-2.0
"""Downloads packages of the archive by apt, which checks them. The state of the host's apt is not changed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from vagrant.matrix import cache
from vagrant.matrix.errors import MatrixError
from vagrant.matrix.process import run
from vagrant.matrix.table import Archive

LISTS_LAST_S = 7 * 24 * 3600
"""Package lists are renewed after this time. Debian replaces the ABI of a kernel about once in two weeks."""

WITHOUT_SECURITY = "-without-security"
"""At the end of the name of a suite: only the release, where the archive lacks security updates that its lists name."""

_CONFIG = """\
Dir::State "{state}";
Dir::State::status "{state}/status";
Dir::Cache "{state}/cache";
Dir::Etc::sourcelist "{state}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::Etc::preferences "/dev/null";
APT::Architecture "{architecture}";
APT::Architectures "{architecture}";
APT::Sandbox::User "";
Acquire::Languages "none";
Acquire::Retries "5";
Acquire::Check-Valid-Until "false";
"""


def sources(archive: Archive, suite: str, architecture: str) -> list[str]:
    """The sources.list lines for a suite: its release, the security updates of the release, and backports if named."""
    release = suite.split("-", maxsplit=1)[0]
    signed = f"deb [arch={architecture} signed-by={archive.keyring}]"
    lines = [f"{signed} {archive.mirror} {release} main", f"{signed} {archive.security} {release}-security main"]
    if suite.endswith(WITHOUT_SECURITY):
        return lines[:1]
    if suite.endswith("-backports"):
        lines.append(f"{signed} {archive.mirror} {suite} main")
    return lines


class Suite:
    """One suite of the archive for one architecture. Its package lists are at most a week old."""

    def __init__(self, archive: Archive, name: str, architecture: str) -> None:
        lines = sources(archive, name, architecture)
        self._architecture = architecture
        self._state = cache.root() / "apt" / f"{name}-{cache.digest({'sources': lines})}"
        self._env = {"APT_CONFIG": str(self._state / "apt.conf")}
        with cache.locked(f"apt-{self._state.name}"):
            self._prepare(lines)

    def _prepare(self, lines: list[str]) -> None:
        stamp = self._state / "updated"
        if stamp.exists() and time.time() - stamp.stat().st_mtime < LISTS_LAST_S:
            return
        for folder in ("lists/partial", "cache/archives/partial"):
            (self._state / folder).mkdir(parents=True, exist_ok=True)
        (self._state / "status").touch()
        (self._state / "sources.list").write_text("\n".join(lines) + "\n", encoding="ascii")
        config = _CONFIG.format(state=self._state, architecture=self._architecture)
        (self._state / "apt.conf").write_text(config, encoding="utf-8")
        run(["apt-get", "update", "--error-on=any"], env=self._env)
        stamp.touch()

    def names(self, prefix: str) -> list[str]:
        """The packages whose names begin with ``prefix``."""
        return run(["apt-cache", "pkgnames", prefix], env=self._env).split()

    def version(self, package: str) -> str:
        """The version that apt would download. Raises MatrixError when there is none."""
        for line in run(["apt-cache", "show", "--no-all-versions", package], env=self._env).splitlines():
            if line.startswith("Version: "):
                return line.split(": ", 1)[1]
        raise MatrixError(f"apt knows no version of {package}")

    def unpack(self, packages: Sequence[str], into: Path) -> None:
        """Downloads packages, checks them against the signed lists and unpacks them. Their scripts are not run."""
        debs = into / ".debs"
        debs.mkdir(parents=True)
        run(["apt-get", "download", *packages], env=self._env, cwd=debs)
        for deb in sorted(debs.iterdir()):
            run(["dpkg-deb", "-x", str(deb), str(into)])
            deb.unlink()
        debs.rmdir()
