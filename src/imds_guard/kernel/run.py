# SPDX-License-Identifier: Apache-2.0
"""The only module that starts other programs: never through a shell, and stderr is never discarded."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from imds_guard.errors import GuardError, Unsupported, system_text

if TYPE_CHECKING:
    import subprocess

SAFE_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
"""Folders of programs. The caller's PATH is ignored, since we run as root."""

_KEPT_ENVIRONMENT = ("SOURCE_DATE_EPOCH", "TERM")

_PACKAGES: dict[str, str] = {
    "iptables": "iptables",
    "ip6tables": "iptables",
    "ip": "iproute2 (iproute on Fedora and RHEL)",
    "nft": "nftables",
    "systemctl": "systemd",
    "systemd-analyze": "systemd",
    "systemd-run": "systemd",
    "journalctl": "systemd",
    "groupadd": "passwd (shadow-utils on Fedora and RHEL)",
    "groupdel": "passwd (shadow-utils on Fedora and RHEL)",
    "clang": "clang",
    "mount": "mount (util-linux on Fedora and RHEL)",
    "umount": "mount (util-linux on Fedora and RHEL)",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "modprobe": "kmod",
}


class Completed(NamedTuple):
    """Status and output of a program that has ended. The status is negative after a signal (-9 for SIGKILL)."""

    status: int
    stdout: str
    stderr: str

    @property
    def complaint(self) -> str:
        """The reason of a failure as part of a sentence: the lines of stderr, the signal, or the status."""
        output = self.stderr if self.stderr or self.status < 0 else self.stdout  # a killed program complains on stderr
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        if self.status < 0 or not lines:
            lines.append(_status_text(self.status))
        return "; ".join(lines)


def find_program(name: str) -> str | None:
    """The absolute path of a program in SAFE_PATH, or None. A name with a folder is only checked."""
    # shutil.which() does the same, but shutil imports three compression libraries.
    paths = [name] if os.path.dirname(name) else [os.path.join(folder, name) for folder in SAFE_PATH.split(":")]
    return next((path for path in paths if os.access(path, os.X_OK) and not os.path.isdir(path)), None)


def run(argv: Sequence[str], stdin: str = "", *, timeout_s: float = 60) -> Completed:
    """Runs a program to its end, with locale C and an environment of little more than PATH.

    The caller judges the status. Raises Unsupported when the program is absent, GuardError when it can't be started or
    does not end within ``timeout_s`` (it is then killed).
    """
    import subprocess  # noqa: PLC0415 -- start-up time: few commands run another program

    path = find_program(argv[0])
    if path is None:
        raise Unsupported(f"{argv[0]} is not in {SAFE_PATH}: install {_package_text(argv[0])}")
    try:
        process = subprocess.Popen(
            [path, *argv[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
            encoding="utf-8",
            errors="surrogateescape",
        )
    except OSError as error:
        raise GuardError(
            f"{path} could not be started: {system_text(error)}; it changed nothing, run the command again"
        ) from error
    return _finish(process, argv, stdin, timeout_s)


def _finish(process: subprocess.Popen[str], argv: Sequence[str], stdin: str, timeout_s: float) -> Completed:
    import subprocess  # noqa: PLC0415

    with process:
        try:
            stdout, stderr = process.communicate(stdin, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            _, stderr = process.communicate()
            said = f" (it printed: {stderr.strip()})" if stderr.strip() else ""
            raise GuardError(f"{' '.join(argv)} did not end within {timeout_s:g} s and was killed{said}") from None
        except BaseException:
            process.kill()
            raise
    return Completed(process.returncode, stdout, stderr)


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    return {**kept, "PATH": SAFE_PATH, "LC_ALL": "C"}


def _package_text(program: str) -> str:
    base = os.path.basename(program)
    for prefix, package in _PACKAGES.items():
        if base == prefix or base.startswith(prefix + "-"):
            return f"the package {package}"
    return f"the package that has {base}"


def _status_text(status: int) -> str:
    if status >= 0:
        return f"it exited with status {status} and printed nothing"
    try:
        return f"it was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"it was ended by signal {-status}"
