# SPDX-License-Identifier: Apache-2.0
"""The syntax of endpoints, the configuration file, and the options of the command line."""

from __future__ import annotations

import grp
import ipaddress
import os
import pwd
import re
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import imds_guard
from imds_guard.config.options import policy_from_options
from imds_guard.config.read import Config, load_config, parse_config
from imds_guard.config.store import save_config
from imds_guard.config.write import dump_config
from imds_guard.errors import BadPolicy, GuardError, UsageError
from imds_guard.identity import is_missing_group
from imds_guard.policy.builtin import BUILT_IN, WIRESERVER, host_network
from imds_guard.policy.endpoint_syntax import format_endpoint, parse_endpoint
from imds_guard.policy.model import Endpoint, Identities, Lock, Mode, Network, Policy, Verdict, make_policy
from imds_guard.policy.ports import ALL_PORTS, Ports, normal_ports

NO_DNS: Ports = ((0, 52), (54, 65535))
AZURE_DMI = "7783-7084-3265-9085-8269-3286-77"
USER = next((entry for entry in pwd.getpwall() if entry.pw_uid > 0), pwd.getpwuid(0))
GROUP = next((entry for entry in grp.getgrall() if entry.gr_gid not in (0, USER.pw_uid)), grp.getgrgid(0))


# --- the syntax of endpoints


@pytest.mark.parametrize(
    ("text", "network", "tcp", "udp"),
    [
        ("169.254.169.254", "169.254.169.254/32", NO_DNS, ()),
        ("fd00:ec2::254", "fd00:ec2::254/128", NO_DNS, ()),
        ("[fd00:ec2::254]", "fd00:ec2::254/128", NO_DNS, ()),
        ("[fd00:ec2::254]/128", "fd00:ec2::254/128", NO_DNS, ()),
        ("::ffff:169.254.169.254", "169.254.169.254/32", NO_DNS, ()),
        ("169.254.169.254,tcp", "169.254.169.254/32", NO_DNS, ()),
        ("169.254.169.254,udp", "169.254.169.254/32", (), NO_DNS),
        ("169.254.169.254,any", "169.254.169.254/32", NO_DNS, NO_DNS),
        ("168.63.129.16", "168.63.129.16/32", ((0, 52), (54, 66), (68, 65535)), ()),
        ("169.254.169.254:*", "169.254.169.254/32", ALL_PORTS, ALL_PORTS),
        ("169.254.169.254:80", "169.254.169.254/32", ((80, 80),), ((80, 80),)),
        ("169.254.0.0/16", "169.254.0.0/16", ALL_PORTS, ALL_PORTS),
        ("10.1.2.3", "10.1.2.3/32", ALL_PORTS, ALL_PORTS),
        ("10.1.2.3/32:80+443,tcp", "10.1.2.3/32", ((80, 80), (443, 443)), ()),
        ("10.0.0.0/8:8000-8100,udp", "10.0.0.0/8", (), ((8000, 8100),)),
        ("10.1.2.3:!53", "10.1.2.3/32", NO_DNS, NO_DNS),
        ("10.1.2.3:!0-52+54-65535,tcp", "10.1.2.3/32", ((53, 53),), ()),
        ("10.1.2.3:443+80-90+85-100,tcp", "10.1.2.3/32", ((80, 100), (443, 443)), ()),
        ("10.1.2.3:0", "10.1.2.3/32", ((0, 0),), ((0, 0),)),
        ("fd00::/8", "fd00::/8", ALL_PORTS, ALL_PORTS),
        ("[fd00::1]:80,tcp", "fd00::1/128", ((80, 80),), ()),
        ("[fd00::]/64:80,tcp", "fd00::/64", ((80, 80),), ()),
        ("[::ffff:10.0.0.0]/104", "10.0.0.0/8", ALL_PORTS, ALL_PORTS),
        ("0.0.0.0/0", "0.0.0.0/0", ALL_PORTS, ALL_PORTS),
        ("::/0", "::/0", ALL_PORTS, ALL_PORTS),
    ],
)
def test_a_text_means_an_endpoint(text: str, network: str, tcp: Ports, udp: Ports) -> None:
    assert Endpoint(ipaddress.ip_network(network), tcp, udp) == parse_endpoint(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is empty"),
        (" 10.0.0.1", "it contains white space"),
        ("10.0.0.1 :80", "it contains white space"),
        ("010.0.0.1", "a number with a leading zero"),
        ("10.0.0.01", "a number with a leading zero"),
        ("10.00.0.1", "a number with a leading zero"),
        ("::ffff:169.254.169.0254", "a number with a leading zero"),
        ("fe80::a9fe:a9fe%eth0", "leave out the scope"),
        ("[fe80::a9fe:a9fe%eth0]:80", "leave out the scope"),
        ("10.1.2.3/8", "write 10.0.0.0/8 for the whole prefix, 10.1.2.3 for the address"),
        ("fd00::1/64", "write fd00::/64 for the whole prefix, fd00::1 for the address"),
        ("[::ffff:10.1.2.3]/104", "write 10.0.0.0/8 for the whole prefix"),
        ("10.0.0.0/33", "'33' is not a prefix length (0 to 32)"),
        ("10.0.0.0/08", "'08' is not a prefix length"),
        ("10.0.0.0/", "'' is not a prefix length"),
        ("10.0.0.0/255.0.0.0", "'255.0.0.0' is not a prefix length"),
        ("fd00::/129", "'129' is not a prefix length (0 to 128)"),
        ("10.0.0.1:", "'' is not a port"),
        ("10.0.0.1:http", "'http' is not a port"),
        ("10.0.0.1:65536", "'65536' is not a port"),
        ("10.0.0.1:080", "'080' is not a port"),
        ("10.0.0.1:80+", "'' is not a port"),
        ("10.0.0.1:-80", "'' is not a port"),
        ("10.0.0.1:80,443", "'443' is not a protocol"),
        ("10.0.0.1:90-80", "90-80 runs backwards"),
        ("10.0.0.1:!0-65535", "no port is left"),
        ("10.0.0.1:!", "'' is not a port"),
        ("10.0.0.1:!*", "'*' is not a port"),
        ("10.0.0.1:\u0668\u0660", "is not a port"),
        ("10.0.0.1,sctp", "'sctp' is not a protocol"),
        ("10.0.0.1,", "'' is not a protocol"),
        ("10.0.0.1,tcp,udp", "'tcp,udp' is not a protocol"),
        ("10.0.0.1,TCP", "'TCP' is not a protocol"),
        (":80", "the address is missing"),
        ("/8", "the address is missing"),
        ("[]:80", "brackets are for IPv6 addresses only"),
        ("[10.0.0.1]:80", "brackets are for IPv6 addresses only"),
        ("[fd00::1", "may follow the brackets"),
        ("[fd00::1]80", "may follow the brackets"),
        ("fd00:ec2::254:80", "an IPv6 address with ports needs brackets: [fd00:ec2::254]:80"),
        ("fd00::/64:80", "an IPv6 address with ports needs brackets: [fd00::]/64:80"),
        ("metadata.google.internal", "host names are not looked up"),
        ("169.254.43518", "is not an IP address"),
        ("2852039166", "is not an IP address"),
        ("0xa9.254.169.254", "is not an IP address"),
        ("10.0.0.1:80:90", "is not an IP address"),
        ("fd00::g", "is not an IP address"),
        ("0.0.0.0", "the unspecified address"),
        ("::", "the unspecified address"),
        ("::ffff:0.0.0.0", "the unspecified address"),
    ],
)
def test_a_text_that_is_not_an_endpoint_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(BadPolicy) as caught:
        parse_endpoint(text)
    assert str(caught.value).startswith(f"{text!r} is not an endpoint: ")
    assert reason in str(caught.value)


@given(st.text(alphabet="0123456789abcdef.:/[],!+-*%tcpudany ", max_size=30))
@settings(max_examples=500)
def test_random_text_is_an_endpoint_or_one_sentence(text: str) -> None:
    message = ""
    try:
        found = parse_endpoint(text)
        assert found.tcp or found.udp
    except BadPolicy as error:
        message = str(error)
    assert message == "" or ("\n" not in message and message.startswith(repr(text)))


def _networks() -> st.SearchStrategy[Network]:
    v4 = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)).map(lambda n: ipaddress.IPv4Network(n, strict=False))
    v6 = st.tuples(st.integers(0, 2**128 - 1), st.integers(0, 128)).map(
        lambda n: ipaddress.IPv6Network(n, strict=False)
    )
    mapped = st.integers(0, 2**32 - 1).map(lambda n: ipaddress.IPv6Network((0xFFFF << 32) + n))
    known = st.sampled_from([host_network(entry.address) for entry in BUILT_IN])
    return st.one_of(v4, v6, mapped, known)


_port = st.integers(0, 65535)
_ranges = st.lists(st.tuples(_port, _port).map(lambda pair: (min(pair), max(pair))), max_size=5)
_ports: st.SearchStrategy[Ports] = st.one_of(st.sampled_from([(), ALL_PORTS, NO_DNS]), _ranges.map(normal_ports))


def policy_of(*endpoints: Endpoint) -> Policy:
    return make_policy([Lock("a", endpoints)])


@given(_networks(), _ports, _ports)
@settings(max_examples=300)
def test_an_endpoint_is_read_back_from_its_text(network: Network, tcp: Ports, udp: Ports) -> None:
    assume(tcp or udp)
    whole = int(network.network_address) & 0xFFFFFFFF or network.prefixlen not in (32, 128)
    assume(whole)  # make_policy() refuses the unspecified address
    endpoint = Endpoint(network, tcp, udp)
    texts = format_endpoint(endpoint)
    assert policy_of(endpoint) == policy_of(*map(parse_endpoint, texts))


@pytest.mark.parametrize(
    ("endpoint", "texts"),
    [
        (BUILT_IN[0].endpoint, ["169.254.169.254"]),
        (Endpoint(host_network(BUILT_IN[0].address), ALL_PORTS, ALL_PORTS), ["169.254.169.254:*"]),
        (Endpoint(host_network(BUILT_IN[0].address), ((80, 80),)), ["169.254.169.254:80,tcp"]),
        (Endpoint(ipaddress.ip_network("fd00::1"), NO_DNS, ((80, 80),)), ["[fd00::1]:!53,tcp", "[fd00::1]:80,udp"]),
        (Endpoint(ipaddress.ip_network("10.0.0.0/8"), ALL_PORTS, ALL_PORTS), ["10.0.0.0/8"]),
    ],
)
def test_the_text_of_an_endpoint_is_short(endpoint: Endpoint, texts: list[str]) -> None:
    assert texts == format_endpoint(endpoint)


# --- the configuration file

SMALL = """\
mode = "audit"

[lock.web]
endpoints = ["10.0.0.1:80,tcp"]
users = [0]
"""


def locks_of(config: Config) -> dict[str, Lock]:
    return {lock.name: lock for lock in config.policy.locks}


def test_a_small_file_is_read() -> None:
    config = parse_config(SMALL)
    endpoint = Endpoint(ipaddress.ip_network("10.0.0.1"), ((80, 80),))
    expected = make_policy([Lock("web", (endpoint,), Identities(frozenset({0})))], Mode.AUDIT)
    assert Config(expected, "closed", "auto", None) == config


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("mode = audit\n", 1, "this is not TOML"),
        ('mode = "enforce"\n[lock.a\n', 2, "this is not TOML"),
        ('modus = "audit"\n' + SMALL, 1, "unknown key 'modus' at the top"),
        (SMALL.replace("audit", "disabled"), 1, "mode = 'disabled' must be 'enforce' or 'audit'"),
        (SMALL.replace('"audit"', "true"), 1, "mode = True must be"),
        ('containers = "maybe"\n' + SMALL, 1, "containers = 'maybe' must be 'deny' or 'allow'"),
        ('on_error = "ignore"\n' + SMALL, 1, "on_error = 'ignore' must be 'closed' or 'open'"),
        ('backend = "nft"\n' + SMALL, 1, "backend = 'nft' must be"),
        ('cgroup = "system.slice"\n' + SMALL, 1, "must be an absolute path"),
        (SMALL + "user = [0]\n", 6, "unknown key 'user' in lock 'web'"),
        ('"" = 1\n' + SMALL, 1, "unknown key '' at the top"),
        (SMALL + '"" = 1\n', 6, "unknown key '' in lock 'web'"),
        (SMALL.replace("lock.web", 'lock.""'), 3, "'' is not a lock name"),
        (SMALL.replace("[0]", "0"), 5, "users = 0 must be a list"),
        (SMALL.replace("[0]", "[true]"), 5, "users contains True"),
        (SMALL.replace("[0]", "[1.5]"), 5, "users contains 1.5"),
        (SMALL.replace("[0]", "[4294967295]"), 5, "4294967295 is not a user ID"),
        (SMALL.replace("[0]", '["imds-guard-absent"]'), 5, "there is no user 'imds-guard-absent'"),
        (SMALL.replace("[0]", '[\n  "root",\n  "imds-guard-absent",\n]'), 7, "there is no user 'imds-guard-absent'"),
        (SMALL + 'groups = ["imds-guard-absent"]', 6, "there is no group 'imds-guard-absent'"),
        (SMALL.replace("[0]", '[{ name = "root" }]'), 5, "has a name (text) and an id (number) only"),
        (SMALL.replace("[0]", '[{ name = "root", id = 0, gid = 0 }]'), 5, "has a name (text) and an id (number) only"),
        (SMALL.replace("[0]", '[{ name = "root", id = true }]'), 5, "has a name (text) and an id (number) only"),
        (SMALL.replace("[0]", '[{ name = "root", id = 7 }]'), 5, "'root' was 7 when it was saved and is 0 now"),
        (SMALL.replace("[0]", "[]"), 3, "lock 'web' allows nobody"),
        (SMALL.replace("users = [0]", 'deny_users = [5]\ndefault = "deny"'), 3, "lock 'web' allows nobody"),
        (SMALL + "nobody = true\n", 6, "allows somebody, which contradicts nobody = true"),
        (SMALL.replace("users = [0]", 'nobody = true\ndefault = "allow"'), 5, "which contradicts nobody = true"),
        (SMALL + 'nobody = "no"\n', 6, "nobody = 'no' must be true or false"),
        (SMALL + "nobody = 1\n", 6, "nobody = 1 must be true or false"),
        (SMALL + 'default = "reject"\n', 6, "default = 'reject' must be 'deny' or 'allow'"),
        (SMALL.replace("10.0.0.1:80", "10.0.0.256:80"), 4, "'10.0.0.256:80,tcp' is not an endpoint"),
        (SMALL.replace('["10', '[\n"10.0.0.2",\n"300.1.1.1",\n"10'), 6, "'300.1.1.1' is not an endpoint"),
        (SMALL.replace('["10.0.0.1:80,tcp"]', '"10.0.0.1"'), 4, "endpoints = '10.0.0.1' must be a list of strings"),
        (SMALL.replace('["10.0.0.1:80,tcp"]', "[5]"), 4, "endpoints = [5] must be a list of strings"),
        (SMALL.replace('["10.0.0.1:80,tcp"]', "[]"), 3, "lock 'web' locks nothing"),
        (SMALL + 'preset = "amazon"\n', 6, "there is no preset 'amazon'"),
        (SMALL + "preset = 1\n", 6, "must be a list of strings"),
        (SMALL + '[lock.other]\nendpoints = ["10.0.0.1"]\nusers = [1]\n', 6, "both lock 10.0.0.1/32 tcp port 80"),
        (SMALL + "[lock.web]\n", 6, "this is not TOML"),
        (SMALL.replace("lock.web", 'lock."a\\tb"'), 3, "is not a lock name"),
        ('mode = "audit"\n', None, "no lock is described"),
        ("", None, "no lock is described"),
        ("lock = 1\n", 1, "locks are tables with a name"),
        ("[[lock]]\nusers = [0]\n", 1, "locks are tables with a name"),
        ("[lock]\nweb = 1\n", 2, "must be a table: write [lock.web]"),
        (SMALL.replace("10.0.0.1:80,tcp", "168.63.129.16:53,udp"), 4, "would lock port 53 of 168.63.129.16"),
        (SMALL.replace("10.0.0.1:80,tcp", "168.63.129.16:*"), 4, "would lock port 53 of 168.63.129.16"),
    ],
)
def test_an_error_is_one_sentence_with_file_and_line(text: str, line: int | None, expected: str) -> None:
    with pytest.raises(BadPolicy) as caught:
        parse_config(text, "/etc/x.toml")
    message = str(caught.value)
    assert message.startswith("/etc/x.toml: " if line is None else f"/etc/x.toml:{line}: "), message
    assert expected in message
    assert "\n" not in message
    assert caught.value.exit_status == 78


@pytest.mark.parametrize(
    ("keys", "default"),
    [
        ("users = [5]", Verdict.DENY),
        ("deny_users = [5]", Verdict.ALLOW),
        ("deny_groups = [5]", Verdict.ALLOW),
        ("deny_groups = [5]\ngroups = [6]", Verdict.DENY),
        ("nobody = true", Verdict.DENY),
        ("deny_users = [5]\nnobody = true", Verdict.DENY),
        ('groups = [6]\ndefault = "allow"', Verdict.ALLOW),
    ],
)
def test_the_default_is_deny_unless_there_are_only_deny_lists(keys: str, default: Verdict) -> None:
    config = parse_config(f'[lock.a]\nendpoints = ["10.0.0.1"]\n{keys}\n')
    assert default is config.policy.locks[0].default


def test_a_name_with_its_id_is_read() -> None:
    text = SMALL.replace("[0]", f'[{{ name = "{USER.pw_name}", id = {USER.pw_uid} }}]')
    text += f'groups = [{{ name = "{GROUP.gr_name}", id = {GROUP.gr_gid} }}]\n'
    config = parse_config(text)
    assert Identities(frozenset({USER.pw_uid}), frozenset({GROUP.gr_gid})) == config.policy.locks[0].allow
    assert config.warnings == ()


def test_boot_uses_the_stored_id_and_warns_when_the_name_has_another_now() -> None:
    entries = '[{ name = "root", id = 7 }, { name = "imds-guard-absent", id = 8 }, { name = "root", id = 0 }]'
    config = parse_config(SMALL.replace("[0]", entries), use_stored_ids=True)
    assert config.policy.locks[0].allow.users == {0, 7, 8}
    assert len(config.warnings) == 2
    assert "'root' was 7 when it was saved and is 0 now; the saved ID is used" in config.warnings[0]
    assert "'imds-guard-absent' was 8 when it was saved and is not known now" in config.warnings[1]


def test_a_deleted_account_is_a_warning() -> None:
    """Its stored ID is used, so that one deleted account stops no start and no upgrade."""
    config = parse_config(SMALL.replace("[0]", '[{ name = "imds-guard-absent", id = 7 }]'))
    assert config.policy.locks[0].allow.users == {7}
    assert config.warnings == (
        "users: 'imds-guard-absent' was 7 when it was saved and is not known now; the saved ID is used",
    )


NESTED = "[" * 2000 + "]" * 2000
MANY_DIGITS = f"0x{'f' * 8000}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"x = {NESTED}\n{SMALL}", "nested too deeply"),
        (
            SMALL.replace("[0]", f"[{MANY_DIGITS}]"),
            "(it can.t be used: Exceeds the limit|is not a user ID|users contains)",
        ),
        (
            SMALL.replace("[0]", f"[{{ name = {MANY_DIGITS}, id = 1 }}]"),
            "(it can.t be used: Exceeds the limit|is not a user ID|users contains)",
        ),
        (f'x = """\n{NESTED}\n"""\n{SMALL}', "unknown key 'x'"),
        (f'cgroup = "/sys\\u0000"\n{SMALL}', "must be an absolute path"),
        (f'cgroup = "/sys\\u001b[2J"\n{SMALL}', "must be an absolute path"),
    ],
    ids=["nested", "digits", "digits in an entry", "nested in a string", "a null byte", "an escape"],
)
def test_what_python_refuses_is_an_error_of_the_file(text: str, expected: str) -> None:
    """Python before 3.9.14 has no limit of digits: there it is one of our own sentences."""
    with pytest.raises(BadPolicy, match=expected):
        parse_config(text)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "large"])
def test_only_a_regular_file_of_some_mebibytes_is_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(1 << 30)
    expected = "it has more than 16 MiB" if kind == "large" else "it is not a regular file"
    with pytest.raises(BadPolicy, match=f"{path} could not be read: {expected}"):
        load_config(str(path))


def test_a_link_to_a_regular_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text(SMALL, encoding="utf-8")
    (tmp_path / "config.toml").symlink_to("other")
    assert load_config(str(tmp_path / "config.toml")) == parse_config(SMALL)


def test_a_preset_with_the_wireserver_becomes_two_locks() -> None:
    text = '[lock.cloud]\npreset = "default"\ngroups = [77]\ndeny_users = [0, 5]\ndeny_groups = [0, 6]\n'
    found = locks_of(parse_config(text, dmi_text=AZURE_DMI))
    assert set(found) == {"cloud", "wireserver"}
    assert found["cloud"].allow == Identities(groups=frozenset({77}))
    assert found["cloud"].deny == Identities(frozenset({0, 5}), frozenset({0, 6}))
    wireserver = found["wireserver"]
    assert [host_network(WIRESERVER)] == [endpoint.network for endpoint in wireserver.endpoints]
    assert wireserver.allow == Identities(frozenset({0}), frozenset({77}))
    assert wireserver.deny == Identities(frozenset({5}), frozenset({6}))
    assert set(locks_of(parse_config(text, dmi_text=""))) == {"cloud"}


def test_a_lock_of_only_the_wireserver_keeps_its_name_and_allows_root() -> None:
    found = locks_of(parse_config('[lock.mine]\npreset = ["wireserver"]\nnobody = true\n'))
    assert set(found) == {"mine"}
    assert found["mine"].allow == Identities(frozenset({0}))


def test_a_lock_can_have_presets_and_endpoints() -> None:
    text = '[lock.a]\npreset = ["ecs", "eks"]\nendpoints = ["10.0.0.1"]\nusers = [0]\n'
    networks = {str(endpoint.network) for endpoint in parse_config(text).policy.locks[0].endpoints}
    assert networks == {"169.254.170.2/32", "169.254.170.23/32", "fd00:ec2::23/128", "10.0.0.1/32"}


# --- the sample

SAMPLE = Path(imds_guard.__file__).parent / "data" / "config.toml"
NAMES = ("canAccessIP", "students", "deploy", "www-data", "ecs-tasks", "1002", "collectd", "monitoring")


def with_known_names(text: str) -> str:
    replaced = {
        "canAccessIP": GROUP.gr_name,
        "students": GROUP.gr_name,
        "deploy": USER.pw_name,
        "1002": str(USER.pw_uid),
        "www-data": USER.pw_name,
        "ecs-tasks": USER.pw_name,
        "collectd": USER.pw_name,
        "monitoring": GROUP.gr_name,
    }
    for name in NAMES:
        assert name in text
        text = text.replace(name, replaced[name])
    return text


def test_the_sample_is_the_default_policy_for_one_group() -> None:
    config = parse_config(with_known_names(SAMPLE.read_text()), dmi_text="")
    assert policy_from_options(groups=[GROUP.gr_name]) == config.policy
    assert (config.on_error, config.backend, config.cgroup) == ("closed", "auto", None)


def test_the_sample_is_usable_with_its_examples_uncommented() -> None:
    text = re.sub(r"(?m)^# (?=(?:\[|[a-z_]+ = ))", "", with_known_names(SAMPLE.read_text()))
    config = parse_config(text, dmi_text="")
    assert [(one.name, one.locks, one.rules.sets) for one in config.policy.filters] == [
        ("region", ("default",), ("no-credentials",))
    ]
    found = locks_of(config)
    assert set(found) == {"default", "task credentials", "nobody"}
    assert found["default"].deny
    assert not found["nobody"].allow


# --- writing it

_names = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")) | st.just(" "), min_size=1, max_size=12)
_ids = st.frozensets(st.one_of(st.integers(0, 0xFFFFFFFE), st.sampled_from([0, USER.pw_uid])), max_size=4)
_identities = st.builds(Identities, _ids, _ids)


@st.composite
def _policies(draw: st.DrawFn) -> Policy:
    names = draw(st.lists(_names, min_size=1, max_size=3, unique=True))
    addresses = draw(st.lists(st.integers(1, 2**32 - 1), min_size=len(names), max_size=len(names), unique=True))
    assume(int(WIRESERVER) not in addresses)
    locks = []
    for name, address in zip(names, addresses):
        tcp, udp = draw(_ports), draw(_ports)
        endpoint = Endpoint(ipaddress.IPv4Network(address), tcp or ((80, 80),), udp)
        default = draw(st.sampled_from(Verdict))
        locks.append(Lock(name, (endpoint,), draw(_identities), draw(_identities), default))
    return make_policy(locks, draw(st.sampled_from(Mode)), draw(st.sampled_from(Verdict)))


@given(_policies(), st.sampled_from(["closed", "open"]), st.sampled_from([None, '/sys/fs/cgroup/a "b"\\c']))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_written_configuration_is_read_back(policy: Policy, on_error: str, cgroup: str | None) -> None:
    config = Config(policy, on_error, "ebpf", cgroup, None if cgroup else "leave", cgroup is None)
    assert config == parse_config(dump_config(config))


def test_a_written_file_contains_names_with_their_ids() -> None:
    policy = policy_from_options(users=[USER.pw_name, "3999999991"], ips=["10.0.0.1"])
    text = dump_config(Config(policy))
    assert f'{{ name = "{USER.pw_name}", id = {USER.pw_uid} }}' in text
    assert "\n  3999999991,\n" in text


@pytest.mark.parametrize("options", [{"nobody": True}, {"users": ["0"]}, {"deny_users": ["5"]}])
def test_a_written_policy_of_the_command_line_is_read_back(options: dict[str, list[str]]) -> None:
    policy = policy_from_options(presets=["all", "ecs"], **options)  # type: ignore[arg-type]
    assert Config(policy) == parse_config(dump_config(Config(policy)))


def test_saving_replaces_the_file_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "config.toml"
    first, second = (Config(policy_from_options(users=[uid], ips=["10.0.0.1"])) for uid in ("1", "2"))
    save_config(first, str(path))
    save_config(second, str(path))
    assert second == load_config(str(path))
    assert os.listdir(path.parent) == ["config.toml"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_folder_that_cannot_be_created_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GuardError, match=r"file/config.toml could not be written: (EEXIST|ENOTDIR)"):
        save_config(Config(policy_from_options(nobody=True)), str(tmp_path / "file" / "config.toml"))


def test_a_missing_or_binary_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadPolicy, match=r"absent.toml could not be read: ENOENT \(No such file or directory\)"):
        load_config(str(tmp_path / "absent.toml"))
    (tmp_path / "latin.toml").write_bytes(b'mode = "\xe9"\n')
    with pytest.raises(BadPolicy, match=r"latin.toml: this is not TOML: byte 8 is not UTF-8"):
        load_config(str(tmp_path / "latin.toml"))


# --- the options of the command line


def test_options_make_one_lock_for_all_endpoints() -> None:
    policy = policy_from_options(users=["5"], groups=["6"], deny_groups=["7"], ips=["10.0.0.1"], presets=["aws"])
    (lock,) = policy.locks
    assert (lock.name, lock.default) == ("default", Verdict.DENY)
    assert (Identities(frozenset({5}), frozenset({6})), Identities(groups=frozenset({7}))) == (lock.allow, lock.deny)
    assert {"10.0.0.1/32", "169.254.169.254/32", "fd00:ec2::254/128"} == {str(e.network) for e in lock.endpoints}


def test_without_endpoints_the_defaults_of_the_machine_are_locked() -> None:
    names = [lock.name for lock in policy_from_options(groups=["6"], dmi_text=AZURE_DMI).locks]
    assert names == ["default", "wireserver"]
    assert [lock.name for lock in policy_from_options(groups=["6"]).locks] == ["default"]


@pytest.mark.parametrize("options", [{"groups": ["6"]}, {"nobody": True}, {"deny_users": ["0"]}])
def test_the_wireservers_lock_always_allows_root(options: dict[str, list[str]]) -> None:
    policy = policy_from_options(presets=["azure"], **options)  # type: ignore[arg-type]
    wireserver = {lock.name: lock for lock in policy.locks}["wireserver"]
    assert 0 in wireserver.allow.users
    assert 0 not in wireserver.deny.users


def test_only_deny_lists_mean_allow_by_default() -> None:
    (lock,) = policy_from_options(deny_users=["5"], ips=["10.0.0.1"]).locks
    assert (Verdict.ALLOW, Identities(frozenset({5}))) == (lock.default, lock.deny)
    (strict,) = policy_from_options(deny_users=["5"], nobody=True, ips=["10.0.0.1"]).locks
    assert strict.default is Verdict.DENY


def test_an_empty_allowlist_needs_the_option_nobody() -> None:
    with pytest.raises(UsageError, match="--nobody if that is meant"):
        policy_from_options(ips=["10.0.0.1"])
    with pytest.raises(UsageError, match="--nobody contradicts"):
        policy_from_options(users=["5"], nobody=True)
    (lock,) = policy_from_options(nobody=True, ips=["10.0.0.1"]).locks
    assert (Identities(), Verdict.DENY) == (lock.allow, lock.default)


@pytest.mark.parametrize(
    "options",
    [
        {"users": ["imds-guard-absent"]},
        {"users": ["0"], "ips": ["10.0.0.256"]},
        {"users": ["0"], "presets": ["amazon"]},
        {"users": ["0"], "ips": ["168.63.129.16:*"]},
        {"users": ["0"], "deny_groups": ["imds-guard-absent"]},
        {"groups": ["imds-guard-absent"]},
    ],
)
def test_an_argument_that_is_not_understood_is_a_bad_policy(options: dict[str, list[str]]) -> None:
    with pytest.raises(BadPolicy):
        policy_from_options(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"users": ["imds-guard-absent"]},
        {"deny_groups": ["imds-guard-absent"]},
        {"ips": ["10.0.0.256"]},
        {"ips": ["168.63.129.16:*"]},
    ],
)
def test_no_group_is_created_when_another_argument_is_wrong(options: dict[str, list[str]]) -> None:
    name = f"imdsgN{os.getpid()}"
    with pytest.raises(BadPolicy):
        policy_from_options(groups=[name], create_groups=True, **options)  # type: ignore[arg-type]
    assert is_missing_group(name)


def test_mode_and_containers_go_into_the_policy() -> None:
    policy = policy_from_options(users=["5"], mode=Mode.AUDIT, containers=Verdict.ALLOW)
    assert (policy.mode, policy.containers) == (Mode.AUDIT, Verdict.ALLOW)


def test_a_file_with_100000_users_is_read() -> None:
    listed = ", ".join(str(number) for number in range(200_000, 300_000))
    config = parse_config(SMALL.replace("[0]", f"[{listed}]"))
    assert config.policy.locks[0].allow.users == frozenset(range(200_000, 300_000))
