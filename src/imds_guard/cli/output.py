# SPDX-License-Identifier: Apache-2.0
"""What a command prints, and where."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, NoReturn

import click

if TYPE_CHECKING:
    from imds_guard.commands.guard import Outcome

_USUAL_COLUMNS = 80


def say(lines: Iterable[str]) -> None:
    """The answer, on standard output."""
    for line in lines:
        click.echo(line)


def warn(lines: Iterable[str]) -> None:
    """What to look at, on standard error."""
    for line in lines:
        _say_aside(f"warning: {line}")


def _say_aside(sentence: str) -> None:
    """On standard error: one line for who reads it by program, and for people lines that break between words."""
    if sys.stderr.isatty():
        import textwrap  # noqa: PLC0415 -- start-up time: a program that calls us takes the line as it is

        columns = os.get_terminal_size(sys.stderr.fileno()).columns or _USUAL_COLUMNS
        sentence = textwrap.fill(sentence, columns, break_long_words=False, break_on_hyphens=False)
    click.echo(sentence, err=True)


def say_json(values: object) -> None:
    """The answer as JSON, on standard output."""
    import json  # noqa: PLC0415 -- start-up time: few calls ask for it

    click.echo(json.dumps(values, indent=2, sort_keys=True))


def tell(line: str) -> None:
    """For someone who waits: only where a terminal shows it."""
    if sys.stderr.isatty():
        click.echo(line, err=True)


def show_outcome(outcome: Outcome, as_json: bool) -> None:
    """What a change came to, and its warnings."""
    from imds_guard.present import text as present  # noqa: PLC0415

    if as_json:
        say_json(present.outcome_values(outcome))
        return
    say(present.outcome_lines(outcome))
    warn(present.outcome_warnings(outcome))


def fail(error: BaseException, status: int) -> NoReturn:
    """Ends the command with one sentence."""
    _say_aside(f"imds-guard: {error}")
    sys.exit(status)
