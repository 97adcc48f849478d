# SPDX-License-Identifier: Apache-2.0
"""The configuration as boot reads it: a file that root alone can change, and without waiting for a name service."""

from __future__ import annotations

from imds_guard.config.known_programs import known_programs
from imds_guard.config.names import ANSWERS_WITHIN_S, BootNames, Name, ask
from imds_guard.config.read import Config, cgroup_path, config_of
from imds_guard.config.source import DROP_INS, Source, drop_ins, read_file
from imds_guard.config.table import Table
from imds_guard.config.toml_lines import KeyLines
from imds_guard.errors import BadPolicy, GuardError, system_text
from imds_guard.kernel import ownership
from imds_guard.kernel.abandonable import Worker
from imds_guard.policy.model import Mode
from imds_guard.text import some_of

_MAX_SHOWN = 3


class BootFile:
    """The file ``path`` and its drop-ins. They are read once."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file: Source | None = None
        self._source: Source | None = None
        self._answers: dict[Name, int | None] = {}
        self._asked: set[Name] = set()
        self._names = BootNames({})

    def load(self) -> Config:
        """The configuration, by the stored IDs, those of the files passwd(5) and group(5), and the answers so far.

        Raises BadPolicy.
        """
        if self._source is None:
            self._source = self._read()
        self._names = BootNames(self._answers)
        return config_of(self._source, self._names)

    def _read(self) -> Source:
        self._file = self._file or _read_of_root(self.path)
        require_folder_of_root(self.path)
        return self._file._replace(drop_ins=tuple(_read_of_root(one) for one in drop_ins(self.path)))

    @property
    def has_questions(self) -> bool:
        """True when load() did not find some names, for which ask() has not asked yet."""
        return bool(self._questions())

    def ask(self) -> None:
        """Asks the name service for what load() did not find, each name once."""
        names = self._questions()
        self._asked |= names
        self._answers.update(ask(sorted(names)))

    def _questions(self) -> set[Name]:
        return {*self._names.missing, *self._names.unchecked} - self._asked

    def require_answers(self) -> None:
        """Raises BadPolicy where an entry has no ID since the name service did not answer."""
        if self._names.missing:
            place, names = self._names.place_of_missing, _quoted(self._names.missing)
            raise BadPolicy(
                f"{place}: the name service gave no ID for {names} within {ANSWERS_WITHIN_S:.0f} s; try again, "
                "or save the IDs with imds-guard start --save"
            )

    def changed_names(self) -> BadPolicy | None:
        """The error for stored IDs that are now another name's, or None."""
        if not self._names.changed:
            return None
        return BadPolicy(f"{'; '.join(self._names.changed)}: correct the name or the id")

    def string(self, key: str) -> str | None:
        """The string value of a key outside all tables. None also where the file can't be read, or not be trusted."""
        return None if self._file is None else self._file.string(key)


AUDIT_WITHIN_S = 1.0
"""A file is read in milliseconds, from a cold disk or by an emulated processor later. A file that hangs costs this."""


def says_audit(path: str) -> bool:
    """Whether the file certainly says ``mode = "audit"``: then it denies nobody, whatever else is in it.

    False where a child can't tell in time, or others than root can change the file.
    """
    try:
        with Worker(_says_audit) as worker:
            return worker.ask(path, AUDIT_WITHIN_S) is True
    except Exception:  # noqa: BLE001 - whatever it is: load() meets it again, and then the machine is locked
        return False


def _says_audit(path: str) -> bool:
    return _read_of_root(path).string("mode") == Mode.AUDIT.value


def _read_of_root(path: str) -> Source:
    require_file_of_root(path)
    return read_file(path)


def _quoted(names: list[Name]) -> str:
    return some_of([repr(name.name) for name in names], _MAX_SHOWN)


def require_file_of_root(path: str) -> None:
    """Raises BadPolicy when there is no file, or when others than root can change it."""
    try:
        where = ownership.others_can_change(path)
    except FileNotFoundError:
        raise BadPolicy(
            f"there is no configuration {path}: write it, or save a policy with imds-guard start ... --save"
        ) from None
    except OSError as error:
        raise BadPolicy(f"the configuration {path} could not be read: {system_text(error)}") from error
    if where is not None:
        raise BadPolicy(f"the configuration {path} is not used: {open_to_others(where)}")


def require_files_of_root(path: str) -> None:
    """Raises BadPolicy when others than root can change the file ``path``, a drop-in of it, or their folder."""
    require_file_of_root(path)
    require_folder_of_root(path)
    for one in drop_ins(path):
        require_file_of_root(one)


def require_folder_of_root(path: str) -> None:
    """Raises BadPolicy when others than root can change the folder of the drop-ins of the file ``path``."""
    where = _folder_open_to_others(path)
    if where is not None:
        raise BadPolicy(f"the drop-ins of the configuration {path} are not used: {open_to_others(where)}")


def _folder_open_to_others(path: str) -> str | None:
    folder = DROP_INS.get(path)
    try:
        return None if folder is None else ownership.others_can_change(folder)
    except OSError:  # it is not there, or drop_ins() says what is wrong
        return None


def mode_of(path: str) -> Mode | None:
    """``mode`` of the file ``path``, whatever else is in it. None where it can't be read or used."""
    try:
        return Mode(_read_of_root(path).string("mode") or Mode.ENFORCE.value)
    except (GuardError, ValueError):
        return None


def cgroup_of(path: str) -> str | None:
    """``cgroup`` of the file ``path``, whatever else is in it. None where it can't be read or used."""
    try:
        source = _read_of_root(path)
        return cgroup_path(Table(path, KeyLines(source.text), (), source.values))
    except GuardError:
        return None


def known_programs_of(path: str) -> frozenset[str]:
    """``known_programs`` of the file ``path``, whatever else is in it.

    Empty where it can't be read, or others than root can change it.
    """
    try:
        source = _read_of_root(path)
        return frozenset(known_programs(Table(path, KeyLines(source.text), (), source.values)))
    except GuardError:
        return frozenset()


def open_to_others(where: str) -> str:
    """The end of a sentence about a configuration that others than root can change, at ``where``."""
    return f"{where} can be changed by others than root, who could open the lock; chown it to root, and chmod go-w"


def warnings_of_file(path: str) -> list[str]:
    """A warning for each part of a configuration that others than root can change."""
    found = [(path, _open(path)), (DROP_INS.get(path), _folder_open_to_others(path))]
    found += [(one, _open(one)) for one in drop_ins(path)]
    return [f"at boot {one} would not be used: {open_to_others(where)}" for one, where in found if where is not None]


def _open(path: str) -> str | None:
    try:
        return ownership.others_can_change(path)
    except OSError:
        return None
