# SPDX-License-Identifier: Apache-2.0
"""Random policies and callers: decide(), eBPF and iptables give the same answer.

IMDS_GUARD_DIFFERENTIAL is the number of cases (default: 2,000), IMDS_GUARD_SEED the first seed.
"""

from __future__ import annotations

import ipaddress
import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from imds_guard.errors import NotPermitted, Unsupported
from imds_guard.kernel.sandbox import Sandbox
from imds_guard.policy.decide import Decision, Reason
from imds_guard.policy.model import Mode, unmapped
from tests.conformance.bench import EXPECTED_BACKENDS, serve_table
from tests.conformance.differential import CASES_OF_A_POLICY, Block, attempt_all, make_block
from tests.conformance.enforcers import ENFORCERS, Ebpf, Enforcer

CASES = int(os.environ.get("IMDS_GUARD_DIFFERENTIAL", "2000"))
TEST = "tests/conformance/test_differential.py"
FIRST_SEED = int(os.environ.get("IMDS_GUARD_SEED", "1"))

Running = tuple[Enforcer, Sandbox]


@pytest.fixture
def running(as_root: None, tmp_path: Path) -> Iterator[dict[str, Running]]:
    """Every backend that works here, each with its own sandbox."""
    with ExitStack() as stack:
        found: dict[str, Running] = {}
        for name, make in ENFORCERS.items():
            try:
                enforcer = stack.enter_context(make(tmp_path))
                sandbox = serve_table(stack.enter_context(enforcer.sandbox()))
                enforcer.apply(sandbox, make_block(FIRST_SEED).policy)
            except (Unsupported, NotPermitted):
                if name in EXPECTED_BACKENDS:
                    raise
                continue
            stack.callback(enforcer.remove, sandbox)
            found[name] = (enforcer, sandbox)
        if not found:
            pytest.skip("no backend works here")
        yield found


def test_same_answer(running: dict[str, Running]) -> None:
    """Every backend judges every caller as decide() does."""
    seeds = range(FIRST_SEED, FIRST_SEED + max(1, CASES // CASES_OF_A_POLICY))
    wrong = [line for seed in seeds for line in _disagreements(make_block(seed), running)]
    assert wrong == []


def _disagreements(block: Block, running: dict[str, Running]) -> list[str]:
    answers = {name: _answers(block, *one) for name, one in running.items()}
    return [
        f"IMDS_GUARD_SEED={block.seed} IMDS_GUARD_DIFFERENTIAL=1 ./run test tests/conformance/test_differential.py"
        f"  # case {number}: {decision}, {name} gives {answers[name][number]}: {block.attempts[number]}"
        for number, decision in enumerate(block.decisions())
        for name, (enforcer, _) in running.items()
        if not _agree(decision.allowed, answers[name][number], enforcer)
    ]


def test_same_answer_with_filters(running: dict[str, Running]) -> None:
    """Each caller reaches the endpoint, the filter that decide() names for this target, or nothing.

    iptables refuses some of the policies: those with a filter for IPv6 alone.
    """
    seeds = range(FIRST_SEED, FIRST_SEED + max(1, CASES // CASES_OF_A_POLICY // 4))
    wrong, met = list[str](), set[str]()
    for seed, (name, one) in itertools.product(seeds, running.items()):
        block = make_block(seed, filters=True)
        try:
            answers = _reached(block, *one)
        except Unsupported:
            if name == "ebpf":
                raise
            continue
        for number, (decision, got) in enumerate(zip(block.decisions(), answers)):
            if got != _expected(block, number, decision, one[0], got):
                again = f"IMDS_GUARD_SEED={seed} IMDS_GUARD_DIFFERENTIAL=1 ./run test {TEST}"
                wrong.append(
                    f"{again}  # with filters, case {number}: {decision}, {name}: {got}: {block.attempts[number]}"
                )
            elif got.startswith("filter "):
                met.add(name)
    assert wrong == []
    assert met == set(running) or CASES < 2000


def _expected(block: Block, number: int, decision: Decision, enforcer: Enforcer, got: str) -> str:
    to = block.attempts[number]
    if decision.reason is Reason.FILTERED and block.policy.mode is Mode.ENFORCE:
        if ":" not in to.to or "::ffff:" in to.to or isinstance(enforcer, Ebpf):
            return f"{decision.filter} for {unmapped(ipaddress.ip_address(to.to))} port {to.port}"
    elif decision.allowed:
        return "connected"
    return got if got in enforcer.refusals else "a refusal"


def _reached(block: Block, enforcer: Enforcer, sandbox: Sandbox) -> list[str]:
    """What answered each attempt: a filter with its target, or what attempt_all() says."""
    enforcer.apply(sandbox, block.policy)
    names = {
        str(one.address): f"{one.filter} for {one.target.address} port {one.target.port}"
        for one in enforcer.listeners()
    }
    pid = enforcer.serve_filters(sandbox)
    try:
        answers = sandbox.call(lambda: attempt_all(block.attempts, listen=True), timeout_s=120)
    finally:
        sandbox.end(pid)
    return [names.get(one, one) for one in answers]


def _agree(allowed: bool, answer: str, enforcer: Enforcer) -> bool:
    return answer == "connected" if allowed else answer in enforcer.refusals


def _answers(block: Block, enforcer: Enforcer, sandbox: Sandbox) -> list[str]:
    enforcer.apply(sandbox, block.policy)
    return sandbox.call(lambda: attempt_all(block.attempts), timeout_s=120)


def test_the_generator_covers_every_reason() -> None:
    """The generator makes allowed and denied callers, for every reason. The same seed gives the same block."""
    blocks = [make_block(seed) for seed in range(1, 41)]
    decisions = [decision for block in blocks for decision in block.decisions()]
    assert {decision.reason.label for decision in decisions} == {
        "not-locked",
        "allowed-user",
        "allowed-group",
        "default-allow",
        "denied-user",
        "denied-group",
        "not-listed",
    }
    assert 0.2 < sum(decision.allowed for decision in decisions) / len(decisions) < 0.8
    assert make_block(7) == make_block(7)
