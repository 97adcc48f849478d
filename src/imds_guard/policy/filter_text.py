# SPDX-License-Identifier: Apache-2.0
"""The rules of a filter as text, which can be stored and read back, and the digest of what a listener serves."""

from __future__ import annotations

from imds_guard.errors import BadPolicy
from imds_guard.policy.filters import FilterRules, Target
from imds_guard.policy.rule_sets import expand

_FLAGS = ("require_imdsv2", "audit")
_LISTS = ("allow", "deny", "headers", "user_agents", "sets")


def rules_text(rules: FilterRules) -> str:
    """One line for each rule: ``allow GET /**``. parse_rules() reads it as the same rules."""
    lines = [f"{key} {value}" for key in _LISTS for value in _values(getattr(rules, key))]
    lines += [key for key in _FLAGS if getattr(rules, key)]
    return "".join(line + "\n" for line in lines)


def _values(value: tuple[str, ...] | str | None) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value


def parse_rules(text: str) -> FilterRules:
    """The rules that rules_text() wrote. Raises BadPolicy for any other text."""
    found: dict[str, list[str]] = {key: [] for key in _LISTS}
    flags = dict.fromkeys(_FLAGS, False)
    for line in text.splitlines():
        key, separator, value = line.partition(" ")
        if separator and key in found:
            found[key].append(value)
        elif not separator and key in flags:
            flags[key] = True
        else:
            raise BadPolicy(f"{line!r} is not a rule of a filter")
    headers = found["headers"][0] if found["headers"] else None
    return FilterRules(
        tuple(found["allow"]), tuple(found["deny"]), headers, tuple(found["user_agents"]), **flags,
        sets=tuple(found["sets"]),
    )  # fmt: skip


def digest(target: Target, rules: FilterRules) -> int:
    """64 bits of SHA-256 over what a listener serves, never 0. Built-in sets count by what they contain."""
    from hashlib import sha256  # noqa: PLC0415 -- start-up time: most policies have no filters

    text = f"imds-guard filter 1\n{target.address} {target.port}\n{rules_text(expand(rules))}"
    return int.from_bytes(sha256(text.encode()).digest()[:8], "little") or 1
