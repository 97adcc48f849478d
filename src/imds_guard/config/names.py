# SPDX-License-Identifier: Apache-2.0
"""How the names of users and groups in a configuration become IDs.

PresentNames asks the name service (nsswitch.conf(5)). At boot that may not answer for minutes, so BootNames reads files
alone. ask() asks the name service in a child, with a deadline, for what the files don't have.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from imds_guard import identity
from imds_guard.errors import BadPolicy, GuardError
from imds_guard.kernel import accounts
from imds_guard.kernel.abandonable import Limits, Unanswered, Worker
from imds_guard.kernel.name_service import NoAnswer

USERS, GROUPS = "user", "group"

ANSWERS_WITHIN_S = 10.0
"""For all names together."""


class Name(NamedTuple):
    """The name of a user or of a group. ``kind`` is USERS or GROUPS."""

    kind: str
    name: str


Answers = Mapping[Name, "int | None"]
"""What the name service said: an ID, or None for a name that it does not know. A name without an answer is missing."""


class Names(ABC):
    """The interface, and what all have in common."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        """Sentences about names that are not as the file says."""
        self.changed: list[str] = []
        """Sentences, with file and line, about names that now have another ID than the stored one."""
        self.missing: list[Name] = []
        """Names whose entries are left out until the name service gives an ID, in the file's order."""
        self.unchecked: list[Name] = []
        """Names with a stored ID of which the name service has not said whether it is still theirs."""
        self.place_of_missing = ""
        """The file and the line of the first name in ``missing``."""

    @abstractmethod
    def number(self, key: str, kind: str, entry: str | int) -> int | None:
        """The ID of a name or a number in the list ``key``; None where the entry is left out. Raises BadPolicy."""

    @abstractmethod
    def stored(self, key: str, name: Name, stored: int) -> int:
        """The ID to use for a name that is stored with its ID. Raises BadPolicy."""


class PresentNames(Names):
    """The IDs that names have now. ``use_stored_ids``: a name that has another one now is a warning, not an error."""

    def __init__(self, use_stored_ids: bool = False) -> None:
        super().__init__()
        self._use_stored_ids = use_stored_ids

    def number(self, key: str, kind: str, entry: str | int) -> int:
        """Names.number(). An unknown name is an error."""
        if isinstance(entry, str):
            self.warnings += _notes_on_digits(key, kind, entry)
        return _id_of(kind, entry)

    def stored(self, key: str, name: Name, stored: int) -> int:
        """Names.stored(). A name that is not known now is a warning: the account may have been deleted."""
        try:
            current = _id_or_none(name)
        except NoAnswer:
            self.warnings.append(f"{key}: the name service gave no answer about {name.name!r}; the saved ID is used")
            return stored
        if current is None:
            self.warnings.append(_unknown(key, name, stored))
        elif current != stored and self._use_stored_ids:
            self.warnings.append(f"{_changed(key, name, stored, current)}; the saved ID is used")
        elif current != stored:
            raise BadPolicy(f"{_changed(key, name, stored, current)}: correct the name or the id")
        return stored


class BootNames(Names):
    """The IDs of the files passwd(5) and group(5), then those that the name service gave. Asks it nothing itself.

    An entry without an ID is left out: on an allow list it lets nobody in. Whoever makes the policy has to deny
    everybody where an entry of a deny list is in ``missing``. That a name is unknown does not mean that nobody has it:
    before the network is up, the C library says the same of every name of a directory.
    """

    def __init__(self, answers: Answers) -> None:
        super().__init__()
        self._answers = answers

    def number(self, key: str, kind: str, entry: str | int) -> int | None:
        """Names.number(). Digits are a number until the name service says that they are a name."""
        digits = identity.number_of(entry, kind)
        if isinstance(entry, int) and digits is not None:
            return digits
        name = Name(kind, str(entry))
        is_known = self._is_known(name)
        found = self._id(name) if is_known else None
        if found is not None:
            self.warnings += _notes_on_digits(key, kind, name.name) if digits is not None else []
            return found
        if digits is not None:
            self.unchecked += [] if is_known else [name]
            return digits
        if key.startswith("deny"):
            self.missing.append(name)
            said = "the name service gave no ID for {} yet" if not is_known else f"there is no {kind} {{}}"
            until = "until it does" if not is_known else "until there is one, or the entry is gone"
            self.warnings.append(f"{key}: {said.format(repr(name.name))}; {until}, the lock lets in root at most")
        elif is_known:
            self.warnings.append(f"{key}: there is no {kind} {name.name!r}, so this entry is left out")
        else:
            self.missing.append(name)
            self.warnings.append(
                f"{key}: the name service gave no ID for {name.name!r} yet; until it does, this entry lets nobody in"
            )
        return None

    def stored(self, key: str, name: Name, stored: int) -> int:
        """Names.stored(): the stored ID, whatever the name has now.

        Another ID in a file is no definite answer: nsswitch.conf(5) may put a directory before the files.
        """
        current = self._id(name)
        if current != stored and name not in self._answers and accounts.other_root() is None:
            self.unchecked.append(name)
            return stored
        if current is None:
            self.warnings.append(_unknown(key, name, stored))
        elif current != stored:
            self.changed.append(_changed(key, name, stored, current))
        return stored

    def _is_known(self, name: Name) -> bool:
        """True when it is known which ID the name has, or that it has none."""
        return name in self._answers or _in_files(name) is not None or accounts.other_root() is not None

    def _id(self, name: Name) -> int | None:
        answer = self._answers.get(name)
        return _in_files(name) if answer is None else answer


def _notes_on_digits(key: str, kind: str, entry: str) -> list[str]:
    return [f"{key}: {note}" for note in identity.notes_on_digits(**{f"{kind}s": [entry]})]


def _changed(key: str, name: Name, stored: int, current: int) -> str:
    return f"{key}: {name.name!r} was {stored} when it was saved and is {current} now"


def _unknown(key: str, name: Name, stored: int) -> str:
    return f"{key}: {name.name!r} was {stored} when it was saved and is not known now; the saved ID is used"


def _id_of(kind: str, entry: str | int) -> int:
    return identity.user_id(entry) if kind == USERS else identity.group_id(entry)


def _id_or_none(name: Name) -> int | None:
    """The ID of the account or group of that name. Raises NoAnswer."""
    return identity.id_of_name(name.name, name.kind)


def _in_files(name: Name) -> int | None:
    """The ID in the file, if it can be read. The first entry of a name counts, as in the C library."""
    try:
        if name.kind == USERS:
            user = accounts.user_in_files(name.name)
            return None if user is None else user.uid
        group = accounts.group_in_files(name.name)
        return None if group is None else group.gid
    except GuardError:
        return None


def ask(names: Iterable[Name], within_s: float = ANSWERS_WITHIN_S) -> dict[Name, int | None]:
    """What the name service says, in ``within_s`` for all names. A name that it gives no answer for is left out.

    It is asked in a child that is left to itself when it does not answer: a look-up may hang, and has no deadline.
    """
    wanted = list(dict.fromkeys(names))
    answers: dict[Name, int | None] = {}
    try:
        with Worker(_id_or_none) as worker:
            limits = Limits(share_s=within_s, total_s=within_s, hung=1)
            for name, answer in worker.ask_each(wanted, limits):
                if not isinstance(answer, Unanswered):
                    answers[name] = answer
    except (GuardError, OSError):  # the look-up failed: there is no answer for the rest
        pass
    return answers
