# SPDX-License-Identifier: Apache-2.0
"""Chains of our own in a table of iptables, through iptables-save and iptables-restore. Knows rules, but no Policy.

Other people's rules are read, to find where ours are, and never written.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, NoReturn

from imds_guard.backends.iptables.programs import Program
from imds_guard.backends.iptables.rules import Rule
from imds_guard.errors import GuardError, NotPermitted, Unsupported
from imds_guard.kernel.run import Completed, run

LOCK_WAIT_S = 10
"""How long we wait for another program that holds the xtables lock (iptables(8), -w)."""

RESTORE_TIMEOUT_S = 300


class LockHeld(GuardError):
    """Another program held the xtables lock for as long as we waited."""


class NoTable(Unsupported):
    """The kernel has no tables of that kind, so nothing can be in them."""


class Anchor(NamedTuple):
    """A built-in chain of a table, and the chain of ours that its first rule jumps to."""

    builtin: str
    head: str
    table: str = "filter"

    @property
    def jump(self) -> str:
        """The jump as iptables-save prints it."""
        return f"-j {self.head}"

    def owns(self, chain: str) -> bool:
        """True for the head, and for every chain whose name begins with the head's and a dash."""
        return chain == self.head or chain.startswith(self.head + "-")


Table = Mapping[str, tuple[str, ...]]
"""Chain -> its rules as iptables-save prints them, after ``-A CHAIN``."""


# --- reading ----------------------------------------------------------------------------------------------------------


_Key = tuple[int, str, str, int]
_cache: dict[_Key, Table] | None = None


@contextlib.contextmanager
def reading_once() -> Iterator[None]:
    """Within the block a table is read once, and once more after each change of it by replace().

    For one command from its beginning to its end: it would otherwise read the same tables many times.
    """
    global _cache  # noqa: PLW0603 -- so that backends in a command need not know of each other
    before, _cache = _cache, {}
    try:
        yield
    finally:
        _cache = None if before is None else {}  # an outer block must read again what was changed inside


def _uncache(program: Program, name: str) -> bool:
    """True when the table was cached."""
    return _cache is not None and _cache.pop(_table_key(program, name), None) is not None


def _table_key(program: Program, name: str) -> _Key:
    """Identifies a table. The namespace is part of it: children of a command try rules in one of their own."""
    return program.version, program.kind, name, os.stat("/proc/thread-self/ns/net").st_ino


def read_table(program: Program, name: str = "filter") -> Table:
    """A table as it is now. Within reading_once(): as it was when it was read first."""
    if _cache is None:
        return _read_now(program, name)
    key = _table_key(program, name)
    if key not in _cache:
        _cache[key] = _read_now(program, name)
    return _cache[key]


def _read_now(program: Program, name: str) -> Table:
    completed = run([_command(program, "save"), "-t", name], timeout_s=RESTORE_TIMEOUT_S)
    if completed.status != 0:
        _raise_for(program, "could not be read", completed)
    return parse_save(completed.stdout)


def parse_save(text: str) -> Table:
    """The chains in the output of iptables-save, in its order."""
    chains: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith(":"):
            chains.setdefault(line[1:].split(" ")[0], [])
        elif line.startswith("-A "):
            # A rule that matches everything and does nothing but count is "-A OUTPUT" and no more.
            _, chain, *rule = line.split(" ", 2)
            chains.setdefault(chain, []).append("".join(rule))
    return {chain: tuple(rules) for chain, rules in chains.items()}


def read_counters(program: Program, anchor: Anchor) -> dict[str, list[int]]:
    """Chain of ours -> how many packets each of its rules has met."""
    completed = run([_command(program, "save"), "-c", "-t", anchor.table], timeout_s=RESTORE_TIMEOUT_S)
    if completed.status != 0:
        _raise_for(program, "could not be read", completed)
    counters: dict[str, list[int]] = {}
    for line in completed.stdout.splitlines():
        counted, _, rule = line.partition("] -A ")
        chain = rule.partition(" ")[0]
        if counted.startswith("[") and anchor.owns(chain):
            counters.setdefault(chain, []).append(int(counted[1:].partition(":")[0]))
    return counters


def owned(table: Table, anchor: Anchor) -> Table:
    """Our chains in a table."""
    return {chain: rules for chain, rules in table.items() if anchor.owns(chain)}


def is_first(table: Table, anchor: Anchor) -> bool:
    """True when our jump is the first rule of the built-in chain and the only one of its kind."""
    return table.get(anchor.builtin, ())[:1] == (anchor.jump,) and _jumps(table, anchor) == 1


def is_reached(table: Table, anchor: Anchor) -> bool:
    """True when the built-in chain jumps to our head at all."""
    return _jumps(table, anchor) > 0


def _jumps(table: Table, anchor: Anchor) -> int:
    return table.get(anchor.builtin, ()).count(anchor.jump)


# --- writing ----------------------------------------------------------------------------------------------------------


def rule_texts(chains: Mapping[str, Sequence[Rule]]) -> Table:
    """Rules as the text that replace() takes."""
    return {chain: tuple(rule.text() for rule in rules) for chain, rules in chains.items()}


def restore_text(table: Table, anchor: Anchor, chains: Table) -> str:
    """Input of iptables-restore --noflush that turns our chains in ``table`` into ``chains``. "" for no change.

    Without any chains it removes the jump and every chain of ours.
    """
    stale = [chain for chain in owned(table, anchor) if chain not in chains]
    jumps = _jumps(table, anchor)
    lines = [f":{chain} - [0:0]" for chain in chains]
    if not chains or not is_first(table, anchor):
        lines += [f"-D {anchor.builtin} {anchor.jump}"] * jumps
        lines += [f"-I {anchor.builtin} 1 {anchor.jump}"] if chains else []
    lines += [f"-A {chain} {rule}" for chain, rules in chains.items() for rule in rules]
    lines += [f"-F {chain}" for chain in stale] + [f"-X {chain}" for chain in stale]
    return "\n".join([f"*{anchor.table}", *lines, "COMMIT", ""]) if lines else ""


def foreign_references(table: Table, anchor: Anchor, chains: Table) -> list[str]:
    """Other people's rules that lead into a chain of ours which will be removed."""
    stale = {chain for chain in owned(table, anchor) if chain not in chains}
    return [
        f"-A {chain} {rule}"
        for chain, rules in table.items()
        if not anchor.owns(chain)
        for rule in rules
        if (chain, rule) != (anchor.builtin, anchor.jump) and stale.intersection(rule.split())
    ]


def replace(program: Program, anchor: Anchor, chains: Table, lock_wait_s: int = LOCK_WAIT_S) -> bool:
    """Replaces our chains by ``chains`` in one step. False when nothing of ours was there and nothing will be.

    For legacy tables the whole table is exchanged at once, for nf_tables it is one batch of netlink: a packet is judged
    by the old rules or by the new ones. Raises GuardError, with the old rules in force.
    """
    table = read_table(program, anchor.table)
    if restore_text(table, anchor, chains) and _uncache(program, anchor.table):
        table = read_table(program, anchor.table)  # others may have put rules before ours since
    text = restore_text(table, anchor, chains)
    if not text:
        return False
    foreign = foreign_references(table, anchor, chains)
    if foreign:
        raise GuardError(
            f"{program.title} can't remove our chain while the rule {foreign[0]!r} leads to it: delete that"
        )
    argv = [_command(program, "restore"), "--noflush", "-w", str(lock_wait_s)]
    try:
        completed = run(argv, stdin=text, timeout_s=RESTORE_TIMEOUT_S)
    finally:
        _uncache(program, anchor.table)
    if completed.status != 0:
        _raise_for(program, f"did not take the rules{_rejected_rule(text, completed)}", completed)
    return True


def clear(programs: Iterable[Program], anchor: Anchor, lock_wait_s: int = LOCK_WAIT_S) -> list[Program]:
    """Removes the jump and every chain of ours. Returns the programs that had some."""
    cleared: list[Program] = []
    for program in programs:
        with contextlib.suppress(NoTable):
            cleared += [program] if replace(program, anchor, {}, lock_wait_s) else []
    return cleared


def _command(program: Program, verb: str) -> str:
    return f"{program.command}-{verb}"


def _rejected_rule(text: str, completed: Completed) -> str:
    """The rule that iptables-restore names by its line."""
    lines = text.splitlines()
    for field in completed.stderr.replace(":", " ").split():
        if field.isdigit() and 1 < int(field) < len(lines):
            return f" at {lines[int(field) - 1]!r}"
    return ""


def _raise_for(program: Program, what: str, completed: Completed) -> NoReturn:
    complaint = completed.complaint
    if "xtables lock" in complaint:
        raise LockHeld(
            f"{program.title} {what}, since another program holds the xtables lock: "
            f"try again when it is done ({complaint})"
        )
    if "you must be root" in complaint or "Permission denied" in complaint:
        raise NotPermitted(f"{program.title} {what} without root and CAP_NET_ADMIN: {complaint}")
    # "Failed to initialize nft: Protocol not supported"; legacy: "can't initialize iptables table `mangle'".
    if "Failed to initialize nft" in complaint or "can't initialize" in complaint:
        raise NoTable(f"{program.title} {what}, since this kernel has no such tables: {complaint}")
    if "is incompatible, use 'nft' tool" in complaint:
        raise Unsupported(f"{program.title} {what}: somebody's nft rules are in its table ({complaint})")
    raise GuardError(f"{program.title} {what}: {complaint}")
