# SPDX-License-Identifier: Apache-2.0
"""The one watch that reads a guard's ring buffer: it folds the records and emits events.

While records come it reads ten times a second, and more often in a flood. Once a second it checks the guard. Otherwise
it sleeps in poll(2).
"""

from __future__ import annotations

import select
import time
from contextlib import suppress

from imds_guard.backends.ebpf.pins import PinLocation
from imds_guard.backends.ebpf.record import is_allowed, process_key, similarity_key
from imds_guard.backends.ebpf.record_source import RecordSource
from imds_guard.errors import GuardError, NotPermitted, Unsupported
from imds_guard.watch.describe import Describer
from imds_guard.watch.filter_source import FilterSource
from imds_guard.watch.fold import Fold, Folding, RateLimit
from imds_guard.watch.options import WatchOptions, require_ebpf
from imds_guard.watch.output import Output
from imds_guard.watch.stop_signal import StopSignal

_PAUSE_S, _FLOOD_PAUSE_S = 0.1, 0.01
"""Pauses after a read, in which records gather. The short one follows a read of more than _FLOOD_RECORDS, so that the
ring buffer does not fill up.
"""
_FLOOD_RECORDS = 1000
_CHECK_EVERY_S = 1.0
"""How often we check whether the guard was replaced or removed, or has another policy."""
_IPTABLES_CHECK_EVERY = 30
"""While there is no guard, every how many checks we look for the iptables backend."""
_RESERVED = 10
"""Lines per second that denials leave for notices about lost and left-out records."""
_RESERVED_BY_ALLOWED = 50
"""Lines per second that allowed connects leave for denials and notices."""
_RESERVED_BY_REFUSALS = 30
"""Lines per second that refusals of filters leave for denials and notices."""
FINISH_S = 2.0


class Leader:
    """Reads the ring buffer from check_guard() to close()."""

    def __init__(self, location: PinLocation, options: WatchOptions, output: Output) -> None:
        self._location = location
        self._options = options
        self._output = output
        self._describer = Describer(options.cgroup)
        self._denied = Folding(similarity_key, process_key)
        self._allowed = Folding(similarity_key, process_key)
        self._foldings = ((self._denied, _RESERVED), (self._allowed, _RESERVED_BY_ALLOWED))
        self._filter = FilterSource()
        self._rate = RateLimit()
        self.source: RecordSource | None = None
        """None while there is no guard."""
        self._waits_for = ""
        self._checks = 0
        self._next_check = 0.0
        self._paused_until = 0.0
        self._lost = 0
        self._left_out = 0

    def close(self) -> None:
        """Emits what is folded, resets the hooks to report only denials, and closes the ring buffer."""
        now = time.monotonic()
        for folding, _ in self._foldings:
            for fold in folding.take_all():
                self._emit_fold(fold, now, _RESERVED)
        for fold in self._filter.folding.take_all():
            self._emit_refusals(fold, now)
        self._filter.close()
        self._emit_left_out(now, last=True)
        if self.source is not None:
            self._emit_lost()
            with suppress(GuardError):
                self.source.log_allowed(False)
            self.source.close()
            self.source = None
        self._describer.close()
        self._output.finish(FINISH_S)

    # --- one turn ---

    def turn(self, stop: StopSignal) -> bool:
        """Waits until there is something to do, and does it. False when nobody reads our output any more."""
        ready = self._wait(stop)
        now = time.monotonic()
        if now >= self._next_check:
            self.check_guard(now)
        if self.source is not None and self.source.fileno() in ready:
            self.drain(now)
        if self._filter.fileno() in ready:
            self._drain_filter(now)
        self._emit_due(now)
        self._emit_left_out(now)
        wanted = self._output.wants_allowed
        has_reader = self._output.serve(ready)
        if self._output.wants_allowed != wanted:
            self._log_allowed()
        return has_reader

    def _wait(self, stop: StopSignal) -> dict[int, int]:
        now = time.monotonic()
        poll = select.poll()
        poll.register(stop, select.POLLIN)
        self._output.register(poll)
        until = min(self._next_check, *(folding.next_due() for folding, _ in self._foldings))
        until = min(until, self._filter.folding.next_due())
        if self._filter.fileno() >= 0:
            poll.register(self._filter, select.POLLIN)
        if self.source is not None:
            if now >= self._paused_until:
                poll.register(self.source, select.POLLIN)
            else:
                until = min(until, self._paused_until)
        return dict(poll.poll(max(0.0, until - now) * 1000))

    # --- the guard ---

    def check_guard(self, now: float) -> None:
        """Notices that the guard was started, removed or replaced, or has another policy."""
        self._next_check = now + _CHECK_EVERY_S
        self._filter.check()
        if self.source is not None and not self.source.is_current():
            while self.drain(now):
                pass
            self.source.close()
            self.source = None
            self._output.emit_state("ended")
        if self.source is None:
            self._open_source()
        else:
            self.source.refresh()
            self._emit_lost()

    def _open_source(self) -> None:
        try:
            self.source = RecordSource.open(self._location)
            waits_for = "imds-guard start"
        except (NotPermitted, Unsupported):
            raise
        except GuardError as error:
            waits_for = str(error)
        if self.source is None:
            self._wait_for_guard(waits_for)
            return
        self._waits_for = ""
        self._output.emit_state("began")
        self._log_allowed()
        if self.source.lost() < self._lost:  # a new guard counts from 0; a replacement of the maps keeps the counters
            self._lost = 0
        self._emit_lost(before_this_watch=True)

    def _wait_for_guard(self, waits_for: str) -> None:
        self._checks += 1
        if self._checks % _IPTABLES_CHECK_EVERY == 0:
            require_ebpf(self._options.cgroup)
        if waits_for != self._waits_for and not self._options.once:
            self._waits_for = waits_for
            self._output.emit_state("waiting", waits_for=waits_for)

    def _log_allowed(self) -> None:
        """Sets what the hooks report. This also resets the setting of a watch that was killed."""
        if self.source is not None:
            self.source.log_allowed(self._output.wants_allowed)

    # --- records ---

    def drain(self, now: float) -> int:
        """Reads the records that are there and emits the folds that are new. Returns the number of records."""
        if self.source is None:
            return 0
        records = self.source.read()
        for record in records:
            (self._allowed if is_allowed(record) else self._denied).add(record, now)
        self._paused_until = now + (_PAUSE_S if len(records) <= _FLOOD_RECORDS else _FLOOD_PAUSE_S)
        for folding, reserved in self._foldings:
            self._left_out += folding.take_dropped()
            for fold in folding.take_new():
                if self._rate.take(now, reserved):
                    self._output.emit(self._describer.describe(fold, self.source))
                    folding.mark_emitted(fold)
        self._emit_lost()
        return len(records)

    def _emit_due(self, now: float) -> None:
        for folding, reserved in self._foldings:
            for fold in folding.take_due(now):
                if self._emit_fold(fold, now, reserved):
                    folding.reopen(fold, now)

        for fold in self._filter.folding.take_due(now):
            if self._emit_refusals(fold, now):
                self._filter.folding.reopen(fold, now)
            else:
                self._left_out += fold.count

    def _emit_fold(self, fold: Fold, now: float, reserved: int) -> bool:
        """False when the rate limit allows no line: then its records are only counted as left out."""
        if not self._rate.take(now, reserved):
            self._left_out += fold.count
            return False
        self._output.emit(self._describer.describe(fold, self.source))
        return True

    # --- the filter ---

    def _drain_filter(self, now: float) -> None:
        self._filter.drain(now)
        self._left_out += self._filter.folding.take_dropped()
        for fold in self._filter.folding.take_new():
            if self._emit_refusals(fold, now):
                self._filter.folding.mark_emitted(fold)

    def _emit_refusals(self, fold: Fold, now: float) -> bool:
        if not self._rate.take(now, _RESERVED_BY_REFUSALS):
            return False
        self._output.emit(self._filter.describe(fold))
        return True

    # --- notices ---

    def _emit_lost(self, **more: object) -> None:
        if self.source is None:
            return
        lost = self.source.lost()
        if lost > self._lost:
            self._output.emit_state("lost", count=lost - self._lost, **more)
            self._lost = lost

    def _emit_left_out(self, now: float, last: bool = False) -> None:
        if self._left_out and (last or self._rate.take(now)):
            self._output.emit_state("left-out", count=self._left_out)
            self._left_out = 0
