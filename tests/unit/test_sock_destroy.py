# SPDX-License-Identifier: Apache-2.0
"""Ending sockets where the machine has no second thread for each."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

import pytest

from imds_guard.kernel import sock_destroy
from imds_guard.kernel.namespaces import OWN_PATH, Namespace, namespace_inode
from imds_guard.kernel.sock_diag import SockDiag


class _OneEach(threading.Thread):
    """As threading.Thread near the limit of pids.max or threads-max."""

    def start(self) -> None:
        if self._target.__name__ == "_lock":  # type: ignore[attr-defined]
            raise RuntimeError("can't start new thread")
        super().start()


def test_a_socket_is_examined_although_no_thread_can_try_its_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cut here. A thread that dies gives no answer and keeps its place; 512 of them stop all work."""
    monkeypatch.setattr(threading, "Thread", _OneEach)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        with SockDiag() as diag:
            found: Any = diag.find_tcp(client.getsockname(), client.getpeername())
        here = Namespace(namespace_inode("net"), OWN_PATH, os.getpid())
        target = sock_destroy.Target(here, found, unless_accepted=True, pids=(os.getpid(),))
        (ended,) = sock_destroy.end_each([target], 10.0, cut=False)
    assert ended.ending is sock_destroy.Ending.NOT_CUT
