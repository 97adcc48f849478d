# SPDX-License-Identifier: Apache-2.0
"""kernels.toml as frozen values. Unknown keys and values are errors: a misspelt expectation would expect nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from vagrant.matrix.architecture import ARCHITECTURES, Architecture
from vagrant.matrix.errors import MatrixError

PATH = Path(__file__).resolve().parent.parent / "kernels.toml"
BACKENDS = frozenset({"ebpf", "iptables"})
EXPECTATIONS = BACKENDS | {"groups"}
SETUPS = frozenset(
    {
        "16k-pages", "hybrid-cgroups", "iptables-legacy", "legacy-cgroups", "pac-bti", "private-mounts", "refuse-bpf",
        "systemd", "without-bcc", "without-iptables",
    }
)  # fmt: skip

CONTAINERS = "containers"
"""On the command line: all rows of the container-runtime suite."""

USUAL = "usual"
"""In the tests of a row: the tests of the installed command, and the row's share of the conformance table."""


@dataclass(frozen=True)
class Archive:
    """The addresses of the archive, and the keys for its signatures."""

    mirror: str
    security: str
    keyring: str


@dataclass(frozen=True)
class Kernel:
    """A kernel: the newest package of a series (the first two numbers) and a flavour in ``suite``."""

    series: str
    suite: str
    flavour: str = "cloud-amd64"
    """Debian's name for a build of the kernel, which contains the architecture."""

    @property
    def architecture(self) -> Architecture:
        """The architecture in the name of the flavour."""
        return next(ARCHITECTURES[word] for word in self.flavour.split("-") if word in ARCHITECTURES)


@dataclass(frozen=True)
class Userland:
    """A release of a distribution, with its Python, bcc and iptables."""

    name: str
    suite: str
    python: str
    bcc: str
    packages: tuple[str, ...]
    tools: tuple[str, ...]
    stands_for: str = ""


@dataclass(frozen=True)
class Skip:
    """A reason (regular expression) with which tests may be skipped on these kernels, and why they may."""

    reason: str
    kernels: frozenset[str]
    why: str


@dataclass(frozen=True)
class Row:
    """One guest: a kernel with a userland, its setup, and what must work there."""

    name: str
    kernel: Kernel
    userland: Userland
    expect: frozenset[str]
    why: str
    cmdline: str = ""
    setup: frozenset[str] = frozenset()
    memory_mib: int = 1024
    deadline_s: int = 3600
    skips: tuple[Skip, ...] = ()
    tests: tuple[str, ...] = (USUAL,)
    cpus: int = 1
    runtimes: tuple[str, ...] = ()
    """The runtimes whose cells are tried, in a row of the container-runtime suite."""

    default: bool = True
    """False for a row that runs only when it is named."""

    @property
    def systemd(self) -> bool:
        """True when systemd is PID 1, in place of a script. Legacy cgroups are set up by systemd, too."""
        return bool(self.setup & {"systemd", "legacy-cgroups"})

    @property
    def expectation_text(self) -> str:
        """The value of IMDS_GUARD_EXPECT in the guest; "none" where no backend can work."""
        return ",".join(sorted(self.expect)) or "none"


@dataclass(frozen=True)
class Matrix:
    """The whole of kernels.toml."""

    archive: Archive
    kernels: Mapping[str, Kernel]
    userlands: Mapping[str, Userland]
    rows: tuple[Row, ...]
    containers: tuple[Row, ...]
    """The rows of the container-runtime suite. They are not in the support table and have no Vagrant machine."""

    @property
    def all_rows(self) -> tuple[Row, ...]:
        """Every row of the file."""
        return (*self.rows, *self.containers)

    def select(self, names: Iterable[str]) -> list[Row]:
        """The rows of these names. CONTAINERS is all rows of that suite; no name means the default rows."""
        found: list[Row] = []
        for name in names:
            found += self.containers if name == CONTAINERS else (self.row(name),)
        return found or [row for row in self.all_rows if row.default]

    def row(self, name: str) -> Row:
        """The row of that name. KERNEL+USERLAND is a new row that expects nothing. Raises MatrixError."""
        for row in self.all_rows:
            if row.name == name:
                return row
        kernel, _, userland = name.partition("+")
        if kernel in self.kernels and userland in self.userlands:
            return Row(name, self.kernels[kernel], self.userlands[userland], frozenset(), "named on the command line")
        known = ", ".join(one.name for one in self.all_rows)
        raise MatrixError(f"there is no row {name!r} in {PATH.name}; there are: {known}")


def load(path: Path = PATH) -> Matrix:
    """Reads kernels.toml. Raises MatrixError that names the wrong key."""
    return parse(read_toml(path))


def read_toml(path: Path) -> Mapping[str, Any]:
    """A decoded file. Raises MatrixError."""
    if sys.version_info >= (3, 11):
        import tomllib  # noqa: PLC0415 -- ./run matrix --help works without a TOML parser
    else:
        import tomli as tomllib  # noqa: PLC0415
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise MatrixError(f"{path} could not be read: {error}") from error


def parse(document: Mapping[str, Any]) -> Matrix:
    """The Matrix of a decoded kernels.toml. Raises MatrixError."""
    _only(document, {"archive", "common", "kernel", "userland", "skip", "row", CONTAINERS}, "the file")
    common = document["common"]
    _only(common, {"packages", "tools"}, "common")
    kernels = {name: _kernel(name, body) for name, body in document["kernel"].items()}
    userlands = {name: _userland(name, body, common) for name, body in document["userland"].items()}
    skips = tuple(_skip(body, kernels) for body in document.get("skip", ()))
    rows, containers = (
        tuple(_row({**body, "skips": skips}, kernels, userlands) for body in document.get(kind, ()))
        for kind in ("row", CONTAINERS)
    )
    names = [row.name for row in (*rows, *containers)]
    for name in names:
        if names.count(name) > 1:
            raise MatrixError(f"there are two rows {name}")
    return Matrix(_make(Archive, document["archive"], "archive"), kernels, userlands, rows, containers)


def _kernel(name: str, body: Mapping[str, Any]) -> Kernel:
    made = _make(Kernel, {"series": name, **body}, f"kernel {name}")
    if not set(made.flavour.split("-")) & set(ARCHITECTURES):
        raise MatrixError(f"kernel {name}: flavour {made.flavour} names none of {', '.join(ARCHITECTURES)}")
    return made


def _userland(name: str, body: Mapping[str, Any], common: Mapping[str, Any]) -> Userland:
    joined = {key: tuple(sorted({*common[key], *body.get(key, ())})) for key in ("packages", "tools")}
    return _make(Userland, {**body, **joined, "name": name}, f"userland {name}")


def _skip(body: Mapping[str, Any], kernels: Mapping[str, Kernel]) -> Skip:
    what = f"skip {body.get('reason', '(no reason)')!r}"
    named = body.get("kernels", kernels.keys())
    return _make(Skip, {**body, "kernels": _known_values(named, frozenset(kernels), f"{what}: kernels")}, what)


def _row(body: Mapping[str, Any], kernels: Mapping[str, Kernel], userlands: Mapping[str, Userland]) -> Row:
    what = f"row {body.get('name', '(no name)')}"
    for key, known in (("kernel", kernels), ("userland", userlands)):
        if body.get(key) not in known:
            raise MatrixError(f"{what}: {key} = {body.get(key)!r} is not described in the file")
    merged: dict[str, Any] = dict(body)
    merged["kernel"] = kernels[body["kernel"]]
    userland = userlands[body["userland"]]
    packages = (*userland.packages, *merged.pop("packages", ()))
    merged["userland"] = replace(userland, packages=tuple(sorted(set(packages))))
    merged["expect"] = _known_values(body.get("expect", ()), EXPECTATIONS, f"{what}: expect")
    merged["tests"] = tuple(body.get("tests", (USUAL,)))
    merged["runtimes"] = tuple(body.get("runtimes", ()))
    merged["setup"] = _known_values(body.get("setup", ()), SETUPS, f"{what}: setup")
    return _make(Row, merged, what)


def _known_values(given: Iterable[str], known: frozenset[str], what: str) -> frozenset[str]:
    given = list(given)
    unknown = set(given) - known
    if unknown:
        raise MatrixError(f"{what} has {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
    return frozenset(given)


_T = TypeVar("_T")


def _make(kind: type[_T], body: Mapping[str, Any], what: str) -> _T:
    _only(body, {field.name for field in fields(kind)}, what)  # type: ignore[arg-type]
    try:
        return kind(**body)
    except TypeError as error:
        raise MatrixError(f"{what}: {error}") from error


def _only(body: Mapping[str, Any], known: set[str], what: str) -> None:
    for key in body:
        if key not in known:
            raise MatrixError(f"{what}: unknown key {key}")
