# SPDX-License-Identifier: Apache-2.0
"""Why --strict has no filter at the egress of interfaces: such a filter does not see all frames that CAP_NET_RAW sends.

Should a kernel change that, a test here fails, and dropping these frames can be thought of again.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import shutil
import socket
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Callable

import pytest

from imds_guard.kernel import children, netns
from imds_guard.kernel.bpf.attr import Command, LinkCreate, ProgLoad
from imds_guard.kernel.bpf.syscall import invoke
from tests.adversary.attacks_packets import PACKET_QDISC_BYPASS, SOL_PACKET
from tests.adversary.privileges import command
from tests.adversary.xdp import XdpSender

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces needs root")

NEAR, FAR = "near", "far"
_PROTOCOL = 0x88B5  # IEEE Std 802, local experimental
_SCHED_CLS, _TCX_EGRESS = 3, 47  # include/uapi/linux/bpf.h
_DROP = struct.pack("=BBhi", 0xB7, 0, 0, 2) + struct.pack("=BBhi", 0x95, 0, 0, 0)  # r0 = TC_ACT_SHOT; exit


def _frame(text: bytes) -> bytes:
    return b"\xff" * 6 + bytes.fromhex("02005e005301") + struct.pack("!H", _PROTOCOL) + text.ljust(60, b".")


def _by_packet_socket(*options: tuple[int, int]) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as one:
        for option in options:
            one.setsockopt(SOL_PACKET, *option)
        one.bind((NEAR, 0))
        one.send(_frame(b"packet"))


def _by_xdp() -> None:
    with XdpSender(NEAR) as one:
        one.send(_frame(b"xdp"))


SENDERS: dict[str, Callable[[], None]] = {
    "packet socket": _by_packet_socket,
    "packet socket past the queues": lambda: _by_packet_socket((PACKET_QDISC_BYPASS, 1)),
    "AF_XDP": _by_xdp,
}


def _arrives(seen: socket.socket, send: Callable[[], None]) -> bool:
    """The kernel tells some senders that their frame was dropped: ENOBUFS."""
    try:
        send()
    except OSError as error:
        if error.errno != errno.ENOBUFS:
            raise
    if not select.select([seen], [], [], 0.5)[0]:
        return False
    seen.recv(4096)
    return True


# --- filters that drop everything -------------------------------------------------------------------------------------


class Missing(Exception):
    """The kernel lacks the filter."""


@contextmanager
def _tcx() -> Iterator[None]:
    """A program at the traffic control of the interface. clsact runs at the same place (sch_handle_egress())."""
    code = ctypes.create_string_buffer(_DROP, len(_DROP))
    licence = ctypes.create_string_buffer(b"GPL")
    load = ProgLoad(prog_type=_SCHED_CLS, insn_cnt=2)
    load.insns, load.license = ctypes.addressof(code), ctypes.addressof(licence)
    program, failed, _ = invoke(Command.PROG_LOAD, bytes(load))
    assert failed == 0, os.strerror(failed)
    link = LinkCreate(prog_fd=program, target_fd=socket.if_nametoindex(NEAR), attach_type=_TCX_EGRESS)
    fd, failed, _ = invoke(Command.LINK_CREATE, bytes(link))
    if failed:
        raise Missing(f"tcx can't be used here: {errno.errorcode[failed]}")
    yield
    os.close(fd)
    os.close(program)


@contextmanager
def _nft() -> Iterator[None]:
    """A base chain of nft at the egress of the interface: since Linux 42df6e1d221d (in v5.16)."""
    chain = f"{{ type filter hook egress device {NEAR} priority 0; policy drop; }}"
    try:
        command("nft", f"add table netdev t; add chain netdev t c {chain}")
    except OSError as error:
        raise Missing(f"nft can't be used at egress here: {error}") from error
    yield
    command("nft", "delete table netdev t")


FILTERS: dict[str, Callable[[], AbstractContextManager[None]]] = {"none": nullcontext, "tcx": _tcx, "nft": _nft}


def _arriving(name: str) -> str | dict[str, bool]:
    """Which frames reach the other end of a veth pair through the filter; a sentence where the kernel lacks it."""
    netns.unshare_network([])
    command("ip", "link", "add", NEAR, "type", "veth", "peer", "name", FAR)
    for interface in (NEAR, FAR):
        command("ip", "link", "set", interface, "up")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_PROTOCOL)) as seen:
        seen.bind((FAR, _PROTOCOL))
        try:
            with FILTERS[name]():
                return {sender: _arrives(seen, send) for sender, send in SENDERS.items()}
        except Missing as missing:
            return str(missing)


@pytest.mark.parametrize(
    ("name", "arrive"), [("none", [True, True, True]), ("tcx", [False, True, True]), ("nft", [False, False, True])]
)
def test_which_frames_a_filter_at_egress_sees(name: str, arrive: list[bool]) -> None:
    """PACKET_QDISC_BYPASS goes past traffic control, and AF_XDP past nft, too. Neither needs more than CAP_NET_RAW."""
    if name == "nft" and shutil.which("nft") is None:
        pytest.skip("nft is not installed")
    found = children.run_in_child(lambda: _arriving(name))
    if isinstance(found, str):
        pytest.skip(found)
    assert list(found.values()) == arrive
