# SPDX-License-Identifier: Apache-2.0
"""The commands' text and JSON: what is in them, and how wide the text is."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from imds_guard.backends.choose import BackendCheck
from imds_guard.backends.ebpf import EbpfBackend, State
from imds_guard.backends.ebpf.hooks import Attached, Hook
from imds_guard.backends.forwarded import Forwarding
from imds_guard.commands.all_guards import GuardFound
from imds_guard.commands.look import CheckResult, Status
from imds_guard.commands.outcome import Outcome
from imds_guard.commands.place import Place
from imds_guard.commands.preflight import Preflight, ShutOut
from imds_guard.commands.surroundings import ConfigFile, Surroundings, WrongLine
from imds_guard.connections.values import Connection, Holder
from imds_guard.errors import Unsupported
from imds_guard.policy.decide import Caller, Decision, Destination, Reason, decide
from imds_guard.policy.emergency import emergency_policy
from imds_guard.policy.endpoint_syntax import parse_endpoint
from imds_guard.policy.filters import Filter, FilterRules
from imds_guard.policy.model import Identities, Lock, Mode, Policy, Protocol, Verdict, make_policy
from imds_guard.present import answers
from imds_guard.present import guards as guards_text
from imds_guard.present import outcome as outcome_text
from imds_guard.present import policy as policy_text
from imds_guard.present import status as status_text
from imds_guard.present import surroundings as surroundings_text
from imds_guard.present.connections import connection_text

FOO = Identities(frozenset([41_001]))
ROOT = Identities(frozenset([0]), frozenset([0]))
LONG = "that goes on for much longer than anybody would like to read on one line of a terminal, or of a mail, or a log"


def lock(allow: Identities = FOO, *words: str, **more: Any) -> Lock:
    return Lock("web", tuple(map(parse_endpoint, words or ("192.0.2.1",))), allow, **more)


def fits(lines: list[str]) -> bool:
    return max(map(len, lines)) <= 80


# --- identities and locks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("who", "text"),
    [
        (Identities(), "nobody"),
        (FOO, "user 41001"),
        (ROOT, "user root (0), group root (0)"),
        (Identities(groups=frozenset([51_002, 51_001])), "group 51001, group 51002"),
    ],
)
def test_identities(who: Identities, text: str) -> None:
    """Names with their IDs, IDs alone where there is no name, in ascending order."""
    assert policy_text.identities_text(who) == text


@pytest.mark.parametrize(
    ("users", "groups", "more"), [(12, 0, 0), (13, 0, 1), (0, 40, 28), (11, 2, 1), (12, 1, 1), (100_000, 5, 99_993)]
)
def test_of_many_identities_some_are_shown_and_the_rest_is_counted(users: int, groups: int, more: int) -> None:
    who = Identities(frozenset(range(41_000, 41_000 + users)), frozenset(range(510_000, 510_000 + groups)))
    text = policy_text.identities_text(who)
    shown, _, rest = text.partition(", and ")
    assert len(shown.split(", ")) == min(users + groups, 12)
    assert rest == (f"{more} more" if more else "")


def test_a_lock_says_who_gets_through() -> None:
    assert policy_text.lock_lines(lock()) == ["lock web", "  endpoints: 192.0.2.1", "  allowed:   user 41001"]
    assert policy_text.lock_lines(lock(Identities()))[-1] == "  allowed:   nobody"
    denied = lock(Identities(), deny=ROOT, default=Verdict.ALLOW)
    assert policy_text.lock_lines(denied)[2:] == [
        "  denied:    user root (0), group root (0)",
        "  allowed:   everyone else",
    ]
    both = lock(FOO, deny=ROOT, default=Verdict.ALLOW)
    assert policy_text.lock_lines(both)[2:] == [
        "  denied:    user root (0), group root (0)",
        "  allowed:   user 41001",
        "  others:    allowed",
    ]


def test_long_lists_are_wrapped_and_no_endpoint_is_broken() -> None:
    """People copy endpoints into --ip."""
    words = [f"[2001:db8:1234:5678:9abc:def0:1234:{n:x}]:8000-8100+9000-9100,tcp" for n in range(12)]
    lines = policy_text.lock_lines(lock(FOO, *words))
    assert fits(lines)
    assert [word for word in words if not any(line.strip(", ").endswith(word) for line in lines)] == []


def test_an_endpoint_longer_than_a_line_stays_whole() -> None:
    ports = "+".join(str(port) for port in range(1000, 1040, 2))
    assert f"192.0.2.1:{ports},tcp" in "\n".join(policy_text.lock_lines(lock(FOO, f"192.0.2.1:{ports},tcp")))


def test_a_policy_as_values() -> None:
    policy = make_policy([lock(ROOT, "192.0.2.1:80,tcp")], Mode.AUDIT, Verdict.ALLOW)
    assert policy_text.policy_values(policy) == {
        "mode": "audit",
        "containers": "allow",
        "strict": False,
        "locks": [
            {
                "name": "web",
                "endpoints": ["192.0.2.1:80,tcp"],
                "allow": {"users": [{"id": 0, "name": "root"}], "groups": [{"id": 0, "name": "root"}]},
                "deny": {"users": [], "groups": []},
                "default": "deny",
            }
        ],
        "filters": [],
        "filter_user": None,
    }
    assert policy_text.policy_values(None) is None


FILTERED = make_policy(
    [lock(ROOT, "192.0.2.1:80,tcp", "[2001:db8::1]:80")],
    filters=[
        Filter("region", ("web",), FOO, rules=FilterRules(("GET /a",), ("/b",), "ec2-metadata-filter", (), True, True)),
        Filter("rest", ("web",), Identities(), everyone=True, rules=FilterRules(("GET /c",))),
    ],
    filter_uid=3_999_990,
)


def test_filters_say_whom_they_serve_and_what() -> None:
    region, rest = FILTERED.filters
    assert policy_text.filter_lines(region, FILTERED) == [
        "filter region (audit: passes on what it would refuse)",
        "  serves:    192.0.2.1:80, [2001:db8::1]:80",
        "  callers:   user 41001",
        "  passes:    GET /a",
        "  refuses:   /b",
        "  requires:  headers as ec2-metadata-filter, a token of IMDSv2",
    ]
    assert policy_text.filter_lines(rest, FILTERED)[2:] == [
        "  callers:   everyone who is not allowed",
        "  passes:    GET /c",
    ]


def test_rules_of_a_filter_are_not_broken_and_sets_are_named() -> None:
    rules = FilterRules(tuple(f"GET /latest/meta-data/{n}" for n in range(20)), sets=("no-credentials",))
    one = FILTERED.filters[1]._replace(rules=rules)
    lines = policy_text.filter_lines(one, FILTERED)[3:]
    assert lines[0] == "  rules:     no-credentials"
    assert fits(lines)
    assert [line for line in lines if line.endswith("GET")] == []
    assert lines[-1].endswith("and 8 more")


def test_filters_as_values() -> None:
    values = policy_text.policy_values(FILTERED)
    assert values is not None
    assert values["filter_user"] == 3_999_990
    assert values["filters"][0] == {
        "name": "region",
        "locks": ["web"],
        "serves": ["192.0.2.1:80", "[2001:db8::1]:80"],
        "everyone": False,
        "callers": {"users": [{"id": 41001, "name": "41001"}], "groups": []},
        "rules": [],
        "allow": ["GET /a"],
        "deny": ["/b"],
        "headers": "ec2-metadata-filter",
        "user_agents": [],
        "require_imdsv2": True,
        "mode": "audit",
    }


# --- outcomes -------------------------------------------------------------------------------------------------------


def test_an_outcome() -> None:
    policy = make_policy([lock(FOO, "192.0.2.1", "192.0.2.2")])
    lines = outcome_text.outcome_lines(Outcome("ebpf", policy, ["did this " + LONG], [], Preflight()))
    assert "imds-guard is active (ebpf): 2 endpoints locked" in lines
    assert fits(lines)
    one = outcome_text.outcome_lines(Outcome("iptables", make_policy([lock()], Mode.AUDIT), [], [], Preflight()))
    assert one[0] == "imds-guard is active in audit mode, which denies nobody (iptables): 1 endpoint locked"


def test_warnings_of_an_outcome() -> None:
    """The backend's warnings, locks that let nobody through, and clients that are shut out."""
    policy = make_policy([lock(Identities())])
    shut_out = (ShutOut(7, "waagent", "root", "is why"), ShutOut(None, "cloud-init", "root", "is why, too"))
    assert outcome_text.outcome_warnings(Outcome("ebpf", policy, [], ["first"], Preflight(shut_out))) == [
        "first",
        "lock web lets nobody through, root included",
        "waagent (pid 7, user root) is shut out: it is why",
        "cloud-init is shut out: it is why, too",
    ]
    lenient = make_policy([lock(Identities(), deny=FOO, default=Verdict.ALLOW)])
    assert outcome_text.outcome_warnings(Outcome("ebpf", lenient, [], [], Preflight())) == []


# --- connections ----------------------------------------------------------------------------------------------------


def test_some_of_many_holders_are_named() -> None:
    ends = ((ipaddress.ip_address("192.0.2.1"), 40000), (ipaddress.ip_address("192.0.2.2"), 80))
    holders = tuple(Holder(pid, "curl", "bob") for pid in range(1, 6))
    one = Connection(Protocol.TCP, *ends, holders, "bob", 1, "why")
    assert connection_text(one) == (
        "curl (pid 1, user bob), curl (pid 2, user bob), curl (pid 3, user bob), and 2 more: "
        "tcp 192.0.2.1:40000 -> 192.0.2.2:80"
    )


# --- status ---------------------------------------------------------------------------------------------------------


def state(**more: Any) -> State:
    ours = Attached(11, "ig_c4_01234567", "01234567")
    values = {
        "cgroup": "/sys/fs/cgroup",
        "cgroup_is_root": True,
        "pins": "/sys/fs/bpf/imds-guard",
        "generation": 2,
        "policy": None,
        "hooks": (Hook("connect4", (Attached(9, "", None), ours), 11), Hook("connect6", ())),
        "counters": ((0, 0),) * len(Reason),
        "faults": (),
    }
    return State(**{**values, **more})


POLICY: Policy = make_policy([lock()])


@pytest.mark.parametrize(
    ("status", "word"),
    [
        (Status(None, None, []), "inactive"),
        (Status("ebpf", POLICY, []), "active"),
        (Status("ebpf", POLICY, ["one"]), "degraded"),
        (Status("ebpf", None, ["unreadable"]), "degraded"),
        (Status(None, None, ["something is left"]), "degraded"),
    ],
)
def test_the_word_for_a_status(status: Status, word: str) -> None:
    """A fault counts whether or not anything is in force: it never looks like "active" or "inactive"."""
    assert status_text.status_word(status) == word
    assert status_text.status_lines(status)[0].startswith(f"imds-guard: {word}")
    assert status_text.status_values(status)["state"] == word


def test_faults_come_first_and_are_wrapped() -> None:
    lines = status_text.status_lines(Status("ebpf", POLICY, ["a fault " + LONG], state()))
    assert lines[0] == "imds-guard: degraded (ebpf)"
    assert lines[1].startswith("  fault: a fault that goes on")
    assert fits(lines)


def test_audit_mode_is_on_the_first_line() -> None:
    lines = status_text.status_lines(Status("ebpf", make_policy([lock()], Mode.AUDIT), []))
    assert lines[0] == "imds-guard: active (ebpf), audit mode: nobody is denied"


def test_hooks_show_other_programs_in_their_order() -> None:
    lines = status_text.status_lines(Status("ebpf", POLICY, [], state()), verbose=True)
    assert "attached to: /sys/fs/cgroup, every process of the machine" in lines
    assert "version: 01234567, generation 2" in lines
    assert "  connect4: (unnamed) (id 9), ig_c4_01234567 (id 11) [ours]" in lines
    assert "  connect6: nothing attached" in lines
    assert "connects to locked endpoints: none yet" in lines


def test_only_verbose_has_hooks_and_versions() -> None:
    lines = status_text.status_lines(Status("ebpf", POLICY, [], state()))
    assert "attached to: /sys/fs/cgroup, every process of the machine" in lines
    assert [line for line in lines if "connect4" in line or "version" in line or "id " in line] == []


def test_counters_are_shown_by_reason() -> None:
    counts = [(0, 0)] * len(Reason)
    counts[Reason.NOT_LISTED], counts[Reason.ALLOWED_USER] = (3, 2), (1, 0)
    found = state(counters=tuple(counts))
    lines = status_text.status_lines(Status("ebpf", POLICY, [], found))
    assert "connects to locked endpoints: allowed-user 1, not-listed 5 (2 let through by audit mode)" in "\n".join(
        lines
    ).replace("\n                              ", " ")
    values = status_text.status_values(Status("ebpf", POLICY, [], found))["ebpf"]["counters"]
    assert values["not-listed"] == {"enforced": 3, "audited": 2}
    assert set(values) == {reason.label for reason in Reason}


def test_many_locks_are_counted() -> None:
    policy = make_policy(Lock(f"lock {n:02}", (parse_endpoint(f"192.0.2.{n}"),), FOO) for n in range(1, 15))
    lines = status_text.status_lines(Status("ebpf", policy, []), verbose=True)
    assert lines[-1] == "and 2 more locks (--json has them all)"
    assert sum(line.startswith("lock ") for line in lines) == 12
    screen = status_text.status_lines(Status("ebpf", policy, []))
    assert len(screen) <= status_text.SCREEN_LINES
    assert (screen[-1], sum(line.startswith("lock ") for line in screen)) == (
        "and 8 more locks (--json has them all)",
        6,
    )
    assert len(status_text.status_values(Status("ebpf", policy, []))["policy"]["locks"]) == 14


def test_every_other_guard_has_a_line() -> None:
    """Three of them; and what stop has left."""
    found = [
        GuardFound(backends=("iptables",), policy=make_policy([lock()], Mode.AUDIT), since=0.0),
        GuardFound("/sys/fs/cgroup/\x1b[2J", 7, ("ebpf",), emergency_policy("")),
        GuardFound(None, 8, ("ebpf",), fault="the path of its cgroup is not known here"),
        GuardFound("/sys/fs/cgroup/b", 9, ("ebpf",), POLICY),
        GuardFound(None, 10, pins="/sys/fs/bpf/imds-guard-10"),
    ]
    lines = guards_text.other_guard_lines(found, with_gone=True)
    assert fits(lines)
    text = " ".join(" ".join(lines).split())
    assert "also locked: the machine (iptables): 1 endpoint, audit mode, since 1970-01-01 00:00:00 UTC" in text
    assert "also locked: /sys/fs/cgroup/\\x1b[2J (ebpf): " in text
    assert "endpoints, emergency lock" in text
    assert "also locked: the cgroup with ID 8 (ebpf): the path of its cgroup is not known here" in text
    assert "and 1 more guard (--json has them all)" in text
    assert "left: pins of guards whose cgroup is gone (ID 10)" in text
    assert "left: " not in " ".join(guards_text.other_guard_lines(found, with_gone=False))
    states = [guards_text.guard_values(one)["state"] for one in found]
    assert states == ["in-force", "in-force", "unreadable", "in-force", "gone"]
    assert guards_text.left_warnings([]) == []
    (left,) = guards_text.left_warnings(found[2:])
    assert left == (
        "still locked: the cgroup with ID 8, /sys/fs/cgroup/b; left: pins of guards whose cgroup is gone (ID 10); "
        "imds-guard stop --all removes every guard"
    )


@pytest.mark.parametrize(
    ("unit", "file", "said"),
    [
        (None, ConfigFile("/c"), ["at boot: systemd is not the init here", "file: there is no /c"]),
        (
            "enabled",
            ConfigFile("/c", True, is_in_force=True),
            ["service is enabled", "/c says what is in force"],
        ),
        (
            "disabled",
            ConfigFile("/c", True, is_in_force=False),
            ["is disabled: nothing is locked", "another policy"],
        ),
        ("unknown", ConfigFile("/c", True), ["systemd does not say", "only the name service knows"]),
        (
            "enabled",
            ConfigFile("/c", True, "/c:2: bad", WrongLine("/c", 2, "x" * 200)),
            ["unusable: /c:2: bad", "line 2: x"],
        ),
    ],
)
def test_the_boot_state_and_the_file(unit: str | None, file: ConfigFile, said: list[str]) -> None:
    seen = Surroundings(None, (), unit, file, None)
    lines = surroundings_text.surroundings_lines(seen, in_force=True)
    assert fits(lines)
    assert [text for text in said if text not in " ".join(" ".join(lines).split())] == []


# --- explain and check ----------------------------------------------------------------------------------------------


def explained(policy: Policy, caller: Caller, to: str = "192.0.2.1", place: Place | None = None) -> list[str]:
    destination = Destination(parse_endpoint(to).network.network_address, 80)
    return answers.decision_lines(caller, destination, decide(policy, caller, destination), place or Place())


def test_an_explanation() -> None:
    assert explained(make_policy([lock(ROOT)]), Caller(41_001, 51_001, frozenset([0, 51_001]))) == [
        "allowed: allowed-group",
        "  caller:      fsuid 41001, fsgid 51001",
        "  groups:      root (0), 51001",
        "  destination: 192.0.2.1:80 tcp",
        "  lock:        web",
        "  by:          group root (0) on the list",
    ]


def test_an_explanation_of_what_is_not_locked() -> None:
    lines = explained(POLICY, Caller(0, 0), "2001:db8::1")
    assert lines[0] == "allowed: not-locked"
    assert lines[2:] == ["  groups:      none", "  destination: [2001:db8::1]:80 tcp", "  lock:        none"]


def test_an_explanation_of_a_container_whose_packets_are_forwarded() -> None:
    """An allowed caller is told that the packets are rejected; for an address that is not locked that is not so."""
    place = Place("docker:0123456789ab", Forwarding.REJECTED)
    policy = make_policy([lock(ROOT)])
    lines = explained(policy, Caller(0, 0), place=place)
    assert lines[0] == "allowed: allowed-user"
    assert lines[3] == "  container:   docker:0123456789ab"
    text = " ".join(" ".join(lines).split())
    assert "forwarded: the process is in another network namespace; packets of it that this machine forwards" in text
    assert "to a locked port are rejected, whatever the decision above" in text
    assert fits(lines)
    assert "forwarded" not in "".join(explained(policy, Caller(0, 0), "2001:db8::1", place))


def test_an_explanation_under_audit() -> None:
    """It says that audit mode lets the connect through, and which rule would deny it."""
    lines = explained(make_policy([lock()], Mode.AUDIT), Caller(0, 0))
    assert lines[0] == "allowed: not-listed"
    assert lines[-1] == "  audit mode lets it through"


def test_many_groups_are_counted() -> None:
    lines = explained(POLICY, Caller(0, 0, frozenset(range(51_000, 51_100))))
    assert "51010, 51011, and 88 more" in " ".join(" ".join(lines).split())
    assert fits(lines)


def test_an_explanation_as_values() -> None:
    caller, destination = (
        Caller(1, 2, frozenset([3]), user_namespace_is_initial=False),
        Destination(parse_endpoint("192.0.2.1").network.network_address, 443),
    )
    decision = Decision(False, Reason.CONTAINER, "web")
    place = Place("docker:0123456789ab", Forwarding.REJECTED)
    assert answers.decision_values(caller, destination, decision, place) == {
        "allowed": False,
        "reason": "container",
        "lock": "web",
        "filter": None,
        "matched": None,
        "caller": {"fsuid": 1, "fsgid": 2, "groups": [3], "in_container": True},
        "container": "docker:0123456789ab",
        "forwarded": "rejected",
        "destination": {"address": "192.0.2.1", "port": 443, "protocol": "tcp"},
    }


def test_the_answer_of_check() -> None:
    refused = BackendCheck(EbpfBackend(), Unsupported("a reason " + LONG))
    none = CheckResult([refused], Preflight((ShutOut(7, "waagent", "root", "is " + LONG),)))
    lines = answers.check_lines(none)
    assert lines[0].startswith("ebpf: a reason that goes on")
    assert "start would fail: no backend works here" in lines
    assert fits(lines)
    assert answers.check_values(none)["taken"] is None
    good = CheckResult([BackendCheck(EbpfBackend(), None)], Preflight())
    assert answers.check_lines(good) == ["ebpf: works here", "start would take: ebpf"]


# --- the built-in table ---------------------------------------------------------------------------------------------


def test_the_table_of_endpoints() -> None:
    """A star marks what is locked here; every source is there, and the legend."""
    rows = answers.endpoint_rows("Alibaba Cloud")
    lines = answers.endpoint_lines(rows)
    starred = {line[2:] for line in lines[:-1] if line.startswith("* ")}
    assert "100.100.100.200" in starred
    assert "169.254.169.254" in starred
    assert not {word for word in starred if word.startswith(("168.63.129.16", "169.254.170."))}
    assert lines[-1] == "* locked on this machine when nothing else is asked for"
    text = " ".join(" ".join(lines).split())
    assert all(service["source"] in text for row in rows for service in row["services"])
