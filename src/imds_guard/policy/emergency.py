# SPDX-License-Identifier: Apache-2.0
"""The lock that is put on at boot when nobody can tell which one was meant: the built-in endpoints, for root alone.

It is known by its name, so that whoever reads the policy back from the kernel knows what it is. No configuration may
use the name.
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
    """The built-in endpoints of a machine whose DMI holds ``dmi_text``, for user 0 alone."""
    lock = Lock(EMERGENCY_LOCK, default_endpoints(dmi_text), Identities(users=frozenset({0})))
    return make_policy(split_off_wireserver(lock))


def is_emergency(policy: Policy) -> bool:
    """True for the policy above, also after an allow or a revoke."""
    return any(lock.name == EMERGENCY_LOCK for lock in policy.locks)
