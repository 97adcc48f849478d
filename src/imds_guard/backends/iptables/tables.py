# SPDX-License-Identifier: Apache-2.0
"""Chains of our own in table filter, through iptables-save and iptables-restore. Knows rules, but no Policy.

Other people's rules are read, to know where ours stand, and never written.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, NoReturn

from imds_guard.backends.iptables.rules import Rule
from imds_guard.errors import GuardError, NotPermitted, Unsupported
from imds_guard.kernel.run import Completed, find_program, run

NFT = "nf_tables"
LEGACY = "legacy"

LOCK_WAIT_S = 10
"""How long we wait for another program that holds the xtables lock (iptables(8), -w)."""

RESTORE_TIMEOUT_S = 300

_IN_USE = {4: "/proc/self/net/ip_tables_names", 6: "/proc/self/net/ip6_tables_names"}


class LockHeld(GuardError):
    """Another program held the xtables lock for as long as we waited."""


class NoTable(Unsupported):
    """The kernel has no tables of that kind, so nothing can be in them."""


class Program(NamedTuple):
    """One of the iptables commands: its IP version, its name, and whether it writes nf_tables or legacy tables."""

    version: int
    command: str
    kind: str

    @property
    def title(self) -> str:
        """``ip6tables (nf_tables)``."""
        return f"{self.command} ({self.kind})"


class Anchor(NamedTuple):
    """A built-in chain and the chain of ours that its first rule jumps to."""

    builtin: str
    head: str

    @property
    def jump(self) -> str:
        """The jump as iptables-save prints it."""
        return f"-j {self.head}"

    def owns(self, chain: str) -> bool:
        """True for the head and every chain whose name begins with it and a dash."""
        return chain == self.head or chain.startswith(self.head + "-")


Table = Mapping[str, tuple[str, ...]]
"""Chain -> its rules as iptables-save prints them, after ``-A CHAIN``."""


def default_program(version: int, command: str = "") -> Program:
    """What ``iptables`` or ``ip6tables`` is on this machine. Raises Unsupported when it is absent or does not run."""
    command = command or {4: "iptables", 6: "ip6tables"}[version]
    return Program(version, command, _kind(command, _file(command)))


@functools.cache
def _kind(command: str, file: tuple[int, ...]) -> str:
    """Which tables a command writes. A file is asked once in the life of a process; a failure is not kept."""
    completed = run([command, "--version"])
    if completed.status != 0:
        raise Unsupported(f"{command} --version failed: {completed.complaint}")
    # "iptables v1.8.9 (nf_tables)"; before 1.8 there was no word in brackets and legacy was all there was.
    return NFT if NFT in completed.stdout else LEGACY


def _file(command: str) -> tuple[int, ...]:
    """Another one for another file, as update-alternatives(1) or an upgrade leaves it; empty when there is none."""
    path = find_program(command)
    if path is None:
        return ()
    try:
        status = os.stat(path)
    except FileNotFoundError:  # it went meanwhile
        return ()
    return (status.st_dev, status.st_ino, status.st_mtime_ns)


def other_program(program: Program) -> list[Program]:
    """The command for the other kind of tables, when it is there and its tables may hold something."""
    kind = LEGACY if program.kind == NFT else NFT
    base = {4: "iptables", 6: "ip6tables"}[program.version]
    command = f"{base}-{'legacy' if kind == LEGACY else 'nft'}"
    # iptables-legacy-save makes the table that it is asked for; one that nobody uses is not in this list.
    if kind == LEGACY and "filter" not in _legacy_tables(program.version):
        return []
    return [Program(program.version, command, kind)] if find_program(command) else []


def every_program(commands: Mapping[int, str], needed: bool) -> list[Program]:
    """Both kinds for both IP versions, the default one first; none where iptables is not installed or does not run.

    With ``needed`` rules of ours should be in force: then one that does not run is a GuardError.
    """
    every: list[Program] = []
    for version in (4, 6):
        try:
            program = default_program(version, commands[version])
            every += [program, *other_program(program)]
        except Unsupported as error:
            if needed:
                raise GuardError(
                    f"{error}; rules of imds-guard should be in force, and can't be seen or changed until it runs"
                ) from error
    return every


def put_back(error: BaseException, before: Iterable[tuple[Program, Table]], anchor: Anchor, lock_wait_s: int) -> None:
    """Our chains as they were before what ended in ``error``. Raises GuardError that tells of both if it can't."""
    try:
        for program, chains in before:
            replace(program, anchor, chains, lock_wait_s)
    except GuardError as second:
        raise GuardError(
            f"{error}; not all of the rules from before could be put back ({second}): run the command again"
        ) from error


def _legacy_tables(version: int) -> list[str]:
    try:
        with open(_IN_USE[version], encoding="ascii") as names:
            return names.read().split()
    except FileNotFoundError:
        return []


_remembered: dict[tuple[int, str, int], Table] | None = None


@contextlib.contextmanager
def reading_once() -> Iterator[None]:
    """Within the block a table is read once, and again for each change of it by replace() and after that.

    For one command from its beginning to its end: most of what it would do is else to read the same tables again.
    """
    global _remembered  # noqa: PLW0603 -- so that backends in a command need not know of each other
    before, _remembered = _remembered, {}
    try:
        yield
    finally:
        _remembered = None if before is None else {}  # what was changed inside, an outer block must read anew


def _forget(program: Program) -> bool:
    """True when there was something to forget."""
    return _remembered is not None and _remembered.pop(_place(program), None) is not None


def _place(program: Program) -> tuple[int, str, int]:
    """Which table it is: also by the namespace, since children of a command try rules in one of their own."""
    return program.version, program.kind, os.stat("/proc/thread-self/ns/net").st_ino


def read_table(program: Program) -> Table:
    """Table filter as it is now, or was when it was read before (reading_once())."""
    if _remembered is None:
        return _read_now(program)
    place = _place(program)
    if place not in _remembered:
        _remembered[place] = _read_now(program)
    return _remembered[place]


def _read_now(program: Program) -> Table:
    completed = run([_with(program, "save"), "-t", "filter"], timeout_s=RESTORE_TIMEOUT_S)
    if completed.status != 0:
        _refuse(program, "could not be read", completed)
    return parse_save(completed.stdout)


def parse_save(text: str) -> Table:
    """The chains in what iptables-save printed, in its order."""
    chains: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith(":"):
            chains.setdefault(line[1:].split(" ")[0], [])
        elif line.startswith("-A "):
            # A rule that matches everything and does nothing but count is "-A OUTPUT" and no more.
            _, chain, *rule = line.split(" ", 2)
            chains.setdefault(chain, []).append("".join(rule))
    return {chain: tuple(rules) for chain, rules in chains.items()}


def owned(table: Table, anchor: Anchor) -> Table:
    """Our chains."""
    return {chain: rules for chain, rules in table.items() if anchor.owns(chain)}


def rule_texts(chains: Mapping[str, Sequence[Rule]]) -> Table:
    """Rules as the text that replace() takes."""
    return {chain: tuple(rule.text() for rule in rules) for chain, rules in chains.items()}


def restore_text(table: Table, anchor: Anchor, chains: Table) -> str:
    """What turns our chains in ``table`` into ``chains``, for iptables-restore --noflush; "" when nothing is to do.

    No chains at all takes the jump and every chain of ours away.
    """
    stale = [chain for chain in owned(table, anchor) if chain not in chains]
    jumps = _jumps(table, anchor)
    lines = [f":{chain} - [0:0]" for chain in chains]
    if not chains or not is_first(table, anchor):
        lines += [f"-D {anchor.builtin} {anchor.jump}"] * jumps
        lines += [f"-I {anchor.builtin} 1 {anchor.jump}"] if chains else []
    lines += [f"-A {chain} {rule}" for chain, rules in chains.items() for rule in rules]
    lines += [f"-F {chain}" for chain in stale] + [f"-X {chain}" for chain in stale]
    return "\n".join(["*filter", *lines, "COMMIT", ""]) if lines else ""


def is_first(table: Table, anchor: Anchor) -> bool:
    """True when our jump is the first rule of the built-in chain and the only one of its kind."""
    return table.get(anchor.builtin, ())[:1] == (anchor.jump,) and _jumps(table, anchor) == 1


def is_reached(table: Table, anchor: Anchor) -> bool:
    """True when the built-in chain jumps to us at all."""
    return _jumps(table, anchor) > 0


def _jumps(table: Table, anchor: Anchor) -> int:
    return table.get(anchor.builtin, ()).count(anchor.jump)


def foreign_references(table: Table, anchor: Anchor, chains: Table) -> list[str]:
    """Other people's rules that lead into a chain of ours which is to go."""
    stale = {chain for chain in owned(table, anchor) if chain not in chains}
    return [
        f"-A {chain} {rule}"
        for chain, rules in table.items()
        if not anchor.owns(chain)
        for rule in rules
        if (chain, rule) != (anchor.builtin, anchor.jump) and stale.intersection(rule.split())
    ]


def replace(program: Program, anchor: Anchor, chains: Table, lock_wait_s: int = LOCK_WAIT_S) -> bool:
    """Puts ``chains`` in place of ours in one step; False when nothing of ours was or is to be there.

    For legacy tables the whole table is exchanged at once, for nf_tables it is one batch of netlink: a packet is judged
    by the old rules or by the new ones. Raises GuardError, with the old rules in force.
    """
    table = read_table(program)
    if restore_text(table, anchor, chains) and _forget(program):
        table = read_table(program)  # others may have put rules before ours since
    text = restore_text(table, anchor, chains)
    if not text:
        return False
    foreign = foreign_references(table, anchor, chains)
    if foreign:
        raise GuardError(
            f"{program.title} can't remove our chain while the rule {foreign[0]!r} leads to it: delete that"
        )
    argv = [_with(program, "restore"), "--noflush", "-w", str(lock_wait_s)]
    try:
        completed = run(argv, stdin=text, timeout_s=RESTORE_TIMEOUT_S)
    finally:
        _forget(program)
    if completed.status != 0:
        _refuse(program, f"did not take the rules{_culprit(text, completed)}", completed)
    return True


def clear(programs: Iterable[Program], anchor: Anchor, lock_wait_s: int = LOCK_WAIT_S) -> list[Program]:
    """Takes the jump and every chain of ours away; returns the programs that had some."""
    cleared: list[Program] = []
    for program in programs:
        with contextlib.suppress(NoTable):
            cleared += [program] if replace(program, anchor, {}, lock_wait_s) else []
    return cleared


def _with(program: Program, verb: str) -> str:
    return f"{program.command}-{verb}"


def _culprit(text: str, completed: Completed) -> str:
    """The rule that iptables-restore names by its line."""
    lines = text.splitlines()
    for word in completed.stderr.replace(":", " ").split():
        if word.isdigit() and 1 < int(word) < len(lines):
            return f" at {lines[int(word) - 1]!r}"
    return ""


def _refuse(program: Program, what: str, completed: Completed) -> NoReturn:
    complaint = completed.complaint
    if "xtables lock" in complaint:
        raise LockHeld(
            f"{program.title} {what}, since another program holds the xtables lock: "
            f"try again when it is done ({complaint})"
        )
    if "you must be root" in complaint or "Permission denied" in complaint:
        raise NotPermitted(f"{program.title} {what} without root and CAP_NET_ADMIN: {complaint}")
    # "Failed to initialize nft: Protocol not supported"; legacy: "can't initialize iptables table `filter'".
    if "Failed to initialize nft" in complaint or "can't initialize" in complaint:
        raise NoTable(f"{program.title} {what}, since this kernel has no such tables: {complaint}")
    if "is incompatible, use 'nft' tool" in complaint:
        raise Unsupported(f"{program.title} {what}: somebody's nft rules are in its table filter ({complaint})")
    raise GuardError(f"{program.title} {what}: {complaint}")
