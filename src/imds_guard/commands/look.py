# SPDX-License-Identifier: Apache-2.0
"""The commands that read the state of the guard and change nothing: status, check, explain."""

from __future__ import annotations

import enum
import os
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Callable, NamedTuple

from imds_guard import CONFIG_PATH, identity
from imds_guard.backends import Backend, Neighbour, choose
from imds_guard.commands.options import GuardOptions
from imds_guard.commands.place import Place, place_of
from imds_guard.commands.turn import UNTIL, lock_name
from imds_guard.errors import GuardError, NothingLocked, UsageError
from imds_guard.kernel import lockfile
from imds_guard.policy.decide import Caller, Decision, Destination, decide, decide_by_rules
from imds_guard.policy.emergency import EMERGENCY_FAULT, is_emergency
from imds_guard.policy.model import Endpoint, Policy, Protocol
from imds_guard.policy.ports import has_port

# The rest is imported where it is used: start-up time, few commands need any of it.
if TYPE_CHECKING:
    from imds_guard.backends.ebpf import State
    from imds_guard.backends.forwarded import Forwarded, ForwardingState
    from imds_guard.commands.preflight import Preflight
    from imds_guard.commands.temporary import Right
    from imds_guard.connections.values import CutResult


def active_policy(cgroup: str | None) -> tuple[Backend, Policy]:
    """The backend that enforces, and its policy. Raises GuardError where nothing is active or readable."""
    active = _active(cgroup)
    if not active:
        raise NothingLocked("nothing is locked: run imds-guard start first")
    for backend in active.values():
        policy = backend.read()
        if policy is not None:
            return backend, policy
    faults = "; ".join(fault for backend in active.values() for fault in backend.faults())
    raise GuardError(f"reading the policy in force: {faults or 'it is not whole'}; run imds-guard start to repair it")


def _active(cgroup: str | None) -> dict[str, Backend]:
    """The backends that enforce something, by name.

    Where none is found and eBPF can't be asked, that is an error: "nothing" could be wrong.
    """
    found = choose.running(cgroup)
    if not found:
        choose.make("ebpf", cgroup).in_force()
    return found


def forwarded() -> Forwarded:
    """The rules for packets that the machine forwards. They belong to the machine's guard, not to a cgroup's."""
    from imds_guard.backends.forwarded import Forwarded  # noqa: PLC0415

    return Forwarded()


def reading_tables_once(cgroup: str | None) -> AbstractContextManager[None]:
    """Within the block iptables' tables are read once. A guard of a cgroup uses no iptables."""
    if cgroup is not None:
        return nullcontext()
    from imds_guard.backends.iptables.tables import reading_once  # noqa: PLC0415 -- start-up time

    return reading_once()


# --- status ---------------------------------------------------------------------------------------------------------


class Status(NamedTuple):
    """What the kernel enforces now."""

    backend: str | None
    """None when nothing is active."""
    policy: Policy | None
    """None when nothing is active, and when the policy can't be read; then ``faults`` says why."""
    faults: list[str]
    ebpf: State | None = None
    """Hooks and counters, under eBPF."""
    known: tuple[Neighbour, ...] = ()
    """What others have beside ours, and the configuration knows: no faults."""
    forwarded: ForwardingState | None = None
    """What becomes of forwarded packets; None for the guard of a cgroup, and when nothing is active."""
    temporary: tuple[Right, ...] = ()
    """What allow --for has allowed. It ends by itself."""
    notes: tuple[str, ...] = ()
    """What is not wrong, and may surprise somebody later: a sentence each."""

    @property
    def emergency(self) -> bool:
        """True for the emergency lock, which boot puts in force where the configuration can't be used."""
        return self.policy is not None and is_emergency(self.policy)


def status(cgroup: str | None, config: str = CONFIG_PATH) -> Status:
    """Reads back from the kernel what is in force. ``config`` is the file whose ``known_programs`` are no fault."""
    with reading_tables_once(cgroup):
        return _status(cgroup, config)


def _status(cgroup: str | None, config: str) -> Status:
    active = {name: backend.describe() for name, backend in _active(cgroup).items()}
    neighbours = [neighbour for held in active.values() for neighbour in held.neighbours]
    unknown, known = split_known(neighbours, config)
    faults = [fault for held in active.values() for fault in held.faults] + [one.fault for one in unknown]
    if len(active) > 1:
        faults.append(f"{' and '.join(active)} are both in force: a change was interrupted, run imds-guard start")
    name, first = next(iter(active.items()), (None, None))
    policy = first.policy if first is not None else None
    if policy is not None and is_emergency(policy):
        faults.insert(0, EMERGENCY_FAULT)
    if policy is not None and policy.filters:
        faults += _filter_faults(cgroup)
    forwarding = forwarded().describe(policy) if cgroup is None else None
    if forwarding is not None:
        faults += forwarding.faults
    if cgroup is None or not active:
        faults += _orphan_faults()
    state = first.ebpf if first is not None else None
    forwarding = forwarding if policy is not None else None
    notes = mode_notes(policy, config) if policy is not None else ()
    temporary: tuple[Right, ...] = ()
    try:
        temporary = temporary_rights(cgroup)
    except GuardError as error:
        faults.append(str(error))
    return Status(name, policy, faults, state, tuple(known), forwarding, temporary, notes)


def temporary_rights(cgroup: str | None) -> tuple[Right, ...]:
    """What allow --for has allowed, and when it ends."""
    name = lock_name(cgroup)
    if not os.path.exists(os.path.join(lockfile.FOLDER, f"{name}.{UNTIL}")):
        return ()
    from imds_guard.commands.temporary import rights  # noqa: PLC0415 -- start-up time

    return tuple(rights(name))


def mode_notes(policy: Policy, config: str = CONFIG_PATH) -> tuple[str, ...]:
    """A sentence where the file ``config`` says another mode than the one in force: that one comes back."""
    if is_emergency(policy) or not os.path.exists(config):
        return ()
    from imds_guard.config.boot_file import mode_of  # noqa: PLC0415 -- start-up time

    said = mode_of(config)
    if said is None or said is policy.mode:
        return ()
    return (
        f'{config} says mode = "{said.value}": that comes into force when it is loaded again (boot, reload, restart, '
        f"upgrade); imds-guard mode {policy.mode.value} --save keeps what is in force",
    )


def split_known(
    neighbours: Sequence[Neighbour], config: str = CONFIG_PATH, also: Collection[str] = ()
) -> tuple[list[Neighbour], list[Neighbour]]:
    """Those that neither ``known_programs`` of the file ``config`` nor ``also`` names, and the others."""
    if not neighbours:
        return [], []  # no configuration is read: start-up time
    from imds_guard.config.boot_file import known_programs_of  # noqa: PLC0415
    from imds_guard.config.known_programs import is_known  # noqa: PLC0415

    names = known_programs_of(config).union(also)
    known = [one for one in neighbours if is_known(one.name, names)]
    return [one for one in neighbours if one not in known], known


def _filter_faults(cgroup: str | None) -> list[str]:
    from imds_guard.commands import filter_places  # noqa: PLC0415 -- start-up time: most policies have no filters

    return filter_places.faults(cgroup)


def _orphan_faults() -> list[str]:
    """Guards whose cgroup is gone.

    Where a cgroup has a guard that is in force, others' are not its faults.
    """
    from imds_guard.backends.ebpf import other_guards  # noqa: PLC0415

    return [orphan.fault for orphan in other_guards.orphans()]


# --- check and explain ----------------------------------------------------------------------------------------------


class CheckResult(NamedTuple):
    """Each backend's answer in the order of preference, and what start would cause: nobody knows without a policy.

    ``file`` is the configuration that the policy is from, and which is fine.
    """

    backends: list[choose.BackendCheck]
    shut_out: Preflight
    existing: CutResult | None = None
    file: str | None = None
    policy: Policy | None = None

    @property
    def chosen(self) -> str | None:
        """The backend that start would take."""
        return next((checked.backend.name for checked in self.backends if checked.refusal is None), None)


def check(policy: Policy | None, options: GuardOptions, file: str | None = None) -> CheckResult:
    """Asks each backend; changes nothing. With a policy, also who would be shut out and which connections be cut."""
    names = choose.candidates(options.backend, options.cgroup)
    backends = choose.examine(policy, names, options.cgroup, options.resolve_groups)
    from imds_guard.commands import preflight  # noqa: PLC0415

    if policy is None:
        return CheckResult(backends, preflight.Preflight())
    return CheckResult(backends, preflight.shut_out(policy), _existing(policy, options), file, policy)


def _existing(policy: Policy, options: GuardOptions) -> CutResult:
    from imds_guard.backends.ebpf.filter_listeners import listeners_under  # noqa: PLC0415
    from imds_guard.connections.cut import find_denied  # noqa: PLC0415
    from imds_guard.connections.find import Scope  # noqa: PLC0415

    scope = Scope(options.cgroup, every_namespace=options.backend != "iptables")
    return find_denied(policy, scope, listeners_under(policy, options.cgroup))


class Older(enum.Enum):
    """A process keeps the groups that it was started with. What a new one of its user would get now."""

    PASSES = "would-pass"
    DENIED = "would-be-denied"


class Explanation(NamedTuple):
    """How a connect is judged. ``place`` is known of a process alone.

    ``neighbours``: what others have beside ours that may change the answer, a sentence each. ``advice`` is what would
    let a denied caller through.
    """

    decision: Decision
    destination: Destination
    place: Place
    neighbours: list[str]
    advice: str | None = None
    older: Older | None = None


def explain(caller: Caller, endpoint: Endpoint, cgroup: str | None, pid: int | None = None) -> Explanation:
    """How the policy in force judges a connect of ``caller`` to one address; port 80 where no port is given.

    ``pid`` is the process whose credentials these are.
    """
    network = endpoint.network
    if network.prefixlen != network.max_prefixlen:
        raise UsageError(f"explaining {network}: a connect goes to one address; name one")
    protocol = Protocol.TCP if endpoint.tcp else Protocol.UDP
    ports = endpoint.ports(protocol)
    destination = Destination(network.network_address, 80 if has_port(ports, 80) else ports[0][0], protocol)
    backend, policy = active_policy(cgroup)
    place = Place()
    if pid is not None:
        place = place_of(pid, policy, forwarded() if cgroup is None else None)
    neighbours = [neighbour.fault for neighbour in backend.neighbours()]
    if backend.name == "iptables":
        neighbours += backend.faults()  # rules of others are faults there
    judge = decide_by_rules if backend.name == "iptables" else decide
    decision = judge(policy, caller, destination)
    advice = None if decision.allowed else _advice(policy, caller, decision, place_text(policy, destination, cgroup))
    older = None if pid is None else _older(lambda now: judge(policy, now, destination), caller, decision)
    return Explanation(decision, destination, place, neighbours, advice, older)


def place_text(policy: Policy, to: Destination, cgroup: str | None) -> str:
    """The end of a command that lets somebody in there: --ip where the locks have different lists, and --cgroup."""
    from imds_guard.policy.edit import are_alike  # noqa: PLC0415
    from imds_guard.policy.endpoint_syntax import endpoint_argument  # noqa: PLC0415
    from imds_guard.watch.advice import place as end_of_command  # noqa: PLC0415

    return end_of_command(None if are_alike(policy) else endpoint_argument(*to), cgroup)


def _advice(policy: Policy, caller: Caller, decision: Decision, where: str) -> str | None:
    from imds_guard.watch.advice import would_allow  # noqa: PLC0415
    from imds_guard.watch.process_info import NameCache  # noqa: PLC0415

    groups = next((lock.allow.groups for lock in policy.locks if lock.name == decision.lock), frozenset())
    return would_allow(decision.reason, caller.fsuid, groups, NameCache(), where)


def _older(judge: Callable[[Caller], Decision], caller: Caller, decision: Decision) -> Older | None:
    """Whether a process is judged otherwise than its user would be after a new login, for the groups of now."""
    if caller.in_container or not caller.user_namespace_is_initial or caller.kernel_thread:
        return None
    try:
        now = identity.caller_of_user(caller.fsuid)
    except GuardError:  # an ID without an account, or no answer
        return None
    passes = judge(now).allowed
    if passes == decision.allowed or now.groups == caller.groups:
        return None
    return Older.PASSES if passes else Older.DENIED
