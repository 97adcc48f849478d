# SPDX-License-Identifier: Apache-2.0
"""Other people's programs at our hooks: which run before ours and which behind, which keep ours out.

A program that runs before ours can send a connect elsewhere: ours never sees the address that the caller asked for. One
that runs behind ours can send a connect to a locked address, or let through what ours denied. Nobody can see from
outside whether a program does so; each counts as one that may.

A process is subject to the programs of its own cgroup first, then to those of the cgroups above, unless BPF_F_PREORDER
says otherwise (compute_effective_progs() in kernel/bpf/cgroup.c). So a program of a cgroup below that of the guard runs
before ours.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Collection, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from imds_guard.backends import Change, Neighbour
from imds_guard.backends.ebpf import abi, hooks
from imds_guard.backends.ebpf.hooks import Hook
from imds_guard.errors import GuardError, Unsupported, trying
from imds_guard.kernel import bpf
from imds_guard.kernel.bpf import Sharing
from imds_guard.kernel.cgroup import Cgroup, ancestors, descendants
from imds_guard.kernel.cgroup_names import path_of_cgroup
from imds_guard.text import count_of, escaped

MAX_WALKED = 4096
"""How many cgroups are looked at for programs that were attached without a link. Anybody can make more who has one."""


class Order(enum.Enum):
    """When a program runs."""

    BEFORE = "runs before ours"
    BEHIND = "runs behind ours"


class OtherProgram(NamedTuple):
    """A program of somebody else that runs for processes that ours judges, too."""

    hook: str
    id: int
    name: str
    order: Order
    cgroups: tuple[str, ...] = ()
    """The paths of the other cgroups to which it is attached; empty for one that is attached where ours is."""

    @property
    def fault(self) -> str:
        """The sentence for start, status and explain."""
        more = f" and {count_of(len(self.cgroups) - 1, 'more cgroup')}" if len(self.cgroups) > 1 else ""
        where = f" of {escaped(self.cgroups[0])}{more}" if self.cgroups else ""
        return f"{_named(self.id, self.name)}{where} {self.order.value} at {self.hook} and may rewrite addresses"

    @property
    def neighbour(self) -> Neighbour:
        """For who does not know programs."""
        return Neighbour(self.name, self.fault)


def _named(identity: int, name: str) -> str:
    return f"program {name or '(unnamed)'} (id {identity})"


# --- what runs beside ours --------------------------------------------------------------------------------------------


def find(cgroup: Cgroup, found: Sequence[Hook]) -> list[OtherProgram]:
    """Programs of others at the hooks where ours is attached, by hook; at each in the order in which they run.

    At some hooks there is none: at egress no program can change a packet's address.
    """
    wanted = [hook for hook in found if hook.ours is not None and hook.name not in abi.INDIFFERENT]
    below = _below(cgroup, wanted) if wanted else []
    return [
        program
        for hook in wanted
        for program in (*(one for one in below if one.hook == hook.name), *_around(cgroup, hook))
    ]


def _around(cgroup: Cgroup, hook: Hook) -> Iterator[OtherProgram]:
    """The programs of this cgroup and of those above it."""
    order, above = Order.BEFORE, None
    for program in hook.order:
        if program == hook.ours:
            order = Order.BEHIND
        elif program.version is None:
            where: tuple[str, ...] = ()
            if program not in hook.attached:
                above = _lists_above(cgroup, hook.name) if above is None else above
                where = tuple(path for path, ids in above.items() if program.id in ids) or ("a cgroup above",)
            yield OtherProgram(hook.name, program.id, program.name, order, where)


def _lists_above(cgroup: Cgroup, hook: str) -> dict[str, tuple[int, ...]]:
    attach_type = abi.HOOKS[hook].attach_type
    return {path: bpf.programs_of_cgroup(fd, attach_type).ids for path, fd in ancestors(cgroup)}


class _Place(NamedTuple):
    """A program at a hook of a cgroup below ours."""

    hook: str
    id: int
    path: str


def _below(cgroup: Cgroup, wanted: Sequence[Hook]) -> list[OtherProgram]:
    """The programs of cgroups below this one.

    Links are found by their IDs. Who attached without one is found by looking at each cgroup, which is done only where
    some program of the type has no link.
    """
    names = {
        program.id: program.name
        for program in bpf.programs_of_type(bpf.ProgType.CGROUP_SOCK_ADDR)
        if not _is_ours(program.name)
    }
    links = [link for link in bpf.cgroup_links() if link.prog_id in names] if names else []
    places = list(_of_links(cgroup, links))
    seen = {program.id for hook in wanted for program in hook.order}
    without_link = names.keys() - seen - {link.prog_id for link in links}
    if without_link:
        places += _of_lists(cgroup, [hook.name for hook in wanted], without_link)
    cgroups: dict[tuple[str, int], list[str]] = {}
    for place in places:
        cgroups.setdefault((place.hook, place.id), []).append(place.path)
    return [
        OtherProgram(hook, number, names[number], Order.BEFORE, tuple(at)) for (hook, number), at in cgroups.items()
    ]


def _is_ours(name: str) -> bool:
    return any(abi.version_in_name(hook, name) is not None for hook in abi.HOOKS)


def _of_links(cgroup: Cgroup, links: Sequence[bpf.LinkDescription]) -> Iterator[_Place]:
    hooks_by_type = {shape.attach_type: name for name, shape in abi.HOOKS.items()}
    for link in links:
        hook = hooks_by_type.get(link.attach_type)
        path = path_of_cgroup(cgroup.fd, link.cgroup_id) if hook is not None and link.cgroup_id else None
        if hook is not None and path is not None and path != "/":
            yield _Place(hook, link.prog_id, cgroup.path.rstrip("/") + path)


def _of_lists(cgroup: Cgroup, names: Sequence[str], wanted: AbstractSet[int]) -> Iterator[_Place]:
    for path, fd in descendants(cgroup, MAX_WALKED):
        for hook in names:
            try:
                ids = bpf.attached_programs(fd, abi.HOOKS[hook].attach_type)
            except OSError:  # the cgroup is being removed
                continue
            for identity in wanted & set(ids):
                yield _Place(hook, identity, path)


# --- the first place --------------------------------------------------------------------------------------------------


def put_first(cgroup: Cgroup, folder: str) -> Change:
    """Gives our programs the first place of the cgroup's list, where they have another and the kernel can order them.

    For a moment each runs twice, never not at all. The policy is in force all the time, so a failure is a warning.
    """
    done: list[str] = []
    try:
        for hook in hooks.inspect(cgroup, folder):
            if (
                hook.ours is not None
                and not hook.is_first
                and hook.name not in abi.INDIFFERENT
                and _put_first(hook, cgroup, folder)
            ):
                done.append(hook.name)
    except GuardError as error:
        return Change(_moved(done), (str(error),))
    return Change(_moved(done))


def _moved(done: Sequence[str]) -> tuple[str, ...]:
    return (f"put ours in front of other programs at {', '.join(done)}",) if done else ()


def _put_first(hook: Hook, cgroup: Cgroup, folder: str) -> bool:
    """False where the kernel can't, and where our program was replaced meanwhile."""
    fd = None if hook.ours is None else bpf.program_by_id(hook.ours.id)
    if fd is None:
        return False
    try:
        with trying(f"putting our program first at {hook.name} of {cgroup.path}", "it is attached as before"):
            return hooks.attach_anew(hook.name, fd, cgroup, folder, only_first=True)
    finally:
        os.close(fd)


# --- what keeps ours out ----------------------------------------------------------------------------------------------


def require_place(cgroup: Cgroup, names: Collection[str]) -> None:
    """Raises Unsupported when the kernel would not let us attach a program to one of these hooks.

    It would answer EPERM, like to somebody without privilege: hierarchy_allows_attach() and __cgroup_bpf_attach() in
    kernel/bpf/cgroup.c.
    """
    for hook in names:
        with hooks.asking(f"what is attached to {cgroup.path} at {hook}"):
            own = bpf.programs_of_cgroup(cgroup.fd, abi.HOOKS[hook].attach_type)
        if own.ids and own.sharing is not Sharing.MULTI:
            raise _refusal(cgroup, hook, cgroup.path, own.ids[0])
        if len(own.ids) >= bpf.MAX_PROGRAMS:
            raise Unsupported(
                f"looking at the hook {hook} of {cgroup.path}: {len(own.ids)} programs are attached, and the kernel "
                "allows no more (bpftool cgroup show lists them)"
            )
        _require_place_below(cgroup, hook)


def _require_place_below(cgroup: Cgroup, hook: str) -> None:
    """The nearest cgroup above that has programs decides."""
    for path, fd in ancestors(cgroup):
        with hooks.asking(f"what is attached to {path} at {hook}"):
            above = bpf.programs_of_cgroup(fd, abi.HOOKS[hook].attach_type)
        if above.ids:
            if above.sharing is Sharing.EXCLUSIVE:
                raise _refusal(cgroup, hook, path, above.ids[0])
            return


def _refusal(cgroup: Cgroup, hook: str, path: str, identity: int) -> GuardError:
    elsewhere = "; the iptables backend can serve instead" if cgroup.is_root else ""
    return Unsupported(
        f"looking at the hook {hook} of {cgroup.path}: {_described(identity)} is attached to {path} without "
        "BPF_F_ALLOW_MULTI, so the kernel allows no other beside it; whoever attached it has to add that flag, or to "
        f"detach it (bpftool cgroup detach){elsewhere}"
    )


def _described(identity: int) -> str:
    """The program, and who loaded it."""
    fd = bpf.program_by_id(identity)
    if fd is None:
        return _named(identity, "")
    try:
        found = bpf.describe_program(fd)
    finally:
        os.close(fd)
    return f"{_named(identity, found.name)}, which user {found.uid} loaded,"


def displaced(cgroup: Cgroup, names: Collection[str]) -> list[str]:
    """Sentences about programs that no longer run for the processes of this cgroup, since ours is attached.

    They are attached above it with BPF_F_ALLOW_OVERRIDE. A failure is a sentence, too: the policy is in force.
    """
    try:
        with trying(f"looking for programs above {cgroup.path}", "the policy is in force"):
            return [sentence for hook in names for sentence in _displaced(cgroup, hook)]
    except GuardError as error:
        return [str(error)]


def _displaced(cgroup: Cgroup, hook: str) -> Iterator[str]:
    for path, fd in ancestors(cgroup):
        above = bpf.programs_of_cgroup(fd, abi.HOOKS[hook].attach_type)
        if above.ids and above.sharing is Sharing.OVERRIDE:
            yield (
                f"{_described(above.ids[0])} runs no more at {hook} for {cgroup.path}: it is attached to {path} with "
                "BPF_F_ALLOW_OVERRIDE, so ours runs in its place"
            )
        if above.ids:
            return
