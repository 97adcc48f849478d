# SPDX-License-Identifier: Apache-2.0
"""Asks the name service (nsswitch.conf(5)), which may hang: a directory that does not answer, a broken module.

A look-up of the C library has no deadline, and no signal ends it. So a child makes it, which is left behind when it
hangs, while this process waits for a bounded time and takes signals. What the service would find in a file of this
machine before it asks anybody is read here: that needs no child.
"""

from __future__ import annotations

import atexit
import functools
import grp
import os
import pwd
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, TypeVar, Union

from imds_guard.errors import GuardError
from imds_guard.kernel import children, files

if TYPE_CHECKING:
    from imds_guard.kernel.abandonable import Worker

Q = TypeVar("Q")
A = TypeVar("A")

ID_WITHIN_S = 10.0
"""For the ID of a name. A directory that is asked for the first time may need seconds."""
NAME_WITHIN_S = 0.5
"""For the name of an ID, which is there to be shown. The log of denials takes no signal while it waits."""
LIST_WITHIN_S = 60.0
"""For the list of all accounts."""
SILENT_FOR_S = 60.0
"""So long it is asked nothing after a question that it did not answer."""

_SWITCH = "/etc/nsswitch.conf"
_MAX_ID = 0xFFFFFFFE

Key = Union[str, int]
"""A name, or an ID."""


class NoAnswer(GuardError):
    """The name service did not answer in time, or did not answer a question shortly before."""


class User(NamedTuple):
    """An account, and its primary group."""

    name: str
    uid: int
    gid: int


class Group(NamedTuple):
    """A group, and the names of its members."""

    name: str
    gid: int
    members: tuple[str, ...]


def user(key: Key, within_s: float = ID_WITHIN_S) -> User | None:
    """The account with that name or ID. Raises NoAnswer."""
    local = filter(None, map(parsed_user, _entries_in_file("passwd", key)))
    found = next(local, None)
    if found is not None or _is_in_files_alone("passwd"):
        return found
    return _ask(_find_user, key, within_s, f"the user {key!r}")


def group(key: Key, within_s: float = ID_WITHIN_S) -> Group | None:
    """The group with that name or ID. Raises NoAnswer."""
    local = filter(None, map(parsed_group, _entries_in_file("group", key)))
    found = next(local, None)
    if found is not None or _is_in_files_alone("group"):
        return found
    return _ask(_find_group, key, within_s, f"the group {key!r}")


def groups_of(one: User) -> list[int]:
    """The IDs of the primary group, and of every group that lists the user. Raises NoAnswer."""
    return _ask(_group_ids, one, ID_WITHIN_S, f"the groups of {one.name!r}")


def primary_groups() -> list[tuple[int, int]]:
    """The user ID and primary group ID of all accounts that can be listed. Raises NoAnswer."""
    return _ask(_listed, None, LIST_WITHIN_S, "all accounts")


# --- files that are asked first -------------------------------------------------------------------------------------


@functools.cache
def _services(database: str) -> tuple[str, ...]:
    """What nsswitch.conf(5) has for ``passwd`` or ``group``; empty where that is not certain."""
    try:
        lines = files.read_regular(_SWITCH).decode("utf-8", "replace").splitlines()
    except OSError:
        return ()
    entries = [line.partition("#")[0].partition(":") for line in lines]
    found = [services.split() for name, _, services in entries if name.strip() == database]
    return tuple(found[0]) if len(found) == 1 else ()


def _is_in_files_alone(database: str) -> bool:
    """True where nobody else is asked about a name that is not in the file."""
    return _services(database) == ("files",)


def _entries_in_file(database: str, key: Key) -> Iterator[list[str]]:
    """The fields of the lines of /etc/passwd or /etc/group with that name or ID, if the service looks there first.

    An action behind the first service ("[SUCCESS=merge]") may change the answer.
    """
    services = _services(database)
    if services[:1] != ("files",) or (services[1:2] and services[1].startswith("[")):
        return
    try:
        content = files.read_regular(f"/etc/{database}")
    except OSError:
        return
    by_name = isinstance(key, str)
    for wanted in map(os.fsencode, spellings(key)) if isinstance(key, str) else [b"%d" % key]:
        before = rb"" if by_name else rb"[^:\n]*:[^:\n]*:"
        line = re.compile(rb"^(?![#+-])" + before + re.escape(wanted) + rb":.*$", re.MULTILINE)
        for found in line.finditer(content):
            fields = found[0].split(b":")
            if fields[0 if by_name else 2] == wanted:  # a name with a colon in it is nobody's
                yield [field.decode("utf-8", "surrogateescape") for field in fields]


def parsed_user(fields: list[str]) -> User | None:
    """The entry in a line of passwd(5). The C library, too, skips lines that are no entries (nss_files)."""
    uid, gid = (_id(fields[2]), _id(fields[3])) if len(fields) >= 4 and fields[0] else (None, None)
    return None if uid is None or gid is None else User(fields[0], uid, gid)


def parsed_group(fields: list[str]) -> Group | None:
    """As parsed_user(), for group(5)."""
    gid = _id(fields[2]) if len(fields) >= 4 and fields[0] else None
    return None if gid is None else Group(fields[0], gid, tuple(filter(None, fields[3].split(","))))


def _id(text: str) -> int | None:
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else _MAX_ID + 1
    return number if number <= _MAX_ID else None


# --- the C library --------------------------------------------------------------------------------------------------


def spellings(name: str) -> list[str]:
    """Texts that Python passes to the C library as the bytes of ``name``: in UTF-8, and in the encoding of the locale.

    Names in files are UTF-8 on most machines, whatever the locale of the terminal.
    """
    found: list[bytes] = []
    with suppress(UnicodeError):
        found.append(name.encode("utf-8", "surrogateescape"))
    with suppress(UnicodeError):
        found.append(b"".join(map(_as_argument, name)))
    return [os.fsdecode(one) for one in dict.fromkeys(found)]


def _as_argument(character: str) -> bytes:
    """The bytes of an argument that became this character.

    The C library decodes arguments, and in EUC-JP it takes control characters that Python's own codec does not have.
    """
    try:
        return os.fsencode(character)
    except UnicodeError:
        return character.encode("latin-1", "surrogateescape")


def _text(name: str) -> str:
    """A name as Python got it from the C library."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def _find_user(key: Key) -> User | None:
    try:
        entry = pwd.getpwuid(key) if isinstance(key, int) else _first(pwd.getpwnam, spellings(key))
    except KeyError:
        return None
    return User(_text(entry.pw_name), entry.pw_uid, entry.pw_gid)


def _find_group(key: Key) -> Group | None:
    try:
        entry = grp.getgrgid(key) if isinstance(key, int) else _first(grp.getgrnam, spellings(key))
    except KeyError:
        return None
    return Group(_text(entry.gr_name), entry.gr_gid, tuple(map(_text, entry.gr_mem)))


def _first(find: Callable[[str], A], names: list[str]) -> A:
    """Raises KeyError where there is none. ValueError: no name has a NUL."""
    for name in names:
        with suppress(KeyError, ValueError):
            return find(name)
    raise KeyError(*names)


def _listed(_: None) -> list[tuple[int, int]]:
    return [(entry.pw_uid, entry.pw_gid) for entry in pwd.getpwall()]


def _group_ids(one: User) -> list[int]:
    """os.getgrouplist() takes UTF-8 in every locale, and nothing else."""
    try:
        return os.getgrouplist(one.name, one.gid)
    except UnicodeEncodeError:
        return [one.gid, *(entry.gr_gid for entry in grp.getgrall() if one.name in map(_text, entry.gr_mem))]


# --- a child that asks ----------------------------------------------------------------------------------------------


class _Asker:
    """The child that asks for this process. It is forked for the first question."""

    def __init__(self) -> None:
        self._worker: Worker[tuple[Callable[[Any], Any], Any], Any] | None = None
        self._owner = 0
        self._silent_until = 0.0
        self._waited_s = 0.0

    def ask(self, work: Callable[[Q], A], question: Q, within_s: float, what: str) -> A:
        """As _ask()."""
        from imds_guard.kernel.abandonable import Unanswered  # noqa: PLC0415 -- start-up time: files often have it

        answer: A | Unanswered = Unanswered.NOT_ASKED
        # Half a second without an answer may be a busy machine: it says nothing about a question that waits for ten.
        if time.monotonic() >= self._silent_until or within_s > self._waited_s:
            answer = self._own_worker().ask((work, question), within_s)
        if isinstance(answer, Unanswered):
            if answer is Unanswered.HUNG:
                self._silent_until, self._waited_s = time.monotonic() + SILENT_FOR_S, within_s
            raise NoAnswer(
                f"the name service gave no answer about {what} within {within_s:g} s: repair it (nsswitch.conf(5)), or "
                "give IDs in place of names"
            )
        return answer

    def _own_worker(self) -> Worker[tuple[Callable[[Any], Any], Any], Any]:
        """A forked process needs a child of its own: the pipes of the other one are its parent's."""
        from imds_guard.kernel.abandonable import Worker  # noqa: PLC0415

        if self._worker is None or self._owner != os.getpid():
            self._worker, self._owner = Worker(_call), os.getpid()
            atexit.register(self._worker.close)
        return self._worker


def _call(question: tuple[Callable[[Any], Any], Any]) -> Any:
    work, argument = question
    return work(argument)


_asker = _Asker()


def _ask(work: Callable[[Q], A], question: Q, within_s: float, what: str) -> A:
    """``work(question)``, a look-up of the C library, by a child. Raises NoAnswer; ``what`` ends "no answer about"."""
    if children.is_detached():  # its parent waits for it in the same way
        return work(question)
    return _asker.ask(work, question, within_s, what)
