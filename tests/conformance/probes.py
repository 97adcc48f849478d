# SPDX-License-Identifier: Apache-2.0
"""Probes for the kernel features that rows require: each does the smallest real thing, in a child of a sandbox."""

from __future__ import annotations

import errno
import socket
from typing import Callable

from imds_guard.errors import system_text
from imds_guard.kernel import syscalls
from tests.conformance import uring
from tests.conformance.attempts import IPPROTO_MPTCP, TCP_FASTOPEN_CONNECT


def _missing(feature: str, attempt: Callable[[], None], absent: tuple[int, ...]) -> str | None:
    """None when the attempt succeeds; a sentence when its errno is one of ``absent``. Raises any other OSError."""
    try:
        attempt()
    except OSError as error:
        if error.errno not in absent:
            raise
        return f"{feature} can't be used here: {system_text(error)}"
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
    "mptcp": lambda: _missing("MPTCP", _mptcp, (errno.EPROTONOSUPPORT, errno.ENOPROTOOPT, errno.EINVAL)),
    "fastopen": lambda: _missing("TCP Fast Open", _fastopen, (errno.ENOPROTOOPT, errno.EOPNOTSUPP)),
    # EPERM: kernel.io_uring_disabled, or a seccomp filter.
    "io_uring": lambda: _missing("io_uring", _io_uring, (errno.ENOSYS, errno.EPERM)),
    # ENOSPC: user.max_user_namespaces is 0.
    "userns": lambda: _missing("user namespaces", _user_namespace, (errno.EINVAL, errno.ENOSPC, errno.EPERM)),
}
