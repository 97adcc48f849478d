# SPDX-License-Identifier: Apache-2.0
"""What a row needs of the kernel, asked by the smallest real thing. Runs in the sandbox's child."""

from __future__ import annotations

import errno
import socket
from typing import Callable

from imds_guard.errors import system_words
from imds_guard.kernel import syscalls
from tests.conformance import uring
from tests.conformance.attempts import IPPROTO_MPTCP, TCP_FASTOPEN_CONNECT


def _tried(what: str, trial: Callable[[], None], absent: tuple[int, ...]) -> str | None:
    """None when the trial went well, a sentence when its errno says that the kernel lacks it; else it raises."""
    try:
        trial()
    except OSError as error:
        if error.errno not in absent:
            raise
        return f"this kernel has no {what} for us: {system_words(error)}"
    return None


def _mptcp() -> None:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP).close()


def _fastopen() -> None:
    with socket.socket() as one:
        one.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)


def _io_uring() -> None:
    for sqpoll in (False, True):
        uring.Ring(sqpoll=sqpoll).close()


def _user_namespace() -> None:
    syscalls.unshare(syscalls.CLONE_NEWUSER)


PROBES: dict[str, Callable[[], str | None]] = {
    # ENOPROTOOPT: net.mptcp.enabled is 0. EPROTONOSUPPORT: not built in.
    "mptcp": lambda: _tried("MPTCP", _mptcp, (errno.EPROTONOSUPPORT, errno.ENOPROTOOPT, errno.EINVAL)),
    "fastopen": lambda: _tried("TCP Fast Open", _fastopen, (errno.ENOPROTOOPT, errno.EOPNOTSUPP)),
    # EPERM: kernel.io_uring_disabled, or a seccomp filter.
    "io_uring": lambda: _tried("io_uring", _io_uring, (errno.ENOSYS, errno.EPERM)),
    # ENOSPC: user.max_user_namespaces is 0.
    "userns": lambda: _tried("user namespaces", _user_namespace, (errno.EINVAL, errno.ENOSPC, errno.EPERM)),
}
