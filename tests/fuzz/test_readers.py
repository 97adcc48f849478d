# SPDX-License-Identifier: Apache-2.0
"""What reads other people's octets: what fuzzing once found, and what Hypothesis makes of grammars and mutations."""

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

_ONE_S = 1000
quick = settings(
    deadline=20 * _ONE_S,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=settings().max_examples * 3 // 2,
)
"""No example takes long: a hang is a failure, and a busy machine is not."""


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_seeds(name: str) -> None:
    """Every reader stands what its fuzzing begins with."""
    for octets in seeds.seeds()[name]:
        targets.TARGETS[name](octets)


@pytest.mark.parametrize(("name", "octets"), seeds.FOUND)
def test_what_was_found(name: str, octets: bytes) -> None:
    """What fuzzing found does not go wrong again."""
    targets.TARGETS[name](octets)


def test_the_seeds_get_through() -> None:
    """The whole of a policy comes back from the octets of its maps, so that mutations of it go deep."""
    image, record = targets.image_of(seeds.seeds()["maps"][0])
    parsed = targets.parse_settings(record)
    assert parsed is not None
    assert targets.parse(image, parsed[0]) == seeds.several_locks()


@st.composite
def mutated(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """A seed with up to eight spans cut out, doubled, or replaced by octets."""
    octets = draw(st.sampled_from(originals))
    for _ in range(draw(st.integers(1, 8))):
        start = draw(st.integers(0, len(octets)))
        end = draw(st.integers(start, min(len(octets), start + 40)))
        octets = octets[:start] + draw(st.one_of(st.just(octets[start:end] * 2), st.binary(max_size=8))) + octets[end:]
    return octets


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
@quick
@given(choice=st.data())
def test_mutations(name: str, choice: st.DataObject) -> None:
    """A reader refuses in its own words what was changed at random, or takes it."""
    targets.TARGETS[name](choice.draw(mutated(seeds.seeds()[name])))


# --- configurations by their grammar --------------------------------------------------------------------------------

_WORDS = st.one_of(
    st.text(string.printable, max_size=12),
    st.text(max_size=6),
    st.sampled_from(["root", "nobody", "allow", "deny", "audit", "enforce", "default", "aws", "169.254.169.254", "0"]),
)


def _toml_string(text: str) -> str:
    return '"' + "".join(c if c.isalnum() else f"\\U{ord(c):08x}" for c in text if not "\ud800" <= c <= "\udfff") + '"'


def _values() -> st.SearchStrategy[str]:
    numbers = st.integers(-2, MAX_ID + 2).map(str)
    single = st.one_of(
        _WORDS.map(_toml_string), numbers, st.sampled_from(["true", "false", "1.5", "1979-05-27", "inf"])
    )
    table = st.lists(
        st.tuples(st.sampled_from(["name", "id", "x"]), single), max_size=3, unique_by=lambda pair: pair[0]
    )
    inline = table.map(lambda pairs: "{ " + ", ".join(f"{key} = {value}" for key, value in pairs) + " }")
    some = st.lists(st.one_of(single, inline), max_size=4).map(lambda items: "[\n" + ",\n".join(items) + "]")
    return st.one_of(single, inline, some)


_TOP = st.sampled_from(["mode", "containers", "on_error", "backend", "cgroup", "strict", "lock", "nonsense"])
_IN_LOCK = st.sampled_from(
    ["endpoints", "preset", "users", "groups", "deny_users", "deny_groups", "default", "nobody", "a.b", '"q"']
)


@st.composite
def configurations(draw: st.DrawFn) -> str:
    """TOML, mostly, with the keys that a configuration has, and values that it may not have."""

    def pairs(keys: st.SearchStrategy[str], most: int) -> list[tuple[str, str]]:
        return draw(st.lists(st.tuples(keys, _values()), max_size=most, unique_by=lambda pair: pair[0]))

    lines = [f"{key} = {value}" for key, value in pairs(_TOP, 3)]
    for name in draw(st.lists(_WORDS, max_size=3)):
        lines.append(f"[lock.{_toml_string(name)}]")
        lines += [f"{key} = {value}" for key, value in pairs(_IN_LOCK, 6)]
    return "\n".join(lines)


@quick
@given(configurations())
def test_configurations(text: str) -> None:
    """One sentence, or a policy that comes out the same when it is written and read again."""
    targets.config(text.encode())
    targets.lines(text.encode())


# --- words ----------------------------------------------------------------------------------------------------------

_NETWORKS = strategies.networks().map(str)
_PORTS = st.one_of(
    st.just(""), st.text("0123456789+-!*:", max_size=12).map(lambda text: ":" + text), st.just(":80"), st.just(":!53")
)


@quick
@given(
    st.one_of(st.text(max_size=40), st.builds("{}{}{}".format, _NETWORKS, _PORTS, st.sampled_from(["", ",tcp", ",x"])))
)
def test_endpoints(text: str) -> None:
    """Refused in a sentence, or the words of what it means mean the same."""
    targets.endpoint(text.encode(errors="ignore"))


@quick
@given(st.one_of(st.text(max_size=40), st.integers(), st.integers().map(str), st.text("0123456789+-_ ", max_size=12)))
def test_ids(word: str | int) -> None:
    """A user or group is an ID in range, or refused."""
    for meaning in (user_id, group_id):
        try:
            number = meaning(word)
        except BadPolicy:
            continue
        assert 0 <= number <= MAX_ID
