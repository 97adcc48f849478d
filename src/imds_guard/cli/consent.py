# SPDX-License-Identifier: Apache-2.0
"""Says what a change opens or takes away before it is made, and asks somebody who sits at a terminal."""

from __future__ import annotations

import os
import select
import sys
from typing import TYPE_CHECKING, Callable

from imds_guard.cli.output import print_question, print_warnings
from imds_guard.errors import GuardError
from imds_guard.policy.difference_text import difference_lines
from imds_guard.present.difference import names_of_both

if TYPE_CHECKING:
    from imds_guard.commands.outcome import Outcome
    from imds_guard.policy.difference import Difference

ANSWER_WITHIN_S = 60.0
_NOT_COMPARED = "what is in force can't be read, so nobody can tell what this changes: it may lock less than now"
_YES = ("y", "yes")
_STDIN = 0


class Consent:
    """Is called with what changes while nothing has changed yet (GuardOptions.agree)."""

    def __init__(self, *, may_ask: bool, name_taken: bool = True) -> None:
        """``name_taken``: also name rights that somebody loses; not where the command says just that."""
        self._may_ask = may_ask
        self._name_taken = name_taken
        self._has_seen = False
        self._seen: Difference | None = None
        self._previewed = False
        """Somebody at a terminal was asked, or would have been, had there been something to ask."""

    def __call__(self, found: Difference | None) -> None:
        """Warns. None: what is in force can't be read.

        Raises GuardError where another change is about to open something than the one that was asked for.
        """
        if (self._has_seen and found == self._seen) or (found is not None and found.emergency_ends):
            return
        if self._previewed and (found is None or found.opening):
            raise GuardError(
                "another command changed the policy while this one began: nothing was changed, run the command again"
            )
        self._has_seen, self._seen = True, found
        print_warnings(self._sentences(found))

    def _sentences(self, found: Difference | None) -> list[str]:
        if found is None:  # who is not asked is told with the result
            return [_NOT_COMPARED] if self._may_ask else []
        parts = [("this locks less than now", found.opening)]
        parts += [("this takes rights away", found.taking)] if self._name_taken else []
        return [f"{title}: {'; '.join(difference_lines(part, names_of_both()))}" for title, part in parts if part]

    def ask(self, preview: Callable[[], Outcome]) -> None:
        """Asks before a change that opens something, or that may: where nobody can tell what is in force.

        ``preview`` is the change as a dry run, with this as ``agree``.
        Raises GuardError unless the answer is yes. Nobody is asked where that is not a person at a terminal.
        """
        if not self._may_ask or not (os.isatty(_STDIN) and sys.stderr is not None and sys.stderr.isatty()):
            return
        found = preview().difference
        self._previewed = True
        if found is not None and (found.emergency_ends or not found.opening):
            return
        print_question(f"Go on? No answer within {ANSWER_WITHIN_S:.0f} s is no. [y/N] ")
        if _answer() not in _YES:
            raise GuardError("nothing was changed, since nobody said yes (--yes does not ask)")


def _answer() -> str:
    """A line from the terminal; empty when none comes in time."""
    if not select.select([_STDIN], [], [], ANSWER_WITHIN_S)[0]:
        print_question("\n")
        return ""
    return os.read(_STDIN, 4096).decode(errors="replace").strip().lower()
