# SPDX-License-Identifier: Apache-2.0
"""Printing: answers to standard output; warnings, progress and errors to standard error."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from imds_guard.cli import streams
from imds_guard.cli.group import MODULES
from imds_guard.errors import AnswerLost, GuardError

if TYPE_CHECKING:
    from imds_guard.commands.outcome import Outcome

_DEFAULT_COLUMNS = 80

_ERROR, _WARNING = "<3>", "<4>"
"""What systemd takes for the priority of a line in the journal (sd-daemon(3))."""

_NEEDS_THE_PACKAGE = frozenset({"install-service", "uninstall-service"})
_COMMAND = re.compile(rf"\bimds-guard (?=(?:{'|'.join(sorted(MODULES.keys() - _NEEDS_THE_PACKAGE))})\b)")
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./+~-]+", re.ASCII)


def called_as() -> str:
    """What the user types to call imds-guard: ``./run`` in a clone, where there is no program of that name."""
    name = os.environ.get("IMDS_GUARD_CALLED_AS", "")  # run sets it
    return name if _PLAIN_PATH.fullmatch(name) else "imds-guard"


def _to_paste(text: str) -> str:
    """The commands in a text as the user can call them."""
    name = called_as()
    return text if name == "imds-guard" else _COMMAND.sub(f"{name} ", text)


def print_lines(lines: Iterable[str]) -> None:
    """Prints the answer to standard output."""
    from imds_guard.text import escaped  # noqa: PLC0415 -- start-up time

    # What has no escape of its own yet, such as a path, must not move the cursor or change colours.
    text = _to_paste("".join(f"{escaped(part)}\n" for line in lines for part in line.split("\n")))
    if sys.stdout.isatty():
        from imds_guard.cli import colour  # noqa: PLC0415 -- start-up time

        text = colour.painted(text, sys.stdout)
    print_text(text)


def print_text(text: str) -> None:
    """As print_lines(), for text that has its line ends."""
    streams.put(text)


def print_done(lines: Iterable[str]) -> None:
    """Prints what a command has changed."""
    streams.require_reader()
    print_lines(lines)


def print_json(values: Mapping[str, object], indent: int | None = 2) -> None:
    """Prints the answer as JSON to standard output."""
    import json  # noqa: PLC0415 -- start-up time: few calls ask for it

    from imds_guard.text import JSON_SCHEMA  # noqa: PLC0415

    print_text(json.dumps({"schema": JSON_SCHEMA, **values}, indent=indent, sort_keys=True) + "\n")


def print_warnings(sentences: Iterable[str]) -> None:
    """Prints each sentence to standard error, after ``warning:``."""
    for sentence in sentences:
        _print_error(f"warning: {sentence}", _WARNING)


def _print_error(sentence: str, priority: str) -> None:
    """Prints to standard error: wrapped between words on a terminal, else one line for programs to read."""
    from imds_guard.text import escaped  # noqa: PLC0415 -- start-up time

    sentence = escaped(_to_paste(sentence))
    if sys.stderr is not None and streams.is_journal(sys.stderr):
        sentence = priority + sentence
    if sys.stderr is not None and sys.stderr.isatty():
        import textwrap  # noqa: PLC0415 -- start-up time: only a terminal needs it

        indent = "    " if sentence.startswith(" ") else ""
        sentence = textwrap.fill(
            sentence, _columns(), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
    _put_error(sentence)


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or _DEFAULT_COLUMNS
    except OSError:  # a terminal that was hung up
        return _DEFAULT_COLUMNS


def _put_error(line: str) -> None:
    if sys.stderr is None:  # closed, and a signal came before it was replaced
        return
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def print_question(text: str) -> None:
    """Prints a question to standard error, where somebody waits for it."""
    sys.stderr.write(text)
    sys.stderr.flush()


def print_progress(line: str) -> None:
    """Prints to standard error where that is a terminal: somebody waits there."""
    if sys.stderr.isatty():
        _put_error(line)


def print_outcome(outcome: Outcome, as_json: bool, error: GuardError | None = None) -> None:
    """Prints the result of a change, and its warnings. With an error as JSON, it ends the command: see fail()."""
    from imds_guard.present.outcome import (  # noqa: PLC0415
        outcome_lines,
        outcome_sentence,
        outcome_values,
        outcome_warnings,
    )

    streams.require_reader()
    if as_json:
        if error is not None:
            fail(error, error.exit_status, outcome_values(outcome))
        print_json(outcome_values(outcome))
        return
    print_lines([outcome_sentence(outcome)] if streams.is_journal(sys.stdout) else outcome_lines(outcome))
    print_warnings(outcome_warnings(outcome))


_asks_for_json = False


def answer_in_json(arguments: Sequence[str]) -> None:
    """Tells fail() whether a command line asks for JSON: that is known also where the rest of it is wrong."""
    global _asks_for_json  # noqa: PLW0603 -- an error may come before, in and after the command
    _asks_for_json = "--json" in arguments[: arguments.index("--") if "--" in arguments else None]


def fail(error: BaseException, status: int, answer: Mapping[str, object] | None = None) -> NoReturn:
    """Ends the command with one sentence on standard error. On a terminal its parts are lines of their own.

    Where JSON was asked for, it is an object in one line on standard output, as the answer would be. If there is an
    ``answer`` all the same, the error is a key of it, because a program reads one object.
    """
    if _asks_for_json and not isinstance(error, AnswerLost):
        body = {"error": {"status": status, "message": str(error)}}
        print_json({**(answer or {}), **body}, indent=None if answer is None else 2)
        sys.exit(status)
    listed = error.lines if isinstance(error, GuardError) and sys.stderr is not None and sys.stderr.isatty() else ()
    for line in (f"imds-guard: {listed[0]}", *listed[1:]) if listed else (f"imds-guard: {error}",):
        _print_error(line, _ERROR)
    sys.exit(status)
