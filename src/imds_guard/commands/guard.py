# SPDX-License-Identifier: Apache-2.0
"""What the commands do, without a word about options or terminals."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Callable, NamedTuple

from imds_guard.backends import Backend, choose
from imds_guard.commands.capabilities import REQUIRED
from imds_guard.errors import BadPolicy, GuardError, NotPermitted, Unsupported, UsageError
from imds_guard.kernel import lockfile
from imds_guard.kernel.privileges import missing_capabilities
from imds_guard.policy.emergency import FAULT as EMERGENCY_FAULT
from imds_guard.policy.emergency import is_emergency
from imds_guard.policy.model import (
    Caller,
    Decision,
    Destination,
    Endpoint,
    Identities,
    Lock,
    Mode,
    Policy,
    Protocol,
    Verdict,
    decide,
    has_port,
)

# The rest is imported where it is used, for the sake of the start-up time: few commands need any of it.
if TYPE_CHECKING:
    from imds_guard.backends.ebpf import State
    from imds_guard.backends.forwarded import Forwarded
    from imds_guard.commands import preflight
    from imds_guard.commands.demo import DemoResult
    from imds_guard.connections.values import Sweep
    from imds_guard.export import Exported

UNSUPPORTED = Unsupported.exit_status

Tell = Callable[[str], None]
"""Takes a line about what is being done now, for someone who waits at a terminal."""


class Place(NamedTuple):
    """Where and how to enforce: ``backend`` is ``auto``, ``ebpf`` or ``iptables``."""

    backend: str = choose.AUTO
    cgroup: str | None = None
    resolve_groups: bool = False
    forwarded: str | None = None
    """``drop``, ``leave``, or None for what suits the machine."""
    keep_existing: bool = False
    """Connections that the policy does not allow stay open."""


class Outcome(NamedTuple):
    """What a change came to. ``lines`` tell what was done, ``warnings`` what to look at."""

    backend: str
    policy: Policy
    lines: list[str]
    warnings: list[str]
    shut_out: list[preflight.ShutOut]
    existing: Sweep | None = None
    """Connections that were there before; None where nobody lost a right."""

    @property
    def deeds(self) -> list[str]:
        """What was done, with the connections that were cut, by number."""
        cut = len(self.existing.cut) if self.existing is not None else 0
        return [*self.lines, f"cut {cut} open connection{'' if cut == 1 else 's'}"] if cut else list(self.lines)


# --- start and stop -------------------------------------------------------------------------------------------------


@contextmanager
def one_at_a_time(cgroup: str | None) -> Iterator[None]:
    """Commands that change something wait for each other: what one has read, no other changes meanwhile."""
    name = of_the_machine = "command"
    if cgroup is not None:
        # What is wrong with the cgroup, the backend says.
        with suppress(OSError):
            name = f"command-{os.stat(cgroup).st_ino}"
    with lockfile.exclusive(name), _reading_tables_once(cgroup):
        try:
            yield
        finally:
            if name != of_the_machine:
                lockfile.forget(name)


def _reading_tables_once(cgroup: str | None) -> AbstractContextManager[None]:
    """A guard of a cgroup has nothing to do with iptables."""
    if cgroup is not None:
        return nullcontext()
    from imds_guard.backends.iptables.tables import reading_once  # noqa: PLC0415 -- start-up time

    return reading_once()


def start(policy: Policy, place: Place, tell: Tell) -> Outcome:
    """Puts ``policy`` in force with the backend that fits, then takes any other backend's rules away."""
    with one_at_a_time(place.cgroup):
        return start_now(policy, place, tell)


def start_now(policy: Policy, place: Place, tell: Tell) -> Outcome:
    """As start(), for one who holds one_at_a_time() already."""
    if place.cgroup is not None and place.forwarded is not None:
        raise UsageError("--forwarded is about the packets of the whole machine: it does not go with --cgroup")
    names = choose.candidates(place.backend, place.cgroup)
    before = choose.running(place.cgroup)
    if place.cgroup is None:
        forwarded().check(policy, place.forwarded)
    reasons: list[choose.Verdict] = []
    for name in names:
        verdict = choose.examine(policy, [name], place.cgroup, place.resolve_groups)[0]
        if verdict.refusal is None:
            tell(_working(verdict.backend, before))
            try:
                lines = verdict.backend.apply(policy)
            except Unsupported as error:
                reasons.append(choose.Verdict(verdict.backend, error))
                continue
            lines += _remove_others(before, name)
            lines += forwarded().settle(policy, place.forwarded) if place.cgroup is None else []
            why = [f"{other.backend.name} can't be used: {other.refusal}" for other in reasons]
            return _outcome(verdict.backend, policy, lines, why, _sweep(verdict.backend, policy, place))
        reasons.append(verdict)
    raise choose.refused(reasons)


def forwarded() -> Forwarded:
    """The rules for what the machine forwards. A guard of a cgroup has none."""
    from imds_guard.backends.forwarded import Forwarded  # noqa: PLC0415

    return Forwarded()


def _working(backend: Backend, before: dict[str, Backend]) -> str:
    if backend.name == "ebpf" and "ebpf" not in before:
        return "compiling the eBPF programs and attaching them ..."
    return f"putting the policy in force ({backend.name}) ..."


def _remove_others(before: dict[str, Backend], name: str) -> list[str]:
    """Only now that the new backend holds: two hold for a moment, never none."""
    return [line for other, backend in before.items() if other != name for line in backend.remove()]


def _sweep(backend: Backend, policy: Policy, place: Place) -> Sweep:
    """Only now that the policy is in force: nobody who is cut comes back. iptables judges one namespace."""
    from imds_guard.connections import cut as connections  # noqa: PLC0415
    from imds_guard.connections import values as sweeps  # noqa: PLC0415
    from imds_guard.connections.find import Scope  # noqa: PLC0415

    scope = Scope(place.cgroup, every_namespace=backend.name == "ebpf")
    kept = sweeps.KEPT if place.keep_existing else None
    return connections.sweep(policy, scope, sweeps.AUDIT if policy.mode is Mode.AUDIT else kept)


def _outcome(backend: Backend, policy: Policy, lines: list[str], why: list[str], existing: Sweep | None) -> Outcome:
    warnings = [line[len("warning: ") :] for line in lines if line.startswith("warning: ")]
    said = [line for line in lines if not line.startswith("warning: ")]
    notes = getattr(backend, "notes", None)
    if notes is not None:
        warnings += notes(policy)
    return Outcome(backend.name, policy, said, why + warnings, _shut_out(policy), existing)


def _shut_out(policy: Policy) -> list[preflight.ShutOut]:
    from imds_guard.commands import preflight  # noqa: PLC0415

    return preflight.shut_out(policy)


def stop(cgroup: str | None) -> list[str]:
    """Takes everything of ours out of the kernel. Returns what was done.

    Raises Unsupported when nothing was found and eBPF could not be asked: then something of it may be there.
    """
    with one_at_a_time(cgroup):
        lines: list[str] = []
        unasked: Unsupported | None = None
        for name in choose.candidates(choose.AUTO, cgroup):
            try:
                lines += choose.make(name, cgroup).remove()
            except Unsupported as error:
                unasked = error if name == "ebpf" else unasked
        if cgroup is None:
            lines += forwarded().remove()
    if unasked is not None and not lines:
        raise unasked
    return lines


# --- changes to what is running -------------------------------------------------------------------------------------


def the_running(cgroup: str | None) -> tuple[Backend, Policy]:
    """The backend that enforces, and its policy. Raises GuardError when there is none, or it can't be read."""
    found = _running(cgroup)
    if not found:
        raise GuardError("looking for the policy in force: imds-guard is not active; run imds-guard start first")
    for backend in found.values():
        policy = backend.read()
        if policy is not None:
            return backend, policy
    faults = "; ".join(fault for backend in found.values() for fault in backend.faults())
    raise GuardError(f"reading the policy in force: {faults or 'it is not whole'}; run imds-guard start to repair it")


def _running(cgroup: str | None) -> dict[str, Backend]:
    """As choose.running(). Where nothing is found and eBPF can't be asked, that is an error, not "nothing"."""
    found = choose.running(cgroup)
    if not found:
        choose.make("ebpf", cgroup).in_force()
    return found


def change(edited: Callable[[Policy], Policy], place: Place, *, takes_away: bool) -> Outcome:
    """Puts what ``edited`` makes of the running policy in force, with the backend that runs.

    Where that ``takes_away`` rights, connections that rest on them are looked for.
    """
    with one_at_a_time(place.cgroup):
        return _change(edited, place, takes_away)


def _change(edited: Callable[[Policy], Policy], place: Place, takes_away: bool) -> Outcome:
    cgroup = place.cgroup
    backend, policy = the_running(cgroup)
    wanted = edited(policy)
    if wanted == policy:
        return Outcome(backend.name, policy, ["the policy says so already"], [], [])
    lines = backend.apply(wanted) if not hasattr(backend, "change") else backend.change(wanted)
    if cgroup is None:
        lines += forwarded().follow(wanted)
    return _outcome(backend, wanted, lines, [], _sweep(backend, wanted, place) if takes_away else None)


Accept = Callable[[Policy], None]
"""Raises GuardError for a policy that must not come into force."""


def allow(who: Identities, endpoint: Endpoint | None, cgroup: str | None, accept: Accept) -> Outcome:
    """Adds to the allowlist of the running policy."""
    from imds_guard.policy import edit  # noqa: PLC0415

    def edited(policy: Policy) -> Policy:
        wanted = edit.allow(policy, who, endpoint)
        _check_not_denied(wanted, who)
        accept(wanted)
        return wanted

    return change(edited, Place(cgroup=cgroup), takes_away=False)


def _check_not_denied(policy: Policy, who: Identities) -> None:
    for lock in policy.locks:
        for kind, listed, asked in (
            ("user", lock.deny.users & lock.allow.users, who.users),
            ("group", lock.deny.groups & lock.allow.groups, who.groups),
        ):
            if listed & asked:
                raise BadPolicy(
                    f"allowing {kind} {min(listed & asked)}: it is on the deny list of lock {lock.name!r}, and deny "
                    "lists win; start again without it there"
                )


def revoke(
    who: Identities, endpoint: Endpoint | None, cgroup: str | None, accept: Accept, keep_existing: bool = False
) -> Outcome:
    """Takes off the allowlist of the running policy."""
    from imds_guard.policy import edit  # noqa: PLC0415

    def edited(policy: Policy) -> Policy:
        wanted = edit.revoke(policy, who, endpoint)
        accept(wanted)
        return wanted

    return change(edited, Place(cgroup=cgroup, keep_existing=keep_existing), takes_away=True)


def lock_down(ip: str, users: list[int], place: Place, tell: Tell) -> Outcome:
    """What ``ip-lockdown`` does: adds to the policy in force, or begins one with the best backend."""
    from imds_guard.policy import lockdown  # noqa: PLC0415

    with one_at_a_time(place.cgroup):
        if choose.running(place.cgroup):
            outcome = _change(lambda policy: lockdown.lockdown(policy, ip, users), place, takes_away=True)
        else:
            outcome = start_now(lockdown.lockdown(None, ip, users), place, tell)
    if outcome.policy.mode is Mode.AUDIT:
        outcome.warnings.append("the policy in force is in audit mode, which denies nobody")
    return outcome


def check_saving(policy: Policy, without_root: bool, path: str) -> None:
    """Raises unless save() would succeed and no installed metadata client be shut out at the next boot."""
    from imds_guard.config.store import check_saving_to  # noqa: PLC0415

    if is_emergency(policy):
        raise BadPolicy("saving the policy in force: it is the emergency lock; correct the configuration instead")
    check_saving_to(path)
    check_next_boot(policy, without_root)


def check_next_boot(policy: Policy, without_root: bool) -> None:
    """Raises BadPolicy when an installed metadata client would be shut out at the next boot."""
    from imds_guard.commands import preflight  # noqa: PLC0415

    shut_out = [] if without_root else preflight.installed_shut_out(policy)
    if shut_out:
        names = "; ".join(f"{one.name} {one.why}" for one in shut_out)
        raise BadPolicy(
            f"keeping the policy for the next boot: it would shut out {names}; allow the account, or add --without-root"
        )


def save(policy: Policy, place: Place, path: str) -> None:
    """Writes the policy that is in force for the next boot."""
    from imds_guard.config.store import Config, load_config, save_config  # noqa: PLC0415

    try:
        kept = load_config(path, use_stored_ids=True) if os.path.exists(path) else Config(policy)
        cgroup = place.cgroup or kept.cgroup
        wanted = kept._replace(
            policy=policy,
            backend=kept.backend if place.backend == choose.AUTO else place.backend,
            cgroup=cgroup,
            forwarded=None if cgroup is not None else place.forwarded or kept.forwarded,
            resolve_groups=place.resolve_groups or kept.resolve_groups,
        )
        save_config(wanted, path)
    except GuardError as error:
        raise GuardError(f"saving the policy, which is in force until the next boot: {error}") from error


def demo(backend: str) -> DemoResult:
    """The demonstration, with the first backend that works here."""
    from imds_guard.commands.demo import run_demo  # noqa: PLC0415

    verdicts = choose.examine(None, choose.candidates(backend, None), None, False)
    chosen = next((verdict.backend.name for verdict in verdicts if verdict.refusal is None), None)
    if chosen is None:
        raise choose.refused(verdicts)
    if chosen == "ebpf":
        return run_demo(lambda cgroup: choose.make("ebpf", cgroup))
    return run_demo(lambda _: choose.make("iptables"), inside=True)


def export(policy: Policy, form: str) -> Exported:
    """The policy in another tool's words."""
    from imds_guard.export import export as export_policy  # noqa: PLC0415

    return export_policy(policy, form)


# --- looking --------------------------------------------------------------------------------------------------------


class Status(NamedTuple):
    """What the kernel holds. ``backend`` is None when nothing is active."""

    backend: str | None
    policy: Policy | None
    faults: list[str]
    detail: State | None = None
    """Under eBPF."""

    @property
    def emergency(self) -> bool:
        """True when what is in force is the lock that boot puts on where it can't have the configuration's policy."""
        return self.policy is not None and is_emergency(self.policy)


def status(cgroup: str | None) -> Status:
    """Reads back what is in force."""
    with _reading_tables_once(cgroup):
        return _status(cgroup)


def _status(cgroup: str | None) -> Status:
    found = _running(cgroup)
    # One look at eBPF, for what is told of it to be of one moment.
    detail = found["ebpf"].state() if "ebpf" in found else None  # type: ignore[attr-defined]
    faults = list(detail.faults) if detail is not None else []
    faults += [fault for name, backend in found.items() if name != "ebpf" for fault in backend.faults()]
    if len(found) > 1:
        faults.append(f"{' and '.join(found)} are both in force: a change was interrupted, run imds-guard start")
    chosen = next(iter(found), None)
    policy = detail.policy if detail is not None else _read(next(iter(found.values()), None))
    if policy is not None and is_emergency(policy):
        faults.insert(0, EMERGENCY_FAULT)
    if cgroup is None:
        faults += _forwarding_faults(policy)
    return Status(chosen, policy, faults, detail)


def _read(backend: Backend | None) -> Policy | None:
    """None for what can't be read as a policy, where faults() says what is wrong, and where nothing is in force."""
    try:
        return backend.read() if backend is not None else None
    except GuardError:
        return None


def _forwarding_faults(policy: Policy | None) -> list[str]:
    try:
        return forwarded().faults(policy)
    except Unsupported:
        return []


class Checked(NamedTuple):
    """What each backend says, in the order in which they are taken, and who would be shut out."""

    verdicts: list[choose.Verdict]
    shut_out: list[preflight.ShutOut]
    existing: Sweep | None = None
    """Connections that start would cut; None without a policy."""

    @property
    def taken(self) -> str | None:
        """The backend that start would take."""
        return next((verdict.backend.name for verdict in self.verdicts if verdict.refusal is None), None)


def check(policy: Policy | None, place: Place) -> Checked:
    """Asks each backend; changes nothing. With a policy, also who would be shut out and which connections be cut."""
    names = choose.candidates(place.backend, place.cgroup)
    verdicts = choose.examine(policy, names, place.cgroup, place.resolve_groups)
    if policy is None:
        return Checked(verdicts, [])
    return Checked(verdicts, _shut_out(policy), _look(policy, place))


def _look(policy: Policy, place: Place) -> Sweep:
    from imds_guard.connections import cut as connections  # noqa: PLC0415
    from imds_guard.connections.find import Scope  # noqa: PLC0415

    return connections.look(policy, Scope(place.cgroup, every_namespace=place.backend != "iptables"))


def require_root(command: str) -> None:
    """Raises NotPermitted unless the effective user is root, with the capabilities that the command takes."""
    if os.geteuid() != 0:
        raise NotPermitted(f"imds-guard {command}: only root may; run it with sudo")
    lacking = missing_capabilities(REQUIRED.get(command, ()))
    if lacking:
        raise NotPermitted(
            f"imds-guard {command}: this process is root without {' and '.join(lacking)}; a unit, a container or a "
            "security module took that away, run it where it is not"
        )


def explain(caller: Caller, endpoint: Endpoint, cgroup: str | None) -> tuple[Decision, Destination]:
    """What the policy in force says to a caller who connects to one address; to port 80 where that is left open."""
    network = endpoint.network
    if network.prefixlen != network.max_prefixlen:
        raise UsageError(f"explaining {network}: a connect goes to one address; name one")
    protocol = Protocol.TCP if endpoint.tcp else Protocol.UDP
    ports = endpoint.ports(protocol)
    destination = Destination(network.network_address, 80 if has_port(ports, 80) else ports[0][0], protocol)
    _, policy = the_running(cgroup)
    return decide(policy, caller, destination), destination


def allows_nobody(lock: Lock) -> bool:
    """True for a lock that denies everyone."""
    return not lock.allow and lock.default is Verdict.DENY
