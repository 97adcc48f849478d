# SPDX-License-Identifier: Apache-2.0
"""Makes a case that fails smaller, as long as it goes on failing: fewer locks, endpoints, IDs and groups."""

from __future__ import annotations

from collections.abc import Iterator

from imds_guard.errors import BadPolicy
from imds_guard.policy.model import Endpoint, Identities, Lock, Policy, Verdict, make_policy
from tests.vm.decisions import Difference, Scene, first_difference
from tests.vm.machine import Machine
from tests.vm.values import Attempt, Task

_ATTEMPTS = 400
"""Smaller cases that are tried; a failure is to be read, and need not be the smallest."""


def shrunk(difference: Difference, machine: Machine) -> Difference:
    """The same failure, or another one of a smaller case."""
    left = _ATTEMPTS
    while True:
        for scene in _smaller(difference.scene):
            left -= 1
            found = first_difference(scene, machine) if left > 0 else None
            if found is not None:
                difference = found
                break
        else:
            return difference


def _smaller(scene: Scene) -> Iterator[Scene]:
    if scene.other is not None:
        yield scene._replace(other=None)
    if scene.log_allowed:
        yield scene._replace(log_allowed=False)
    yield from (scene._replace(policy=policy) for policy in _smaller_policies(scene.policy))
    yield from (scene._replace(tasks=(task,)) for task in _smaller_tasks(scene.tasks[0]))
    yield from (scene._replace(attempts=(attempt,)) for attempt in _smaller_attempts(scene.attempts[0]))


def _smaller_policies(policy: Policy) -> Iterator[Policy]:
    for locks in _smaller_locks(policy.locks):
        try:
            yield make_policy(locks, policy.mode, policy.containers, policy.strict, policy.filters, policy.filter_uid)
        except BadPolicy:
            continue
    for number in range(len(policy.filters)):
        yield policy._replace(filters=policy.filters[:number] + policy.filters[number + 1 :])
    if policy.strict:
        yield policy._replace(strict=False)


def _smaller_locks(locks: tuple[Lock, ...]) -> Iterator[list[Lock]]:
    if len(locks) > 2:  # halves first: most of a large policy has nothing to do with the failure
        yield list(locks[: len(locks) // 2])
        yield list(locks[len(locks) // 2 :])
    for number, lock in enumerate(locks):
        others = [*locks[:number], *locks[number + 1 :]]
        if others:
            yield others
        yield from ([*others, smaller] for smaller in _smaller_lock(lock))


def _smaller_lock(lock: Lock) -> Iterator[Lock]:
    for number in range(len(lock.endpoints)):
        rest = lock.endpoints[:number] + lock.endpoints[number + 1 :]
        if rest:
            yield lock._replace(endpoints=rest)
    for number, endpoint in enumerate(lock.endpoints):
        for smaller in _smaller_endpoint(endpoint):
            yield lock._replace(endpoints=(*lock.endpoints[:number], smaller, *lock.endpoints[number + 1 :]))
    yield from (lock._replace(allow=smaller) for smaller in _fewer(lock.allow))
    yield from (lock._replace(deny=smaller) for smaller in _fewer(lock.deny))
    if lock.default is Verdict.ALLOW:
        yield lock._replace(default=Verdict.DENY)


def _smaller_endpoint(endpoint: Endpoint) -> Iterator[Endpoint]:
    if endpoint.tcp and endpoint.udp:
        yield endpoint._replace(tcp=())
        yield endpoint._replace(udp=())
    if len(endpoint.tcp) > 1:
        yield endpoint._replace(tcp=endpoint.tcp[:1])
        yield endpoint._replace(tcp=endpoint.tcp[1:])
    if len(endpoint.udp) > 1:
        yield endpoint._replace(udp=endpoint.udp[:1])
        yield endpoint._replace(udp=endpoint.udp[1:])


def _fewer(listed: Identities) -> Iterator[Identities]:
    yield from (listed._replace(users=part) for part in _parts(listed.users))
    yield from (listed._replace(groups=part) for part in _parts(listed.groups))


def _parts(members: frozenset[int]) -> Iterator[frozenset[int]]:
    ordered, half = sorted(members), len(members) // 2
    if ordered:
        yield frozenset()
    if half:
        yield from map(frozenset, (ordered[:half], ordered[half:], ordered[:-1]))


def _smaller_tasks(task: Task) -> Iterator[Task]:
    count = len(task.groups)
    if count:
        yield task._replace(groups=())
        yield task._replace(groups=task.groups[: count // 2])
        yield task._replace(groups=task.groups[count // 2 :])
        yield task._replace(groups=task.groups[:-1])
    if task.comm != b"a":
        yield task._replace(comm=b"a", pid=2, tgid=1, cgroup_id=3, netns_cookie=4, flags=task.flags & 0x00200000)


def _smaller_attempts(attempt: Attempt) -> Iterator[Attempt]:
    if attempt.repeat > 1:
        yield attempt._replace(repeat=1)
    if attempt.mark is not None:
        yield attempt._replace(mark=None)
    if attempt.source is not None:
        yield attempt._replace(source=None)
    if attempt.message_source is not None:
        yield attempt._replace(message_source=None)
    if attempt.device:
        yield attempt._replace(device=0)
