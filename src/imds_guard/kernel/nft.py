# SPDX-License-Identifier: Apache-2.0
"""nft(8): tables of our own, each replaced, removed and read as a whole. Knows nothing of what the rules are for.

Everything here is about the network namespace that the calling thread is in. Written for nft 0.9.8 and later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from imds_guard.errors import GuardError, NotPermitted, Unsupported
from imds_guard.kernel.run import Completed, run

NFT = "nft"

_TIMEOUT_S = 60.0


class Table(NamedTuple):
    """``family`` is "ip", "ip6" or "inet". A name begins with a letter; letters, digits, ``-`` and ``_`` follow."""

    family: str
    name: str

    def __str__(self) -> str:
        return f"{self.family} {self.name}"


class Rule(NamedTuple):
    """A rule in the kernel. ``packets`` is the number in its counter; None for a rule without one."""

    chain: str
    packets: int | None
    comment: str


class Listing(NamedTuple):
    """A table in the kernel."""

    rules: tuple[Rule, ...]
    """Chain by chain, in order."""
    fingerprint: str
    """Differs for tables that differ in more than their counters. Another version of nft may make it differ, too."""

    def packets(self, chain: str) -> list[int]:
        """The counters in a chain, in the order of its rules."""
        return [rule.packets for rule in self.rules if rule.chain == chain and rule.packets is not None]


def require(family: str) -> None:
    """Raises Unsupported or NotPermitted with the reason unless base chains can be made in this namespace.

    One transaction makes a chain and removes it again: afterwards nothing has changed.
    """
    probe = Table(family, "imds-guard-probe")
    chain = "chain probe { type filter hook forward priority -5; policy accept; }"
    _transaction(f"table {probe} {{\n\t{chain}\n}}\ndelete table {probe}\n", f"trying nft's family {family}")


def replacement(table: Table, chains: Mapping[str, Sequence[str]]) -> str:
    """The text that puts a table with these chains in place of the one that was there. Chain -> its lines."""
    lines = [f"table {table}", f"delete table {table}", f"table {table} {{"]
    for name, rules in chains.items():
        lines += [f"\tchain {name} {{", *(f"\t\t{rule}" for rule in rules), "\t}"]
    return "\n".join([*lines, "}", ""])


def removal(table: Table) -> str:
    """The text that removes a table, whether it is there or not."""
    return f"table {table}\ndelete table {table}\n"


def change(texts: Iterable[str]) -> None:
    """Makes all the changes, by replacement() and removal(), in one transaction.

    A packet meets the old tables or the new ones. Raises Unsupported, NotPermitted or GuardError, with nothing changed.
    """
    _transaction("".join(texts), "changing rules with nft")


def remove(tables: Iterable[Table]) -> list[Table]:
    """Removes tables in one transaction. Returns those that were there."""
    there = [table for table in tables if read(table) is not None]
    if there:
        change(removal(table) for table in there)
    return there


def read(table: Table) -> Listing | None:
    """A table as it is now. None when there is none of that name."""
    completed = run([NFT, "--json", "list", "table", table.family, table.name], timeout_s=_TIMEOUT_S)
    if completed.status != 0 and "No such file or directory" in completed.complaint:
        return None
    if completed.status != 0:
        _raise_for(f"reading the nft table {table}", completed)
    return parse_listing(completed.stdout)


def objects(*what: str) -> list[dict[str, Any]]:
    """What ``nft --json list WHAT`` shows: an object has one key, its kind."""
    import json  # noqa: PLC0415 -- start-up time

    completed = run([NFT, "--json", "list", *what], timeout_s=_TIMEOUT_S)
    if completed.status != 0:
        _raise_for(f"nft list {' '.join(what)}", completed)
    try:
        return list(json.loads(completed.stdout)["nftables"])
    except (ValueError, TypeError, KeyError) as error:
        raise GuardError(f"nft --json list {' '.join(what)} printed something unexpected: {error}") from error


def parse_listing(text: str) -> Listing:
    """The output of ``nft --json list table``. Raises GuardError for anything else."""
    import hashlib  # noqa: PLC0415 -- start-up time: commands without such rules need neither
    import json  # noqa: PLC0415

    try:
        objects = [one for one in json.loads(text)["nftables"] if "metainfo" not in one]
        rules = tuple(_rule(one["rule"]) for one in objects if "rule" in one)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise GuardError(
            f"reading nft's rules: nft --json printed something unexpected ({text[:60]!r} ...); report it with the "
            "version of nft"
        ) from error
    stable = json.dumps(_stable(objects), sort_keys=True)
    return Listing(rules, hashlib.sha256(stable.encode()).hexdigest()[:16])


def _rule(rule: dict[str, Any]) -> Rule:
    counters = [one["counter"]["packets"] for one in rule["expr"] if "counter" in one]
    return Rule(rule["chain"], counters[0] if counters else None, rule.get("comment", ""))


def _stable(value: Any) -> Any:
    """A listing without handles and counters, and with the members of a set in one order."""
    if isinstance(value, dict):
        kept = {key: _stable(one) for key, one in value.items() if key not in ("handle", "counter", "index")}
        return {
            key: sorted(one, key=repr) if key == "set" and isinstance(one, list) else one for key, one in kept.items()
        }
    return [_stable(one) for one in value] if isinstance(value, list) else value


def _transaction(text: str, what: str) -> None:
    # "-" is /dev/stdin to nft 0.9, which not every /dev has.
    completed = run([NFT, "-f", "/proc/self/fd/0"], stdin=text, timeout_s=_TIMEOUT_S)
    if completed.status != 0:
        _raise_for(what, completed)


_NO_NFT = (
    *("Protocol not supported", "Operation not supported", "Address family not supported"),
    *("cache initialization failed", "JSON support not compiled-in"),
)


def _raise_for(what: str, completed: Completed) -> NoReturn:
    """EPROTONOSUPPORT: no nfnetlink. EOPNOTSUPP, EAFNOSUPPORT: the kernel has no nf_tables, or not of that family."""
    complaint = completed.complaint
    if "Operation not permitted" in complaint or "you must be root" in complaint:
        raise NotPermitted(f"{what} needs root and CAP_NET_ADMIN: {complaint}")
    if any(sign in complaint for sign in _NO_NFT):
        raise Unsupported(f"{what}: nft does not work here ({complaint})")
    raise GuardError(f"{what} failed, and nothing was changed: {complaint}")
