# SPDX-License-Identifier: Apache-2.0
"""Faults that are planted in copies of the hooks and of Python modules. Each must turn a test of this folder red."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

from imds_guard.backends.ebpf import program
from tests.vm.programs import compiled


class Fault(NamedTuple):
    """One edit of one file. ``file`` is in bpf/, or the name of a module."""

    name: str
    file: str
    before: str
    after: str

    def edited(self, text: str) -> str:
        """The text with the fault. It must be possible to plant it in exactly one place."""
        assert text.count(self.before) == 1, f"{self.name}: {self.file} has it {text.count(self.before)} times"
        return text.replace(self.before, self.after)


_RENDER, _DECIDE = "imds_guard.backends.ebpf.render", "imds_guard.policy.decide"

FAULTS = (
    # Three that releases had.
    Fault(
        "an-unspecified-destination-before-the-credentials", "decide.h",
        "\tif (!ig_read_caller(caller, task))",
        "\tif (number == IG_NO_LIST)\n\t\treturn IG_UNSPECIFIED_DESTINATION;\n\tif (!ig_read_caller(caller, task))",
    ),
    Fault("an-unspecified-destination-names-the-first-lock", _RENDER, "lock = abi.NO_LOCK\n", "lock = 0\n"),
    Fault("an-entry-without-ranges-locks", "egress.h", "return endpoint && endpoint->ranges_len;", "return endpoint;"),
    Fault(
        "repeated-groups-count-once", _DECIDE,
        "len(caller.groups) + caller.repeated_groups > MAX", "len(caller.groups) > MAX",
    ),
    # Where a connect goes.
    Fault("the-port-in-the-other-byte-order", "request.h", "ig_be16((__u16)ctx->user_port)", "(__u16)ctx->user_port"),
    Fault("the-last-port-of-a-range-is-open", "endpoint.h", "port <= range->high", "port < range->high"),
    Fault("udp-is-locked-as-tcp-is", "endpoint.h", "(range->protocols & request->protocol)", "range->protocols"),
    Fault("the-unspecified-ipv6-address-leads-nowhere", "request.h", "to->word[3] = ig_be32(1);", ";"),
    Fault("sendmsg-judges-the-sockets-own-address", "request.h", "from = ctx->msg_src_ip4;", "from = sk->src_ip4;"),
    Fault("a-longer-prefix-opens-the-ports-around-it", _RENDER, "own[network] + inherited", "own[network]"),
    Fault("a-prefix-covers-one-bit-of-the-bitmap", _RENDER, "1 << max(0, 16 - network.prefixlen)", "1"),
    # Who connects.
    Fault("only-the-primary-group", "decide.h", "group |= ig_judge_supplementary", "ig_judge_supplementary"),
    Fault("on-both-lists-is-allowed", "decide.h", "if (user & IG_DENY)", "if (user == IG_DENY)"),
    Fault("a-pid-namespace-is-no-container", "decide.h", "return user && pid ?", "return user ?"),
    Fault("the-rest-of-a-division-is-not-read", "groups.h", "if (i < len % IG_GIDS", "if (i + 1 < len % IG_GIDS"),
    Fault("a-search-that-ends-early", "groups.h", "step < 17", "step < 10"),
    # What is reported.
    Fault("a-row-that-does-not-count", "notify.h", "__sync_fetch_and_add(&row->count, 1);", ""),
    Fault("a-mark-has-the-primary-group", "mark.h", "if (!list || caller->searched)", "if (list || caller->searched)"),
    Fault("a-user-namespace-hides-its-owner", "notify.h", "key->id = owner;", ""),
    Fault("rows-of-others-are-of-one-lock", "notify.h", "key.lock = IG_NO_LOCK;", ""),
    Fault("an-earlier-mark-is-lost", "mark.h", "earlier->marks[mark->list % IG_EARLIER_MARKS] = *mark;", ""),
    Fault("an-earlier-mark-is-not-read", "egress.h", "&earlier->marks[i]", "&earlier->marks[0]"),
    # Connections that others made.
    Fault("a-connect-counts-as-accepted", "incoming.h", "if (tcp->bytes_acked ||", "if ("),
    Fault("a-raw-socket-counts-as-tcp", "incoming.h", "sk->type != IG_SOCK_STREAM ||", ""),
    Fault("a-syn-is-of-an-accepted-connection", "incoming.h", "!(flags & IG_TCP_ACK)", "!flags"),
    Fault("an-accepted-mark-is-good-for-a-later-connection", "incoming.h", " && mark->gid == first", ""),
    Fault("an-accepted-connection-is-forgotten", "incoming.h", "\tig_set_accepted_mark(sk, first);\n", ""),
    Fault("a-fast-open-answer-is-dropped", "incoming.h", "|| ig_has_data(skb, transport_offset)", ""),
    Fault("an-accepted-socket-counts-as-a-client", "egress.h", "&& mark->kind != IG_MARK_ACCEPTED", ""),
    Fault("a-mark-of-another-list", "mark.h", "mark->list = list;", "mark->list = 0;"),
)  # fmt: skip
"""In each form of the programs."""
FAULTS_OF_FILTERS = (
    # Who is sent to a filter, and where to.
    Fault("the-last-filter-wins", "decide.h", "caller->filter = all & -all;", "caller->filter = all;"),
    Fault("everyone-in-every-user-namespace", "decide.h", "if (named & caller->filter)", "if (all & caller->filter)"),
    Fault("the-account-may-use-every-port", "decide.h", "FILTER_ACCOUNT) && range->target)", "FILTER_ACCOUNT))"),
    Fault("groups-of-filters-are-not-needed", "groups.h", " | (list->flags & IG_FILTERS_UNKNOWN)", ""),
    Fault("a-listener-without-a-mark", "redirect.h", "mark && mark->digest", "!mark || mark->digest"),
    Fault("a-listener-of-other-rules", "redirect.h", "mark && mark->digest == digest", "mark"),
    Fault("half-of-the-digest", "redirect.h", "mark->digest == digest", "(__u32)mark->digest == (__u32)digest"),
    Fault("a-socket-that-does-not-listen", "redirect.h", "listener->state == BPF_TCP_LISTEN && ", ""),
    Fault("a-device-is-no-hindrance", "redirect.h", "if (sk->bound_dev_if)", "if (0)"),
    Fault("audit-redirects", "connect.h", " && decision.verdict == IG_VERDICT_ALLOWED)", ")"),
    Fault("any-mark-is-one-for-a-filter", "egress.h", "mark->kind == IG_MARK_FILTER && mark->gid", "mark->gid"),
    Fault("one-filter-for-another", "egress.h", " && mark->gid == ig_filter_number(filter->word[3])", ""),
    Fault("a-target-without-a-range-of-its-own", _RENDER, "False, abi.TCP, number)", "False, abi.TCP, 0)"),
)  # fmt: skip
"""Of code that the programs of other policies do not have."""


@contextmanager
def planted(fault: Fault, folder: Path) -> Iterator[None]:
    """In this block the hooks, or the module's users in tests/vm, have the fault. ``folder`` is for a copy of bpf/."""
    if not fault.file.endswith(".h"):
        with _in_module(fault):
            yield
        return
    copy = folder / "bpf"
    shutil.copytree(program.source_folder(), copy)
    path = copy / fault.file
    path.write_text(fault.edited(path.read_text(encoding="utf-8")), encoding="utf-8")
    _forget_compiled()
    try:
        with patch.object(program, "source_folder", lambda: copy):
            yield
    finally:
        _forget_compiled()


def _forget_compiled() -> None:
    """In this process. The files of earlier ones have the digest of their source."""
    compiled.cache_clear()
    program._compiled.cache_clear()


@contextmanager
def _in_module(fault: Fault) -> Iterator[None]:
    module = importlib.import_module(fault.file)
    assert module.__file__ is not None
    text = Path(module.__file__).read_text(encoding="utf-8")
    copy = ModuleType(module.__name__)
    copy.__dict__.update({name: value for name, value in vars(module).items() if not name.startswith("__")})
    exec(compile(fault.edited(text), f"{fault.file} with a fault", "exec"), copy.__dict__)
    # Only functions have the fault: a value of another class, of the same name, would be equal to none of ours.
    copy.__dict__.update({name: value for name, value in vars(module).items() if isinstance(value, type)})
    function = fault.file.rpartition(".")[2]  # render.render, decide.decide
    user = {"render": "tests.vm.machine", "decide": "tests.vm.model"}[function]
    with patch.object(importlib.import_module(user), function, getattr(copy, function)):
        yield
