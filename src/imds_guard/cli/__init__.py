# SPDX-License-Identifier: Apache-2.0
"""The command line: options to commands, errors to one sentence and an exit status. Only this folder imports click."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from imds_guard.cli import streams
from imds_guard.cli.group import cli
from imds_guard.cli.output import answer_in_json, called_as, fail
from imds_guard.errors import GuardError, system_text

__all__ = ["cli", "ip_lockdown", "main"]


class _Terminated(BaseException):
    """Raised on SIGTERM, so that what has begun is undone as after SIGINT. Python would end on the spot."""


def _on_sigterm(_number: int, _frame: object) -> NoReturn:
    raise _Terminated


def _run(command: click.Command, arguments: Sequence[str] | None, name: str) -> NoReturn:
    """Runs a command. An answer that is lost changes the exit status of a command that has succeeded, and no other."""
    try:
        _call(command, arguments, name)
    except SystemExit as ended:
        streams.flush()
        lost = streams.answer_lost()
        if ended.code in (0, None) and lost is not None:
            fail(lost, lost.exit_status)
        raise


def _call(command: click.Command, arguments: Sequence[str] | None, name: str) -> NoReturn:
    """Turns every way that a command can end into an exit status."""
    os.umask(0o022)  # the caller's may hide our files from root without CAP_DAC_OVERRIDE, or open them to others
    signal.signal(signal.SIGTERM, _on_sigterm)
    answer_in_json(sys.argv[1:] if arguments is None else list(arguments))
    try:
        streams.install()
        command.main(args=None if arguments is None else list(arguments), prog_name=name, standalone_mode=False)
        sys.exit(0)
    except GuardError as error:
        fail(error, error.exit_status)
    except click.ClickException as error:
        fail(GuardError(_click_sentence(error, name)), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        fail(GuardError(_interrupted("by SIGINT")), 130)
    except _Terminated:
        fail(GuardError(_interrupted("by SIGTERM")), 143)
    except OSError as error:
        fail(GuardError(f"the system refused something that no message covers: {system_text(error)}; {_please()}"), 1)
    except Exception as error:
        if os.environ.get("IMDS_GUARD_TRACEBACK"):
            raise
        fail(GuardError(f"a fault in imds-guard itself ({type(error).__name__}: {error}); {_please()}"), 1)


def _click_sentence(error: click.ClickException, name: str) -> str:
    """click's message, which may have several lines, as one sentence that ends with where to read on."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    words = " ".join(error.format_message().split()).rstrip(".")
    return f"{words} (see {context.command_path if context else name} --help)"


def _interrupted(how: str) -> str:
    return f"interrupted {how}: the policy before or the new one is in force, whole; imds-guard status tells which"


def _please() -> str:
    return "please report it with what IMDS_GUARD_TRACEBACK=1 prints"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The ``imds-guard`` command."""
    _run(cli, arguments, called_as())


def ip_lockdown(arguments: Sequence[str] | None = None) -> NoReturn:
    """The ``ip-lockdown`` command, which takes the place of the script of that name."""
    from imds_guard.cli.lockdown import ip_lockdown as command  # noqa: PLC0415 -- start-up time

    _run(command, arguments, "ip-lockdown")
