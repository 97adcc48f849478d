# SPDX-License-Identifier: Apache-2.0
"""What the service of the filters refuses, as events of ``watch``."""

from __future__ import annotations

from typing import Any

from imds_guard.errors import GuardError
from imds_guard.filter.client import FilterClient
from imds_guard.watch.event import Values
from imds_guard.watch.fold import Fold, Folding
from imds_guard.watch.process_info import NameCache
from imds_guard.watch.timestamps import iso_time

Refusal = dict[str, Any]
_KEYS = ("filter", "uid", "method", "path", "rule", "status", "audited")
_MAX_TEXT = 256


class FilterSource:
    """Follows the service while it runs; looks for it again each time that check() is called."""

    def __init__(self) -> None:
        self._client: FilterClient | None = None
        self._names = NameCache()
        self.folding = Folding(_similar, lambda record: b"")

    def fileno(self) -> int:
        """The descriptor for poll(2); -1 where no service runs."""
        return -1 if self._client is None else self._client.fileno()

    def check(self) -> None:
        """Connects to a service that has started."""
        if self._client is not None:
            return
        try:
            client = FilterClient.open()
            if client is not None:
                client.follow()
                self._client = client
        except (GuardError, OSError):
            self.close()

    def drain(self, now: float) -> None:
        """Adds what has come to the folds. The end of the service is no event: status says so."""
        if self._client is None:
            return
        try:
            for values in self._client.read():
                self.folding.add(_record(values), now)
        except (GuardError, KeyError, TypeError, ValueError):
            self.close()

    def describe(self, fold: Fold) -> Values:
        """The event of a fold."""
        values = _values(fold.last)
        found: Values = {
            "event": "audited" if values["audited"] else "refused",
            "time": iso_time(values["time"]),
            "count": fold.count,
            "filter": values["filter"],
            "user": self._names.user(values["uid"]),
            "uid": values["uid"],
            "method": values["method"],
            "path": values["path"],
            "rule": values["rule"],
            "status": values["status"],
        }
        if fold.count > 1:
            found["since"] = iso_time(_values(fold.first)["time"])
        return found

    def close(self) -> None:
        """Ends the connection; check() may begin another one."""
        if self._client is not None:
            self._client.close()
            self._client = None


def _record(values: Refusal) -> bytes:
    """A refusal as a record. The service is not trusted: texts are cut. Raises KeyError, TypeError, ValueError."""
    from imds_guard.filter.messages import packed  # noqa: PLC0415

    texts = {key: str(values[key])[:_MAX_TEXT] for key in ("filter", "method", "path", "rule")}
    numbers = {"uid": int(values["uid"]), "status": int(values["status"]), "audited": bool(values["audited"])}
    return packed({"time": float(values["time"]), **texts, **numbers})


def _values(record: bytes) -> Refusal:
    from imds_guard.filter.messages import unpacked  # noqa: PLC0415

    return unpacked(record)


def _similar(record: bytes) -> bytes:
    values = _values(record)
    return repr([values[key] for key in _KEYS]).encode()
