# SPDX-License-Identifier: Apache-2.0
"""Other people's BPF programs at our hooks: before ours, behind, in other cgroups, and those that keep ours out."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from imds_guard.backends.ebpf import EbpfBackend, abi
from imds_guard.backends.ebpf.other_programs import OtherProgram
from imds_guard.commands import guard as commands
from imds_guard.commands import look
from imds_guard.commands.options import GuardOptions
from imds_guard.errors import Unsupported
from imds_guard.kernel import bpf
from imds_guard.kernel.bpf.attr import Command, LinkCreate
from imds_guard.kernel.bpf.syscall import invoke
from imds_guard.kernel.cgroup import open_cgroup
from imds_guard.kernel.credentials import become
from imds_guard.kernel.sandbox import Sandbox
from tests.adversary.rewriters import rewriting
from tests.kernel import guards
from tests.kernel.guards import BOTH, IPV4, IPV6, OLD, OLD_POLICY, PORT, STRANGER, Storm

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="attaching programs needs root")

CONNECT4 = int(bpf.AttachType.CGROUP_INET4_CONNECT)
ALLOW_OVERRIDE, ALLOW_MULTI, BEFORE, PREORDER = 1, 2, 8, 64  # include/uapi/linux/bpf.h
_ALLOW = struct.pack("=BBhi", 0xB7, 0, 0, 1) + struct.pack("=BBhi", 0x95, 0, 0, 0)  # r0 = 1; exit
PROXY = "127.0.0.1"


@contextmanager
def folder(cgroup: str) -> Iterator[int]:
    fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def program(name: str = "neighbour", code: bytes = _ALLOW) -> Iterator[int]:
    fd = bpf.prog_load(code, name, CONNECT4)
    try:
        yield fd
    finally:
        os.close(fd)


def _link(program_fd: int, folder_fd: int, flags: int) -> int:
    """The fd of a new link, or minus the errno."""
    attr = LinkCreate(prog_fd=program_fd, target_fd=folder_fd, attach_type=CONNECT4, flags=flags)
    result, code, _ = invoke(Command.LINK_CREATE, bytes(attr))
    return -code if code else result


@contextmanager
def linked(cgroup: str, name: str = "neighbour", flags: int = 0, code: bytes = _ALLOW) -> Iterator[None]:
    """A program of somebody else, by a link."""
    with program(name, code) as program_fd, folder(cgroup) as folder_fd:
        link = _link(program_fd, folder_fd, flags)
        assert link >= 0, os.strerror(-link)
        try:
            yield
        finally:
            bpf.link_detach(link)
            os.close(link)


@contextmanager
def attached(cgroup: str, name: str = "neighbour", flags: int = ALLOW_MULTI, code: bytes = _ALLOW) -> Iterator[None]:
    """A program of somebody else by BPF_PROG_ATTACH, the way before there were links."""
    with program(name, code) as program_fd, folder(cgroup) as folder_fd:
        attr = struct.pack("=IIII", folder_fd, program_fd, CONNECT4, flags)
        assert invoke(Command.PROG_ATTACH, attr)[1] == 0
        try:
            yield
        finally:
            assert invoke(Command.PROG_DETACH, struct.pack("=IIII", folder_fd, program_fd, CONNECT4, 0))[1] == 0


def knows(flags: int) -> bool:
    """Whether the kernel takes these flags for a link to a cgroup. It is given no cgroup: EBADF where it does."""
    with program() as fd:
        result = _link(fd, 2**31 - 1, flags)
        assert result in (-9, -22), result  # EBADF, EINVAL
        return result == -9


@pytest.fixture
def orders() -> bool:
    """Whether the kernel can put a program in front of others."""
    return knows(BEFORE)


@pytest.fixture
def guarded() -> Iterator[tuple[Sandbox, EbpfBackend]]:
    with guards.guarded_sandbox() as pair:
        yield pair


@pytest.fixture
def nested() -> Iterator[tuple[str, Sandbox, EbpfBackend, str]]:
    """A cgroup, one in it with a sandbox and its backend, and one in that."""
    with Sandbox() as above, Sandbox((IPV4, IPV6), below=above.cgroup) as sandbox:
        sandbox.serve((IPV4, IPV6), (PORT,))
        backend = EbpfBackend(sandbox.cgroup)
        below = os.path.join(sandbox.cgroup, "below")
        os.mkdir(below)
        try:
            yield above.cgroup, sandbox, backend, below
        finally:
            backend.remove()
            os.rmdir(below)


def others(backend: EbpfBackend) -> list[tuple[str, str, tuple[str, ...]]]:
    """(name, when it runs, cgroups) at connect4. At the other hooks there is nobody else."""
    found: tuple[OtherProgram, ...] = backend.state().others
    assert {one.hook for one in found} <= {"connect4"}
    return [(one.name, one.order.name, one.cgroups) for one in found]


def first(cgroup: str) -> str:
    """Who is first in the list of the cgroup."""
    with open_cgroup(cgroup) as opened:
        fd = bpf.program_by_id(bpf.attached_programs(opened.fd, CONNECT4)[0])
    assert fd is not None
    try:
        return bpf.describe_program(fd).name
    finally:
        os.close(fd)


def is_ours(name: str) -> bool:
    return abi.version_in_name("connect4", name) is not None


# --- which run before ours, and which behind --------------------------------------------------------------------------


@pytest.mark.parametrize("attach", [linked, attached], ids=["link", "attach"])
def test_in_the_same_cgroup(guarded: tuple[Sandbox, EbpfBackend], orders: bool, attach: Callable[..., object]) -> None:
    """One that was there before ours runs behind it where the kernel can order programs, and is named in any case."""
    sandbox, backend = guarded
    with attached(sandbox.cgroup, "early") if attach is attached else linked(sandbox.cgroup, "early"):
        backend.apply(OLD_POLICY)
        assert others(backend) == [("early", "BEHIND" if orders else "BEFORE", ())]
        with attached(sandbox.cgroup, "late") if attach is attached else linked(sandbox.cgroup, "late"):
            found = others(backend)
            assert sorted(found) == [("early", "BEHIND" if orders else "BEFORE", ()), ("late", "BEHIND", ())]
        assert guards.passing(sandbox) == {OLD, BOTH}
        backend.remove()
        assert guards.traces(sandbox.cgroup)["attached"] == 1, "other people's programs stay"


@pytest.mark.parametrize("flags", [None, 0, ALLOW_OVERRIDE, ALLOW_MULTI], ids=["link", "none", "override", "multi"])
def test_in_a_cgroup_below(nested: tuple[str, Sandbox, EbpfBackend, str], flags: int | None) -> None:
    """It runs before ours, whatever its flags: ours, attached above with BPF_F_ALLOW_MULTI, always runs, too."""
    _, sandbox, backend, below = nested
    backend.apply(OLD_POLICY)
    with linked(below) if flags is None else attached(below, flags=flags):
        assert others(backend) == [("neighbour", "BEFORE", (below,))]
        with open_cgroup(below) as opened:
            running = bpf.running_programs(opened.fd, CONNECT4)
        ours = next(hook.ours for hook in backend.state().hooks if hook.name == "connect4")
        assert ours is not None
        assert len(running) == 2
        assert running[1] == ours.id
    assert others(backend) == []
    assert guards.passing(sandbox) == {OLD, BOTH}


def test_in_many_cgroups_below_it_is_named_once(nested: tuple[str, Sandbox, EbpfBackend, str]) -> None:
    _, _, backend, below = nested
    backend.apply(OLD_POLICY)
    inner = [os.path.join(below, name) for name in ("a", "b", "c")]
    with ExitStack() as stack:
        for path in inner:
            os.mkdir(path)
            stack.callback(os.rmdir, path)
        program_fd = stack.enter_context(program())
        for path in inner:
            stack.callback(os.close, _link(program_fd, stack.enter_context(folder(path)), 0))
        (found,) = backend.state().others
        assert set(found.cgroups) == set(inner)
        assert "and 2 more cgroups" in found.fault


def test_the_same_program_here_and_below(nested: tuple[str, Sandbox, EbpfBackend, str]) -> None:
    """It runs twice for the processes below, once on either side of ours."""
    _, sandbox, backend, below = nested
    backend.apply(OLD_POLICY)
    with program() as program_fd, folder(sandbox.cgroup) as here, folder(below) as there:
        links = [_link(program_fd, here, 0), _link(program_fd, there, 0)]
        assert others(backend) == [("neighbour", "BEFORE", (below,)), ("neighbour", "BEHIND", ())]
        for link in links:
            os.close(link)


@pytest.mark.parametrize("attach", ["link", "multi"])
def test_in_the_cgroup_above(nested: tuple[str, Sandbox, EbpfBackend, str], attach: str) -> None:
    above, sandbox, backend, _ = nested
    with linked(above) if attach == "link" else attached(above):
        backend.apply(OLD_POLICY)
        assert others(backend) == [("neighbour", "BEHIND", (above,))]
        assert guards.passing(sandbox) == {OLD, BOTH}


@pytest.mark.parametrize("place", ["same", "above"])
def test_one_that_asks_to_run_first_is_seen_before_ours(
    nested: tuple[str, Sandbox, EbpfBackend, str], place: str
) -> None:
    """BPF_F_PREORDER: the list has it behind ours, or in the cgroup above, and it runs first all the same."""
    if not knows(PREORDER):
        pytest.skip("this kernel has no BPF_F_PREORDER")
    above, sandbox, backend, _ = nested
    backend.apply(OLD_POLICY)
    with linked(above if place == "above" else sandbox.cgroup, flags=PREORDER):
        assert others(backend) == [("neighbour", "BEFORE", (above,) if place == "above" else ())]
        assert backend.faults() == []


def test_a_program_elsewhere_is_none_of_ours(guarded: tuple[Sandbox, EbpfBackend]) -> None:
    """In a cgroup beside that of the guard, and one that is loaded and not attached."""
    _, backend = guarded
    backend.apply(OLD_POLICY)
    with Sandbox() as elsewhere, linked(elsewhere.cgroup), program("loaded"):
        assert others(backend) == []
    with Sandbox() as elsewhere, attached(elsewhere.cgroup):
        assert others(backend) == []


# --- the first place --------------------------------------------------------------------------------------------------


def _try_as(user: int, address: str) -> str:
    become(uids=(user,) * 3, gids=(user + 1,) * 3, groups=())
    with socket.socket() as one:
        one.settimeout(5)
        try:
            one.connect((address, PORT))
        except PermissionError:
            return "denied"
        return str(one.getpeername()[0])


def test_a_redirection_in_front_is_no_way_around_or_is_named(
    guarded: tuple[Sandbox, EbpfBackend], orders: bool
) -> None:
    """A local proxy for the metadata, whose program was attached before the guard started (Azure has one)."""
    sandbox, backend = guarded
    sandbox.serve((PROXY,), (PORT,))
    with linked(sandbox.cgroup, "to_the_proxy", code=rewriting(IPV4, PROXY)):
        assert sandbox.call(lambda: _try_as(STRANGER, IPV4)) == PROXY
        backend.apply(OLD_POLICY)
        reached = sandbox.call(lambda: _try_as(STRANGER, IPV4))
        assert reached == ("denied" if orders else PROXY)
        assert others(backend) == [("to_the_proxy", "BEHIND" if orders else "BEFORE", ())]


def test_one_that_gets_in_front_is_put_behind_ours_without_a_gap(
    guarded: tuple[Sandbox, EbpfBackend], orders: bool
) -> None:
    """The next start does it, and so does verify --repair: a denied caller that keeps trying never gets through."""
    if not orders:
        pytest.skip("this kernel can't order the programs of a cgroup")
    sandbox, backend = guarded
    backend.apply(OLD_POLICY)
    storm = Storm(sandbox, STRANGER)
    storm.wait_for(30)
    for _ in range(5):
        with linked(sandbox.cgroup, flags=BEFORE):
            assert others(backend) == [("neighbour", "BEFORE", ())]
            assert first(sandbox.cgroup) == "neighbour"
            done = backend.apply(OLD_POLICY)
            assert "put ours in front of other programs at connect4" in done.done
            assert is_ours(first(sandbox.cgroup))
            assert others(backend) == [("neighbour", "BEHIND", ())]
    storm.wait_for(30)
    connected, denied, other = storm.counts()
    assert (connected, other) == (0, 0)
    assert denied >= 60
    assert guards.traces(sandbox.cgroup) == {"attached": 4, "pins": 1}


@pytest.mark.parametrize("place", ["same", "above"])
def test_programs_are_replaced_beside_one_that_asks_to_run_first(
    nested: tuple[str, Sandbox, EbpfBackend, str], place: str
) -> None:
    """By new links. LINK_UPDATE would replace another program than ours on kernels before the fix of CVE-2026-72427."""
    if not knows(PREORDER):
        pytest.skip("this kernel has no BPF_F_PREORDER")
    above, sandbox, backend, _ = nested
    with guards.other_layout():
        backend.apply(OLD_POLICY)
    storm = Storm(sandbox, STRANGER)
    storm.wait_for(20)
    with linked(above if place == "above" else sandbox.cgroup, flags=PREORDER), open_cgroup(sandbox.cgroup) as opened:
        seen = [bpf.running_programs(opened.fd, CONNECT4)]
        for defines in ((), (("IG_ANOTHER_VERSION", 1),)):  # new maps, then new programs alone
            changed = EbpfBackend(sandbox.cgroup, defines)
            changed.apply(OLD_POLICY)
            assert changed.faults() == []
            assert guards.passing(sandbox) == {OLD, BOTH}
            seen.append(bpf.running_programs(opened.fd, CONNECT4))
        assert [len(running) for running in seen] == [2, 2, 2]
        assert len({running[0] for running in seen}) == 1
        assert len({running[1] for running in seen}) == 3
    storm.wait_for(20)
    assert storm.counts()[0] == 0
    assert guards.traces(sandbox.cgroup) == {"attached": 4, "pins": 1}


# --- what keeps ours out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "flags"), [("same", 0), ("same", ALLOW_OVERRIDE), ("above", 0)])
def test_one_that_allows_no_other_is_named(
    nested: tuple[str, Sandbox, EbpfBackend, str], place: str, flags: int
) -> None:
    """check and start say why eBPF can't be used: 69, not 77, and nothing is left behind."""
    above, sandbox, backend, _ = nested
    where = above if place == "above" else sandbox.cgroup
    with attached(where, "hermit", flags):
        for policy in (OLD_POLICY, None):
            with pytest.raises(Unsupported, match=r"program hermit \(id [0-9]+\), which user 0 loaded, is attached to"):
                backend.check(policy)
        with pytest.raises(Unsupported, match="hermit"):
            commands.start_alone(OLD_POLICY, GuardOptions("ebpf", sandbox.cgroup), lambda _: None)
        with pytest.raises(Unsupported, match="hermit"):  # it came after check()
            backend.apply(OLD_POLICY)
        assert guards.traces(sandbox.cgroup) == {"attached": int(place == "same"), "pins": 0}
        assert guards.passing(sandbox, (STRANGER,)) == {STRANGER}
    backend.check(OLD_POLICY)


def test_one_above_that_may_be_replaced_is_said_to_be(nested: tuple[str, Sandbox, EbpfBackend, str]) -> None:
    above, sandbox, backend, _ = nested
    with attached(above, "gives_way", ALLOW_OVERRIDE):
        warnings = backend.apply(OLD_POLICY).warnings
        assert [warning.split(",")[0].partition(" (")[0] for warning in warnings] == ["program gives_way"]
        assert "runs no more at connect4" in warnings[0]
        assert guards.passing(sandbox) == {OLD, BOTH}


def test_a_full_list_is_named(guarded: tuple[Sandbox, EbpfBackend]) -> None:
    sandbox, backend = guarded
    with ExitStack() as stack:
        program_fd, folder_fd = stack.enter_context(program()), stack.enter_context(folder(sandbox.cgroup))
        for _ in range(bpf.MAX_PROGRAMS):
            stack.callback(os.close, _link(program_fd, folder_fd, 0))
        with pytest.raises(Unsupported, match="64 programs are attached, and the kernel allows no more"):
            backend.check(OLD_POLICY)
    backend.check(OLD_POLICY)


# --- those that the configuration knows -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["neighbour", "neighbour_beside_us", "neighbour_besid"])
def test_a_known_program_is_no_fault(guarded: tuple[Sandbox, EbpfBackend], tmp_path: Path, name: str) -> None:
    """The kernel has the first 15 characters of a name. A neighbour of another name stays a fault."""
    sandbox, backend = guarded
    config = tmp_path / "config.toml"
    config.write_text(f'known_programs = ["{name}"]\n', encoding="utf-8")
    backend.apply(OLD_POLICY)
    with linked(sandbox.cgroup, name[:15]):
        assert [name[:15] in fault for fault in look.status(sandbox.cgroup, "/nonexistent").faults] == [True]
        found = look.status(sandbox.cgroup, str(config))
        assert (found.faults, [one.name for one in found.known]) == ([], [name[:15]])
        with linked(sandbox.cgroup, "another"):
            assert ["another" in fault for fault in look.status(sandbox.cgroup, str(config)).faults] == [True]
        config.chmod(0o666)
        assert len(look.status(sandbox.cgroup, str(config)).faults) == 1, "anybody could have written the name there"


def test_start_warns_of_those_that_are_not_known(guarded: tuple[Sandbox, EbpfBackend]) -> None:
    sandbox, _ = guarded
    options = GuardOptions("ebpf", sandbox.cgroup)
    with linked(sandbox.cgroup):
        warned = commands.start_alone(OLD_POLICY, options, lambda _: None).warnings
        assert ["program neighbour" in warning for warning in warned] == [True]
        known = options._replace(known_programs=("neighbour",))
        assert commands.start_alone(OLD_POLICY, known, lambda _: None).warnings == []
