# SPDX-License-Identifier: Apache-2.0
"""The lock that boot applies when the configuration can't be used: the built-in endpoints, for root only.

Its name identifies it, also when the policy is read back from the kernel. No configuration may use that name.
"""

from __future__ import annotations

from imds_guard.policy.builtin import default_endpoints
from imds_guard.policy.model import Identities, Lock, Policy, make_policy
from imds_guard.policy.wireserver import split_off_wireserver

EMERGENCY_LOCK = "emergency"

EMERGENCY_FAULT = (
    "emergency lock: the configuration could not be used, so the built-in endpoints are locked for everyone but root; "
    "correct it, then run systemctl restart imds-guard (or imds-guard start)"
)


def emergency_policy(dmi_text: str) -> Policy:
    """Allow only user 0 at the endpoints that are locked by default on a machine whose DMI is ``dmi_text``."""
    lock = Lock(EMERGENCY_LOCK, default_endpoints(dmi_text), Identities(users=frozenset({0})))
    return make_policy(split_off_wireserver(lock))


def is_emergency(policy: Policy) -> bool:
    """True for an emergency policy, also after ``allow`` or ``revoke`` has changed it."""
    return any(lock.name == EMERGENCY_LOCK for lock in policy.locks)
