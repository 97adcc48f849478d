# SPDX-License-Identifier: Apache-2.0
"""The one watch that holds the ring buffer: folds what comes, and tells it to its own outlet and to followers."""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress
from types import FrameType
from typing import Any, NamedTuple, cast

from imds_guard.backends import choose
from imds_guard.backends.ebpf import abi
from imds_guard.backends.ebpf import watch as kernel
from imds_guard.backends.ebpf.pins import PinLocation
from imds_guard.backends.ebpf.watch import Source
from imds_guard.errors import GuardError, NotPermitted, Unsupported
from imds_guard.kernel.cgroup import open_cgroup
from imds_guard.watch.event import Values, denial, would_allow
from imds_guard.watch.fold import Fold, Folding, Rate
from imds_guard.watch.output import Followers, Outlet
from imds_guard.watch.process_info import NOTHING, Home, Homes, Names, Program, iso_time, program_of, wall_clock

_PAUSE_S, _SHORT_PAUSE_S = 0.1, 0.01
"""After a batch, so that records gather; the short one after a batch of more than ``_MANY``, or room would run out."""
_MANY = 1000
_LOOK_S = 1.0
"""How often the guard itself is looked at: replaced, removed, another policy."""
_LOOK_FOR_IPTABLES = 30
"""Every so many looks while there is no guard."""
_SPARED = 10
"""Lines of each second that denials leave for words about what was lost or left out."""
_SPARED_BY_ALLOWED = 50
FINISH_S = 2.0


class Wish(NamedTuple):
    """What is to be watched: a cgroup's guard or the machine's, with what is let through or without; only what is
    there now, or on and on.
    """

    cgroup: str | None = None
    allowed: bool = False
    once: bool = False


class Ended:
    """SIGTERM and SIGINT as something to wait for. A context manager; the handlers before come back after it."""

    def __init__(self) -> None:
        self.now = False

    def __enter__(self) -> Ended:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before_fd = signal.set_wakeup_fd(self._writer)
        self._before: dict[signal.Signals, Any] = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.now = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before_fd)
        os.close(self._reader)
        os.close(self._writer)

    def fileno(self) -> int:
        """Readable once it is time to end."""
        return self._reader


def require_ebpf(cgroup: str | None, doing: str = "watching denials") -> None:
    """Raises Unsupported when iptables rules are what is in force."""
    try:
        running = choose.running(cgroup)
    except NotPermitted:
        return  # whoever may not ask iptables, as a service with few privileges, still may read the ring buffer
    if "iptables" in running and "ebpf" not in running:
        raise Unsupported(
            f"{doing}: iptables is what enforces, and its rules tell nobody whom they refuse; where eBPF works "
            "(imds-guard check), run imds-guard start --backend ebpf"
        )


class Reader:
    """Holds the ring buffer from look() to close()."""

    def __init__(self, place: PinLocation, wish: Wish, outlet: Outlet, followers: Followers | None) -> None:
        self._place = place
        self._wish = wish
        self._outlet = outlet
        self._followers = followers
        self._root = open_cgroup()
        self._homes = Homes(self._root)
        self._names = Names()
        self._denied = Folding(kernel.same_caller, kernel.process_of)
        self._allowed = Folding(kernel.same_caller, kernel.process_of)
        self._rate = Rate()
        self.source: Source | None = None
        self._waits_for = ""
        self._looks = 0
        self._next_look = 0.0
        self._pause_until = 0.0
        self._lost = 0
        self._left_out = 0

    def close(self) -> None:
        """Tells what is held back still, has the hooks log denials alone, and lets go."""
        now = time.monotonic()
        for fold in self._denied.rest() + self._allowed.rest():
            self._tell_fold(fold, now, spared=_SPARED)
        self._tell_left_out(now, last=True)
        if self.source is not None:
            self._look_for_losses()
            with suppress(GuardError):
                self.source.log_allowed(False)
            self.source.close()
            self.source = None
        self._root.close()
        self._outlet.finish(FINISH_S)
        if self._followers is not None:
            for follower in self._followers.by_fd.values():
                follower.outlet.push()

    # --- one turn ---

    def turn(self, ended: Ended) -> bool:
        """Waits for something to do and does it; False when nobody reads the outlet any more."""
        ready = self._wait(ended)
        now = time.monotonic()
        if now >= self._next_look:
            self.look(now)
        if self.source is not None and self.source.ring.fileno() in ready:
            self.drain(now)
        self._tell_due(now)
        self._tell_left_out(now)
        self._serve_followers(ready)
        closed = ready.get(self._outlet.fd, 0) & (select.POLLERR | select.POLLHUP)
        return self._outlet.push() and not closed

    def _wait(self, ended: Ended) -> dict[int, int]:
        now = time.monotonic()
        waiting = select.poll()
        waiting.register(ended, select.POLLIN)
        waiting.register(self._outlet.fd, select.POLLOUT if self._outlet.pending else 0)
        until = min(self._next_look, self._denied.next_due(), self._allowed.next_due())
        if self.source is not None:
            if now >= self._pause_until:
                waiting.register(self.source.ring, select.POLLIN)
            else:
                until = min(until, self._pause_until)
        if self._followers is not None:
            waiting.register(self._followers, select.POLLIN)
            for fd, follower in self._followers.by_fd.items():
                waiting.register(fd, select.POLLIN | (select.POLLOUT if follower.outlet.pending else 0))
        return dict(waiting.poll(max(0.0, until - now) * 1000))

    def _serve_followers(self, ready: dict[int, int]) -> None:
        followers = self._followers
        if followers is None:
            return
        wanted = followers.want_allowed
        for fd, follower in list(followers.by_fd.items()):
            if not (follower.listen() if ready.get(fd, 0) & ~select.POLLOUT else True) or not follower.outlet.push():
                followers.drop(fd)
        if followers.fileno() in ready:
            followers.accept()
        if followers.want_allowed != wanted:
            self._log_allowed()

    # --- the guard ---

    def look(self, now: float) -> None:
        """Notices that the guard has come, gone, or has other maps or another policy."""
        self._next_look = now + _LOOK_S
        if self.source is not None and not self.source.is_current():
            while self.drain(now):
                pass
            self.source.close()
            self.source = None
            self._tell_state("ended")
        if self.source is None:
            self._find_source()
        else:
            self.source.refresh()
            self._look_for_losses()

    def _find_source(self) -> None:
        try:
            self.source = Source.open(self._place)
            waits_for = "imds-guard start"
        except (NotPermitted, Unsupported):
            raise
        except GuardError as error:
            waits_for = str(error)
        if self.source is not None:
            self._waits_for = ""
            self._tell_state("began")
            self._log_allowed()
            self._lost = 0
            self._look_for_losses(earlier=True)
            return
        self._looks += 1
        if self._looks % _LOOK_FOR_IPTABLES == 0:
            require_ebpf(self._wish.cgroup)
        if waits_for != self._waits_for and not self._wish.once:
            self._waits_for = waits_for
            self._tell_state("waiting", waits_for=waits_for)

    def _log_allowed(self) -> None:
        """Also what one who was killed has left switched on is switched off."""
        if self.source is not None:
            followers = self._followers is not None and self._followers.want_allowed
            self.source.log_allowed(self._wish.allowed or followers)

    # --- records ---

    def drain(self, now: float) -> int:
        """Takes in the records that are there, and tells those of a kind that is new. Returns how many came."""
        if self.source is None:
            return 0
        records = self.source.ring.read()
        for record in records:
            if len(record) != abi.EVENT.size:
                raise GuardError(
                    "reading the ring buffer: its records are of another version of imds-guard; run imds-guard start"
                )
            (self._allowed if kernel.is_allowed(record) else self._denied).add(record, now)
        self._pause_until = now + (_PAUSE_S if len(records) <= _MANY else _SHORT_PAUSE_S)
        for folding, spared in ((self._denied, _SPARED), (self._allowed, _SPARED_BY_ALLOWED)):
            self._left_out += folding.crowded_out
            folding.crowded_out = 0
            for fold in folding.fresh():
                if self._rate.take(now, spared):
                    self._tell(self._fold_values(fold))
                    folding.came_out(fold)
        self._look_for_losses()
        return len(records)

    def _tell_due(self, now: float) -> None:
        for folding, spared in ((self._denied, _SPARED), (self._allowed, _SPARED_BY_ALLOWED)):
            for fold in folding.due(now):
                if self._tell_fold(fold, now, spared):
                    folding.again(fold, now)

    def _tell_fold(self, fold: Fold, now: float, spared: int) -> bool:
        """False when there is no room for another line in this second: then it is only counted."""
        if not self._rate.take(now, spared):
            self._left_out += fold.count
            return False
        self._tell(self._fold_values(fold))
        return True

    def _fold_values(self, fold: Fold) -> Values:
        record = kernel.decode(fold.last)
        lock = self.source.lock_name(record) if self.source is not None else None
        home = self._homes.of(record.cgroup_id, record.tgid) if record.tgid else Home()
        program = _program_of(record, fold)
        values = denial(record, lock, self._names, home, program)
        values.update(count=fold.count, processes=len(fold.processes) if record.tgid else None)
        if fold.count > 1:
            values["since"] = iso_time(wall_clock(kernel.decode(fold.first).time_ns))
        if not kernel.is_allowed(fold.last):
            groups = self.source.allowed_groups(record) if self.source is not None else frozenset()
            values["would_allow"] = would_allow(record.reason, record.fsuid, groups, self._names)
        return values

    # --- telling ---

    def _look_for_losses(self, earlier: bool = False) -> None:
        if self.source is None:
            return
        lost = self.source.maps.lost()
        if lost > self._lost:
            more: dict[str, object] = {"before_this_watch": True} if earlier else {}
            self._tell_state("lost", count=lost - self._lost, **more)
            self._lost = lost

    def _tell_left_out(self, now: float, last: bool = False) -> None:
        if self._left_out and (last or self._rate.take(now)):
            self._tell_state("left-out", count=self._left_out)
            self._left_out = 0

    def _tell_state(self, event: str, **more: object) -> None:
        self._tell({"event": event, "time": iso_time(time.time()), **more})

    def _tell(self, values: Values) -> None:
        if values["event"] != "allowed" or self._wish.allowed:
            self._outlet.put(values)
        if self._followers is None:
            return
        for follower in self._followers.by_fd.values():
            if values["event"] != "allowed" or follower.wants_allowed:
                follower.outlet.put(values)


def _program_of(record: kernel.Record, fold: Fold) -> Program:
    """What the caller runs; what it ran when the fold came out before, if it is gone since."""
    if not record.tgid:
        return NOTHING
    program = program_of(record.tgid, wall_clock(record.time_ns))
    if program != NOTHING:
        fold.memory = (record.tgid, program)
    elif isinstance(fold.memory, tuple) and fold.memory[0] == record.tgid:
        return cast(Program, fold.memory[1])
    return program
