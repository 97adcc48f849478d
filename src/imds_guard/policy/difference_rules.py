# SPDX-License-Identifier: Apache-2.0
"""Whether the rules of a filter pass a request on that other rules refuse. Pure.

The answer is on the safe side: "no" is certain. A "yes" may be wrong where a rule is inside what several others mean
together.
"""

from __future__ import annotations

from functools import lru_cache

from imds_guard.errors import BadPolicy
from imds_guard.policy.filters import FilterRules
from imds_guard.policy.header_rules import USER_AGENTS
from imds_guard.policy.path_pattern import PathPattern, parse_pattern
from imds_guard.policy.rule_sets import expand


@lru_cache(maxsize=256)  # the same two filters serve many locks
def pass_more(before: FilterRules, after: FilterRules) -> bool:
    """False where ``after`` passes nothing on that ``before`` refuses."""
    if before.audit or before == after:
        return False
    if after.audit or before.require_imdsv2 > after.require_imdsv2:
        return True
    try:
        return _accepts_more_headers(before, after) or _has_more_paths(expand(before), expand(after))
    except BadPolicy:  # nobody can tell what such rules mean
        return True


def _accepts_more_headers(before: FilterRules, after: FilterRules) -> bool:
    if before.headers is None:
        return False
    if before.headers != after.headers:
        return True
    known = before.user_agents or USER_AGENTS
    return not all(agent.startswith(known) for agent in after.user_agents or USER_AGENTS)


def _has_more_paths(before: FilterRules, after: FilterRules) -> bool:
    """True where something is allowed that was not, or where something is not denied that was."""
    allowed_before, allowed = ([_allowing(text) for text in rules.allow] for rules in (before, after))
    denied_before, denied = (
        [parse_pattern(text, ignore_case=True) for text in rules.deny] for rules in (before, after)
    )
    return not (_covers_all(allowed_before, allowed) and _covers_all(denied, denied_before))


def _allowing(text: str) -> PathPattern:
    """Without a method, an allow rule is about reading (policy/requests.py)."""
    pattern = parse_pattern(text)
    return pattern if pattern.method else pattern._replace(method="GET")


def _covers_all(wide: list[PathPattern], narrow: list[PathPattern]) -> bool:
    known = set(wide)
    return all(one in known or any(_covers(other, one) for other in wide) for one in narrow)


def _covers(wide: PathPattern, narrow: PathPattern) -> bool:
    """True when every request that ``narrow`` means is one that ``wide`` means."""
    if wide.method is not None and wide.method != narrow.method:
        return False
    if len(narrow.segments) < len(wide.segments):
        return False
    if not wide.is_subtree and (narrow.is_subtree or len(narrow.segments) != len(wide.segments)):
        return False
    return all(one in ("*", other) for one, other in zip(wide.segments, narrow.segments))
