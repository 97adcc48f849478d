# SPDX-License-Identifier: Apache-2.0
"""Turns folded records into events: decodes the last record and looks up its lock and its caller."""

from __future__ import annotations

from typing import cast

from imds_guard.backends.ebpf.record import Record, decode
from imds_guard.backends.ebpf.record_source import RecordSource
from imds_guard.kernel.cgroup import open_cgroup
from imds_guard.policy.endpoint_syntax import endpoint_argument
from imds_guard.watch.advice import place, would_allow
from imds_guard.watch.cgroup_info import CgroupCache, CgroupInfo
from imds_guard.watch.event import Values, record_values
from imds_guard.watch.fold import Fold
from imds_guard.watch.process_info import UNKNOWN, NameCache, ProcessInfo, Programs
from imds_guard.watch.timestamps import iso_time_of


class Describer:
    """Keeps caches, an open directory and a child. Close it."""

    def __init__(self, cgroup: str | None = None) -> None:
        """``cgroup`` is the path of the cgroup whose guard denies; None for the machine's."""
        self._cgroup = cgroup
        self._root = open_cgroup()
        self._cgroups = CgroupCache(self._root)
        self._names = NameCache()
        self._programs = Programs()

    def close(self) -> None:
        """Closes the directory, and ends the child that looks up programs."""
        self._root.close()
        self._programs.close()

    def describe(self, fold: Fold, source: RecordSource | None) -> Values:
        """The event for a fold; without lock and groups when there is no ``source`` to read them from."""
        record = decode(fold.last)
        lock = source.lock_name(record) if source is not None else None
        cgroup = self._cgroups.look_up(record.cgroup_id, record.tgid) if record.tgid else CgroupInfo()
        program = program_for(record, fold, self._programs)
        values = record_values(record, lock, self._names.user(record.fsuid), cgroup, program)
        values.update(count=fold.count, processes=len(fold.processes) if record.tgid else None)
        if fold.count > 1:
            values["since"] = iso_time_of(decode(fold.first).time_ns)
        if record.verdict != "allowed":
            groups = source.allowed_groups(record) if source is not None else frozenset()
            where = place(_endpoint_of(record, source), self._cgroup)
            values["would_allow"] = would_allow(record.reason, record.fsuid, groups, self._names, where)
        return values


def _endpoint_of(record: Record, source: RecordSource | None) -> str | None:
    """The address that was denied, where allow has to be told; None where one command is for all locks."""
    if source is None or not source.needs_endpoint(record):
        return None
    return endpoint_argument(record.address, record.port, record.protocol)


def program_for(record: Record, fold: Fold, programs: Programs) -> ProcessInfo:
    """The program of the caller; if the process has ended, its program when the fold was last described."""
    if not record.tgid:
        return UNKNOWN
    program = programs.of(record.tgid, record.time_ns)
    if program != UNKNOWN:
        fold.note = (record.tgid, program)
    elif isinstance(fold.note, tuple) and fold.note[0] == record.tgid:
        return cast(ProcessInfo, fold.note[1])
    return program
