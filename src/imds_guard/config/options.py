# SPDX-License-Identifier: Apache-2.0
"""Makes a Policy from options of the command line."""

from __future__ import annotations

from collections.abc import Sequence

from imds_guard.errors import UsageError
from imds_guard.identity import create_group, group_id, is_missing_group, user_id
from imds_guard.policy.builtin import default_endpoints, preset_endpoints
from imds_guard.policy.endpoint_syntax import parse_endpoint
from imds_guard.policy.model import Endpoint, Identities, Lock, Mode, Policy, Verdict, make_policy
from imds_guard.policy.wireserver import split_off_wireserver


def policy_from_options(
    *,
    users: Sequence[str] = (),
    groups: Sequence[str] = (),
    deny_users: Sequence[str] = (),
    deny_groups: Sequence[str] = (),
    ips: Sequence[str] = (),
    presets: Sequence[str] = (),
    nobody: bool = False,
    mode: Mode = Mode.ENFORCE,
    containers: Verdict = Verdict.DENY,
    strict: bool = False,
    dmi_text: str = "",
    create_groups: bool = False,
) -> Policy:
    """One lock (``default``) for all endpoints, and a lock of its own for the WireServer (``wireserver``).

    Without ``ips`` and ``presets``, the built-in endpoints of this machine are locked. With ``create_groups``, unknown
    ``groups`` are created, after all other arguments have been checked. Raises UsageError, BadPolicy.
    """
    _check_who(bool(users or groups), bool(deny_users or deny_groups), nobody)
    endpoints = _endpoints(ips, presets, dmi_text)
    allowed_users = frozenset(map(user_id, users))
    deny = Identities(frozenset(map(user_id, deny_users)), frozenset(map(group_id, deny_groups)))
    missing = [name for name in groups if create_groups and is_missing_group(name)]
    known = [group_id(name) for name in groups if name not in missing]
    default = Verdict.DENY if users or groups or nobody else Verdict.ALLOW
    lock = Lock("default", endpoints, Identities(allowed_users, frozenset(known)), deny, default)
    split_off_wireserver(lock)  # raises before a group is created
    created = [create_group(name) for name in missing]
    lock = lock._replace(allow=Identities(allowed_users, frozenset(known + created)))
    return make_policy(split_off_wireserver(lock), mode, containers, strict)


def _check_who(allowlist: bool, denylist: bool, nobody: bool) -> None:
    if nobody and allowlist:
        raise UsageError("--nobody contradicts --user and --group")
    if not (allowlist or denylist or nobody):
        raise UsageError("nobody would be allowed: name a --group or a --user, or say --nobody if that is meant")


def _endpoints(ips: Sequence[str], presets: Sequence[str], dmi_text: str) -> tuple[Endpoint, ...]:
    if not ips and not presets:
        return default_endpoints(dmi_text)
    found = [parse_endpoint(ip) for ip in ips]
    for name in presets:
        found += preset_endpoints(name, dmi_text)
    return tuple(found)
