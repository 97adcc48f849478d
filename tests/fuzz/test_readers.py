# SPDX-License-Identifier: Apache-2.0
"""Readers of other people's data: inputs that failed once, and inputs that Hypothesis makes by grammar and mutation."""

from __future__ import annotations

import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imds_guard.errors import BadPolicy
from imds_guard.identity import group_id, user_id
from imds_guard.policy.model import MAX_ID
from tests import strategies
from tests.fuzz import seeds, targets

_ONE_S_IN_MS = 1000
quick = settings(
    deadline=20 * _ONE_S_IN_MS,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=settings().max_examples * 3 // 2,
)
"""The deadline is long: a hang is a failure, a busy machine is not."""


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_seeds(name: str) -> None:
    """No reader fails on its seeds."""
    for data in seeds.seeds()[name]:
        targets.TARGETS[name](data)


@pytest.mark.parametrize(("name", "data"), seeds.FOUND)
def test_inputs_that_failed_once(name: str, data: bytes) -> None:
    """They do not fail again."""
    targets.TARGETS[name](data)


def test_the_seed_of_the_maps_is_a_whole_policy() -> None:
    """Mutations of a valid input reach more code than random bytes."""
    image, record = targets.image_of(seeds.seeds()["maps"][0])
    parsed = targets.parse_settings(record)
    assert parsed is not None
    assert targets.parse(image, parsed[0]) == seeds.several_locks()


@st.composite
def mutated(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """A seed with up to eight spans removed, doubled, or replaced by random bytes."""
    data = draw(st.sampled_from(originals))
    for _ in range(draw(st.integers(1, 8))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 40)))
        data = data[:start] + draw(st.one_of(st.just(data[start:end] * 2), st.binary(max_size=8))) + data[end:]
    return data


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
@quick
@given(choice=st.data())
def test_mutations(name: str, choice: st.DataObject) -> None:
    """A reader refuses changed input as documented, or reads it."""
    targets.TARGETS[name](choice.draw(mutated(seeds.seeds()[name])))


# --- configurations by their grammar --------------------------------------------------------------------------------

_TEXTS = st.one_of(
    st.text(string.printable, max_size=12),
    st.text(max_size=6),
    st.sampled_from(["root", "nobody", "allow", "deny", "audit", "enforce", "default", "aws", "169.254.169.254", "0"]),
)


def _toml_string(text: str) -> str:
    return '"' + "".join(c if c.isalnum() else f"\\U{ord(c):08x}" for c in text if not "\ud800" <= c <= "\udfff") + '"'


def _values() -> st.SearchStrategy[str]:
    numbers = st.integers(-2, MAX_ID + 2).map(str)
    single = st.one_of(
        _TEXTS.map(_toml_string), numbers, st.sampled_from(["true", "false", "1.5", "1979-05-27", "inf"])
    )
    table = st.lists(
        st.tuples(st.sampled_from(["name", "id", "x"]), single), max_size=3, unique_by=lambda pair: pair[0]
    )
    inline = table.map(lambda pairs: "{ " + ", ".join(f"{key} = {value}" for key, value in pairs) + " }")
    some = st.lists(st.one_of(single, inline), max_size=4).map(lambda items: "[\n" + ",\n".join(items) + "]")
    return st.one_of(single, inline, some)


_TOP = st.sampled_from(
    ["mode", "containers", "on_error", "backend", "cgroup", "strict", "forwarded", "resolve_groups", "lock", "nonsense"]
)
_IN_LOCK = st.sampled_from(
    ["endpoints", "preset", "users", "groups", "deny_users", "deny_groups", "default", "nobody", "a.b", '"q"']
)


@st.composite
def configurations(draw: st.DrawFn) -> str:
    """Mostly TOML, with the keys of a configuration, and values that may be wrong."""

    def pairs(keys: st.SearchStrategy[str], maximum: int) -> list[tuple[str, str]]:
        return draw(st.lists(st.tuples(keys, _values()), max_size=maximum, unique_by=lambda pair: pair[0]))

    lines = [f"{key} = {value}" for key, value in pairs(_TOP, 3)]
    for name in draw(st.lists(_TEXTS, max_size=3)):
        lines.append(f"[lock.{_toml_string(name)}]")
        lines += [f"{key} = {value}" for key, value in pairs(_IN_LOCK, 6)]
    return "\n".join(lines)


@quick
@given(configurations())
def test_configurations(text: str) -> None:
    """A configuration is refused, or is the same when it is written and read again."""
    targets.config(text.encode())
    targets.lines(text.encode())


# --- arguments ------------------------------------------------------------------------------------------------------

_NETWORKS = strategies.networks().map(str)
_PORTS = st.one_of(
    st.just(""), st.text("0123456789+-!*:", max_size=12).map(lambda text: ":" + text), st.just(":80"), st.just(":!53")
)


@quick
@given(
    st.one_of(st.text(max_size=40), st.builds("{}{}{}".format, _NETWORKS, _PORTS, st.sampled_from(["", ",tcp", ",x"])))
)
def test_endpoints(text: str) -> None:
    """An endpoint is refused, or its text means the same."""
    targets.endpoint(text.encode(errors="ignore"))


@quick
@given(st.one_of(st.text(max_size=40), st.integers(), st.integers().map(str), st.text("0123456789+-_ ", max_size=12)))
def test_ids(argument: str | int) -> None:
    """A user or group is an ID in range, or is refused."""
    for id_of in (user_id, group_id):
        try:
            number = id_of(argument)
        except BadPolicy:
            continue
        assert 0 <= number <= MAX_ID
