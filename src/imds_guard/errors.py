# SPDX-License-Identifier: Apache-2.0
"""Kinds of failure, each with its exit status (sysexits.h where it has a name for it).

A message is one sentence: what was tried, on what, what the system said, what to do.
"""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


class GuardError(Exception):
    """Something failed; ``exit_status`` is what the process exits with."""

    exit_status = 1


class UsageError(GuardError):
    """The words of the command line do not make sense together (exit status 2)."""

    exit_status = 2


class Unsupported(GuardError):
    """This machine, or this backend, cannot hold the whole policy (EX_UNAVAILABLE)."""

    exit_status = 69


class NotPermitted(GuardError):
    """The caller lacks a privilege that the command needs (EX_NOPERM)."""

    exit_status = 77


class BadPolicy(GuardError):
    """A policy, a configuration file or a name in it is not usable (EX_CONFIG)."""

    exit_status = 78


def system_text(error: OSError) -> str:
    """``EPERM (Operation not permitted)``: the errno's symbol and text of ``error``."""
    if error.errno is None:
        return str(error)
    symbol = _errno.errorcode.get(error.errno, str(error.errno))
    return f"{symbol} ({os.strerror(error.errno)})"


@contextmanager
def trying(what: str, advice: str) -> Iterator[None]:
    """Turns an OSError of the block into one sentence: failure_text(), then ``advice``."""
    try:
        yield
    except PermissionError as error:
        raise NotPermitted(
            f"{failure_text(what, error)}; run this as root with CAP_SYS_ADMIN and "
            "CAP_NET_ADMIN, where no seccomp filter or security module forbids it"
        ) from error
    except OSError as error:
        raise GuardError(f"{failure_text(what, error)}; {advice}") from error


def failure_text(what: str, error: OSError) -> str:
    """``what``, the file or system call where the error has one that ``what`` does not name, and the system's words."""
    named = error.filename is None or str(error.filename) in what
    return f"{what}: {system_text(error)}" if named else f"{what}: {error.filename}: {system_text(error)}"
