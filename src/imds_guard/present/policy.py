# SPDX-License-Identifier: Apache-2.0
"""A policy, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from imds_guard.identity import group_name, user_name
from imds_guard.policy.edit import without_ipv6
from imds_guard.policy.endpoint_syntax import format_endpoint
from imds_guard.policy.filters import Filter, Target, targets_of
from imds_guard.policy.model import Identities, Lock, Policy, Verdict
from imds_guard.present.wrap import MAX_SHOWN, named, wrapped
from imds_guard.text import and_more, some_of


def identities_text(who: Identities) -> str:
    """``user foo (1001), group canAccessIP (999)``; ``nobody`` where the list is empty."""
    users = [f"user {named(uid, user_name(uid))}" for uid in sorted(who.users)[: MAX_SHOWN + 1]]
    groups = [f"group {named(gid, group_name(gid))}" for gid in sorted(who.groups)[: MAX_SHOWN + 1]]
    shown = (users + groups)[:MAX_SHOWN]
    return ", ".join(shown) + and_more(len(who.users) + len(who.groups), MAX_SHOWN) or "nobody"


def lock_lines(lock: Lock) -> list[str]:
    """A lock in a few lines; the first has its name."""
    lines = [f"lock {lock.name}", *wrapped("  endpoints: ", some_of(_endpoints(lock), MAX_SHOWN))]
    if lock.deny:
        lines += wrapped("  denied:    ", identities_text(lock.deny))
    others_pass = lock.default is Verdict.ALLOW
    allowed = identities_text(lock.allow) if lock.allow else "everyone else" if others_pass else "nobody"
    lines += wrapped("  allowed:   ", allowed)
    if lock.allow and others_pass:
        lines.append("  others:    allowed")
    return lines


def policy_values(policy: Policy | None, backend: str | None = None) -> dict[str, Any] | None:
    """A policy as plain values for JSON; None where there is none."""
    if policy is None:
        return None
    return {
        "mode": policy.mode.value,
        "containers": policy.containers.value,
        "strict": policy.strict,
        "locks": [
            {
                "name": lock.name,
                "endpoints": _endpoints(lock),
                "allow": identities_values(lock.allow),
                "deny": identities_values(lock.deny),
                "default": lock.default.value,
            }
            for lock in policy.locks
        ],
        "filters": [_filter_values(one, policy, backend) for one in policy.filters],
        "filter_user": policy.filter_uid,
    }


def filter_lines(one: Filter, policy: Policy, backend: str | None = None) -> list[str]:
    """A filter in a few lines; the first has its name."""
    audit = " (audit: passes on what it would refuse)" if one.rules.audit else ""
    served = _served(one, policy, backend)
    lines = [f"filter {one.name}{audit}", *wrapped("  serves:    ", some_of(served, MAX_SHOWN))]
    lines += wrapped("  callers:   ", "everyone who is not allowed" if one.everyone else identities_text(one.who))
    rules = one.rules
    for title, texts in (("rules:", rules.sets), ("passes:", rules.allow), ("refuses:", rules.deny)):
        lines += _listed(f"  {title:11}", texts) if texts else []
    more = [f"headers as {rules.headers}"] if rules.headers else []
    more += ["a token of IMDSv2"] if rules.require_imdsv2 else []
    return [*lines, *wrapped("  requires:  ", ", ".join(more))] if more else lines


def _listed(title: str, texts: Sequence[str]) -> list[str]:
    """Items that may contain spaces; lines are broken between them alone."""
    items = [text.replace(" ", _UNBROKEN) for text in texts]
    return [line.replace(_UNBROKEN, " ") for line in wrapped(title, some_of(items, MAX_SHOWN))]


_UNBROKEN = "\x1f"
"""In place of a space while lines are broken; no rule has it."""


def _served(one: Filter, policy: Policy, backend: str | None) -> list[str]:
    """What callers reach. Iptables leads them to a filter by IPv4 alone."""
    locks = (without_ipv6(policy) if backend == "iptables" else policy).locks
    return [_target_text(target) for target in targets_of(one, locks)]


def _filter_values(one: Filter, policy: Policy, backend: str | None) -> dict[str, Any]:
    return {
        "name": one.name,
        "locks": list(one.locks),
        "serves": _served(one, policy, backend),
        "everyone": one.everyone,
        "callers": identities_values(one.who),
        "rules": list(one.rules.sets),
        "allow": list(one.rules.allow),
        "deny": list(one.rules.deny),
        "headers": one.rules.headers,
        "user_agents": list(one.rules.user_agents),
        "require_imdsv2": one.rules.require_imdsv2,
        "mode": "audit" if one.rules.audit else "enforce",
    }


def _target_text(target: Target) -> str:
    return f"[{target.address}]:{target.port}" if target.address.version == 6 else f"{target.address}:{target.port}"


def _endpoints(lock: Lock) -> list[str]:
    return [text for endpoint in lock.endpoints for text in format_endpoint(endpoint)]


def identities_values(who: Identities) -> dict[str, Any]:
    """Users and groups with their names, as plain values for JSON."""
    return {
        "users": [{"id": uid, "name": user_name(uid)} for uid in sorted(who.users)],
        "groups": [{"id": gid, "name": group_name(gid)} for gid in sorted(who.groups)],
    }
