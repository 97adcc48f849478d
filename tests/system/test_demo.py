# SPDX-License-Identifier: Apache-2.0
"""The demonstration shows what the kernel does, and leaves the machine as it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Callable

import psutil
import pytest

from imds_guard.backends import Backend, Change
from imds_guard.backends.ebpf import EbpfBackend
from imds_guard.backends.iptables import IptablesBackend
from imds_guard.commands.demo import ANSWERED, ATTEMPTS, LEGEND, DemoResult, DemoRow, render, run_demo
from imds_guard.errors import GuardError, Unsupported
from imds_guard.policy.decide import Decision, Reason
from imds_guard.policy.model import Policy

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces and cgroups needs root")

EXPECTED_BACKENDS = os.environ.get("IMDS_GUARD_EXPECT", "").split(",")

EXPECTED = {
    ("root", "169.254.169.254"): "denied",
    ("listed user", "169.254.169.254"): ANSWERED,
    ("listed user", "fd00:ec2::254"): ANSWERED,
    ("member of group", "169.254.169.254"): ANSWERED,
    ("stranger", "169.254.169.254"): "denied",
    ("stranger", "fd00:ec2::254"): "denied",
    ("stranger", "::ffff:169.254.169.254"): "denied",
}


def _our_sandboxes() -> set[str]:
    """The sandboxes that this process made. Another run of the tests may have its own."""
    return {path for path, _, _ in os.walk("/sys/fs/cgroup") if f"sandbox-{os.getpid()}-" in os.path.basename(path)}


def _our_children() -> set[int]:
    """The children of this process, zombies included."""
    return {child.pid for child in psutil.Process().children()}


def _demos(folder: Path) -> dict[str, tuple[Callable[[], DemoResult], str]]:
    """Backend -> the demonstration, and the errno of a denial."""
    return {
        "ebpf": (lambda: run_demo(EbpfBackend), "EPERM"),
        "iptables": (
            lambda: run_demo(lambda _: IptablesBackend(state_folder=str(folder)), inside=True),
            "ECONNREFUSED",
        ),
    }


@pytest.mark.parametrize("backend", ["ebpf", "iptables"])
def test_who_gets_through(backend: str, tmp_path: Path) -> None:
    """Before locking everybody gets through; afterwards only the listed user and the member of the group."""
    demo, refusal = _demos(tmp_path)[backend]
    try:
        result = demo()
    except Unsupported as error:
        if backend in EXPECTED_BACKENDS:
            raise
        pytest.skip(str(error))
    assert {row.before for row in result.rows} == {ANSWERED}
    after = {(row.caller, row.address): row.after for row in result.rows}
    assert after == {key: refusal if outcome == "denied" else outcome for key, outcome in EXPECTED.items()}
    assert result.whole
    assert result.backend == backend


@pytest.mark.parametrize("backend", ["ebpf", "iptables"])
def test_it_leaves_nothing(backend: str, tmp_path: Path) -> None:
    """No cgroup, no child process, no descriptor."""
    places = set()
    before, children_before = _our_sandboxes(), _our_children()

    def make(cgroup: str) -> Backend:
        places.add(cgroup)
        raise Unsupported("this backend is never made")

    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Unsupported, match="never made"):
        run_demo(make, inside=backend == "iptables")
    demo, _ = _demos(tmp_path)[backend]
    try:
        demo()
    except Unsupported as error:
        if backend in EXPECTED_BACKENDS:
            raise
        pytest.skip(str(error))
    assert not any(os.path.exists(place) for place in places)
    assert _our_sandboxes() == before
    assert len(os.listdir("/proc/self/fd")) == open_before
    assert _our_children() == children_before


class _FailsToApply(EbpfBackend):
    """The real backend, which fails after everything is attached."""

    def apply(self, policy: Policy) -> Change:
        """Attaches, then fails."""
        super().apply(policy)
        raise GuardError("failed on purpose")


def test_it_leaves_nothing_when_applying_fails() -> None:
    """The programs that were attached and the cgroup are removed."""
    seen = []

    def make(cgroup: str) -> Backend:
        seen.append(cgroup)
        return _FailsToApply(cgroup)

    with pytest.raises(GuardError, match="failed on purpose"):
        run_demo(make)
    assert not os.path.exists(seen[0])


def _rows(after: str) -> tuple[DemoRow, ...]:
    return tuple(
        DemoRow(caller.name, address, ANSWERED, after, "group is listed", Decision(True, Reason.ALLOWED_GROUP))
        for caller, address in ATTEMPTS
    )


@pytest.mark.parametrize("after", ["EPERM", ANSWERED, "ECONNREFUSED"])
def test_the_table_fits_80_columns(after: str) -> None:
    """The head is the first line; each row has one line."""
    lines = render(_rows(after)).splitlines()
    assert len(lines) == 1 + len(ATTEMPTS)
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["WHO", "ASKS", "BEFORE", "AFTER", "WHY"]


def test_a_narrow_table_wraps_its_last_column() -> None:
    """Every word is still there."""
    narrow = render(_rows("EPERM"), 70)
    assert max(map(len, narrow.splitlines())) <= 70
    assert len(narrow.splitlines()) > 1 + len(ATTEMPTS)
    assert sorted(narrow.split()) == sorted(render(_rows("EPERM"), 200).split())


def test_a_kernel_that_disagrees_is_not_whole() -> None:
    """The result is not whole when the kernel denies what the policy allows, or the reverse."""
    answered, denied = _rows(ANSWERED)[0], _rows("EPERM")[0]
    assert answered.as_decided
    assert not denied.as_decided


def test_the_readme_shows_what_the_demonstration_prints(tmp_path: Path) -> None:
    demo, _ = _demos(tmp_path)["ebpf"]
    try:
        result = demo()
    except Unsupported as error:
        if "ebpf" in EXPECTED_BACKENDS:
            raise
        pytest.skip(str(error))
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"```\n{render(result.rows)}\n{LEGEND}\n```" in readme
