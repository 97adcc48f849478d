# SPDX-License-Identifier: Apache-2.0
"""What the rules don't say of filters: which requests each allows, and the numbers of its listeners. A file has it.

The rules hold the digest of the whole policy (render.digest()), which is the key: another file is no policy's.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterator
from typing import Any, NamedTuple

from imds_guard.backends.iptables.render import ResolvedPolicy, digest
from imds_guard.backends.iptables.state_file import StateFile
from imds_guard.errors import BadPolicy
from imds_guard.policy.filter_numbers import Numbers
from imds_guard.policy.filter_text import parse_rules, rules_text
from imds_guard.policy.filters import Filter, Target
from imds_guard.policy.model import Identities, Policy, make_policy


class FilterState(NamedTuple):
    """The filters of one policy."""

    filters: tuple[Filter, ...]
    uid: int | None
    numbers: Numbers


class FilterFile:
    """The file of this network namespace."""

    def __init__(self, folder: str) -> None:
        self._file = StateFile(folder, "iptables-filters")

    def exists(self) -> bool:
        """True when a policy with filters is in force, or a change to one or from one was ended in the middle."""
        return bool(self._file.read())

    def complete(self, held: ResolvedPolicy, policy_digest: str) -> ResolvedPolicy:
        """A policy that was read from rules, with its filters. Raises BadPolicy."""
        states = self._read()
        if policy_digest not in states:
            raise BadPolicy("the file that says what its filters allow is gone or of another policy")
        state, policy = states[policy_digest], held.policy
        complete = make_policy(policy.locks, policy.mode, policy.containers, False, state.filters, state.uid)
        return held._replace(policy=complete, numbers=state.numbers)

    @contextlib.contextmanager
    def changing(self, wanted: ResolvedPolicy) -> Iterator[None]:
        """Within the block the file has the old filters and those of ``wanted``; after it the latter alone.

        After an exception it keeps both: where the rules could not be put back, they are those of either policy.
        """
        new = {digest(wanted.policy): _state(wanted)} if wanted.policy.filters else {}
        if new:
            with contextlib.suppress(BadPolicy):  # one that nobody can read has nothing to keep
                new = {**self._read(), **new}
            self._file.write(_text(new))
        yield
        self._file.write(_text({digest(wanted.policy): _state(wanted)}) if wanted.policy.filters else "")

    def remove(self) -> None:
        """Call it when the rules are gone."""
        self._file.remove()

    def _read(self) -> dict[str, FilterState]:
        import json  # noqa: PLC0415 -- start-up time: most policies have no filters

        text = self._file.read()
        try:
            return {key: _parsed(value) for key, value in json.loads(text or "{}").items()}
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise BadPolicy("the file that says what its filters allow is malformed") from error


def _state(wanted: ResolvedPolicy) -> FilterState:
    policy: Policy = wanted.policy
    return FilterState(policy.filters, policy.filter_uid, wanted.numbers)


def _text(states: dict[str, FilterState]) -> str:
    import json  # noqa: PLC0415

    return json.dumps({key: _values(state) for key, state in states.items()})


def _values(state: FilterState) -> dict[str, Any]:
    return {
        "uid": state.uid,
        "targets": [[str(one.address), one.port, number] for one, number in state.numbers.targets.items()],
        "numbers": dict(state.numbers.filters),
        "filters": [
            {
                "name": one.name,
                "locks": list(one.locks),
                "users": sorted(one.who.users),
                "groups": sorted(one.who.groups),
                "everyone": one.everyone,
                "port": one.port,
                "rules": rules_text(one.rules),
            }
            for one in state.filters
        ],
    }


def _parsed(values: dict[str, Any]) -> FilterState:
    filters = tuple(
        Filter(
            str(one["name"]),
            tuple(map(str, one["locks"])),
            Identities(frozenset(map(int, one["users"])), frozenset(map(int, one["groups"]))),
            bool(one["everyone"]),
            parse_rules(one["rules"]),
            int(one["port"]),
        )
        for one in values["filters"]
    )
    targets = {Target(ipaddress.ip_address(address), int(port)): int(n) for address, port, n in values["targets"]}
    uid = values["uid"]
    names = {str(name): int(number) for name, number in values["numbers"].items()}
    return FilterState(filters, None if uid is None else int(uid), Numbers(targets, names))
