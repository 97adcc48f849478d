# SPDX-License-Identifier: Apache-2.0
"""Kinds of failure, each with its exit status (from sysexits.h where that has a name for it).

A message is one sentence: what was tried, on what, what the system said, what to do.
"""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class GuardError(Exception):
    """Something failed. The process exits with ``exit_status``.

    ``parts`` are the clauses of a sentence that is easier to read as a list.
    """

    exit_status = 1

    def __init__(self, sentence: str = "", parts: Sequence[str] = ()) -> None:
        super().__init__(sentence if not parts else f"{sentence} ({'; '.join(parts)})")
        self.lines = (str(self),) if not parts else (f"{sentence}:", *(f"  {part}" for part in parts))


class NothingLocked(GuardError):
    """A command needs a policy in force, and there is none."""


class UsageError(GuardError):
    """The arguments contradict each other, or one is missing (exit status 2)."""

    exit_status = 2


class Unsupported(GuardError):
    """This machine or this backend can't enforce the whole policy (EX_UNAVAILABLE)."""

    exit_status = 69


class AnswerLost(GuardError):
    """The command did its work, and its answer could not be written to standard output (EX_IOERR)."""

    exit_status = 74


class NotPermitted(GuardError):
    """The caller lacks a privilege that the command needs (EX_NOPERM)."""

    exit_status = 77


class BadPolicy(GuardError):
    """A policy, a configuration file or a name in it can't be used (EX_CONFIG)."""

    exit_status = 78


def system_text(error: OSError) -> str:
    """``EPERM (Operation not permitted)``: symbol of the errno of ``error``, and its text."""
    if error.errno is None:
        return str(error)
    symbol = _errno.errorcode.get(error.errno, str(error.errno))
    return f"{symbol} ({error.strerror or os.strerror(error.errno)})"


@contextmanager
def trying(action: str, advice: str) -> Iterator[None]:
    """Turn an OSError of the block into a GuardError: failure_text(), then ``advice``."""
    try:
        yield
    except PermissionError as error:
        raise NotPermitted(
            f"{failure_text(action, error)}; run this as root with CAP_SYS_ADMIN and "
            "CAP_NET_ADMIN, where no seccomp filter or security module forbids it"
        ) from error
    except OSError as error:
        raise GuardError(f"{failure_text(action, error)}; {advice}") from error


def failure_text(action: str, error: OSError) -> str:
    """``action``, the error's file name unless ``action`` contains it, and the system's text."""
    named = error.filename is None or str(error.filename) in action
    return f"{action}: {system_text(error)}" if named else f"{action}: {error.filename}: {system_text(error)}"
