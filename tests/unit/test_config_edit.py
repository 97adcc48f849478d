# SPDX-License-Identifier: Apache-2.0
"""--save to a file that a person wrote: the policy changes, and everything else in the file stays."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import imds_guard
from imds_guard.commands.boot import with_config
from imds_guard.commands.options import GuardOptions
from imds_guard.commands.save import save
from imds_guard.config import edit as config_edit
from imds_guard.config.options import policy_from_options
from imds_guard.config.read import Config, load_config, parse_config
from imds_guard.config.source import parse_source
from imds_guard.config.store import check_saving_to, save_config
from imds_guard.config.write import dump_config
from imds_guard.errors import BadPolicy, GuardError, Unsupported
from imds_guard.policy.model import Identities, Lock, Policy, Verdict, make_policy
from tests import strategies

tomlkit = pytest.importorskip("tomlkit")
keeps_lists = pytest.mark.skipif(
    tuple(int(part) for part in tomlkit.__version__.split(".")[:2]) < (0, 11),
    reason="tomlkit before 0.11 can't remove a line from a list, so the list is written anew",
)

SAMPLE = (
    (Path(imds_guard.__file__).parent / "data" / "config.toml")
    .read_text(encoding="utf-8")
    .replace('groups = ["canAccessIP"]', "groups = [51001]")
)
CLOUD = "7783-7084-3265-9085-8269-3286-77"
"""DMI of an Azure machine, where the default preset contains the WireServer."""

HAND_MADE = """\
# Who may reach it. Ask ops before you change this.
mode = "enforce"   # since March

# the two of us
[lock.web]
endpoints = ["192.0.2.1:80,tcp"] # the old address
users = [
    # on call
    41001,   # Ada
    41002,   # Ben
    "root",
]
groups = [51001]

# and the batch jobs
[lock."batch jobs"]
endpoints = ["192.0.2.2"]
nobody = true
"""


def edited_text(text: str, config: Config) -> str:
    """A file without drop-ins, changed."""
    return config_edit.edit(parse_source(text, "config"), config)["config"]


def comments(text: str) -> list[str]:
    """Every comment of a text that has no # in its strings."""
    return ["#" + line.partition("#")[2] for line in text.splitlines() if "#" in line]


def changed(text: str, users: list[int], lock: str = "web") -> str:
    """The text with other users in a lock."""
    before = parse_config(text)
    locks = [
        one._replace(allow=Identities(frozenset(users), one.allow.groups)) if one.name == lock else one
        for one in before.policy.locks
    ]
    wanted = before._replace(policy=make_policy(locks))
    edited = edited_text(text, wanted)
    assert parse_config(edited) == wanted
    return edited


def commented(text: str) -> str:
    """A written configuration, with a comment above each header of a table, and one on its line."""
    lines = []
    for number, line in enumerate(text.splitlines()):
        if line.startswith("["):
            lines += [f"# above {number}", f"{line} # behind {number}"]
        else:
            lines.append(line)
    return "# top\n" + "\n".join(lines) + "\n# end\n"


configurations = st.builds(
    Config,
    strategies.policies(),
    st.sampled_from(["closed", "open"]),
    st.sampled_from(["auto", "ebpf"]),
    st.sampled_from([None, "/sys/fs/cgroup/a"]),
)


def can_be_written(config: Config) -> bool:
    """False for a policy without a lock, and for one whose lock of the WireServer denies root."""
    try:
        return parse_config(dump_config(config)) == config
    except GuardError:
        return False


usable = configurations.filter(can_be_written)


@given(usable, usable)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_any_configuration_can_become_any_other(before: Config, after: Config) -> None:
    """The two have names of locks in common, so tables are kept, changed, removed and added."""
    edited = edited_text(commented(dump_config(before)), after)
    assert parse_config(edited, use_stored_ids=True) == after
    assert edited.startswith("# top\n")


@given(usable)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_a_file_that_already_means_the_configuration_is_not_changed(config: Config) -> None:
    """Not one byte."""
    text = commented(dump_config(config))
    assert edited_text(text, config) == text


@keeps_lists
def test_one_user_added_and_one_removed_leave_all_other_lines() -> None:
    """Comments stay, except on the line of the removed user."""
    edited = changed(HAND_MADE, [0, 41001, 41003])
    gone = ["    41002,   # Ben"]
    assert [line for line in HAND_MADE.splitlines() if line not in edited.splitlines()] == gone
    assert [line.strip() for line in edited.splitlines() if line not in HAND_MADE.splitlines()] == ["41003,"]


def test_a_new_key_is_in_its_table_before_the_next_comment() -> None:
    """tomlkit alone would put it between the next table's comment and header."""
    edited = changed(HAND_MADE, [41009], "batch jobs")
    assert comments(edited) == comments(HAND_MADE)
    assert edited.splitlines()[-5:] == [
        '[lock."batch jobs"]',
        "users = [",
        "  41009,",
        "]",
        'endpoints = ["192.0.2.2"]',
    ]


def test_new_keys_at_the_top_follow_the_existing_ones() -> None:
    before = parse_config(HAND_MADE)
    wanted = before._replace(backend="iptables", policy=Policy(before.policy.locks, containers=Verdict.ALLOW))
    edited = edited_text(HAND_MADE, wanted)
    assert parse_config(edited) == wanted
    added = ['containers = "allow"', 'backend = "iptables"']
    assert sorted(edited.splitlines()[2:4]) == sorted(added)
    assert [line for line in edited.splitlines() if line not in added] == HAND_MADE.splitlines()


@keeps_lists
def test_a_new_lock_is_at_the_end_and_a_removed_one_is_gone() -> None:
    before = parse_config(HAND_MADE)
    kept = next(one for one in before.policy.locks if one.name == "web")
    more = kept._replace(
        name="192.0.2.9",
        endpoints=parse_config(HAND_MADE.replace("192.0.2.1", "192.0.2.9")).policy.locks[1].endpoints,
    )
    edited = edited_text(HAND_MADE, before._replace(policy=make_policy([kept, more])))
    table = HAND_MADE[: HAND_MADE.index("# and the batch jobs")]
    assert edited.startswith(table)
    assert '[lock."192.0.2.9"]' in edited[len(table) :]
    assert '[lock."batch jobs"]' not in edited


@pytest.mark.parametrize("dmi", ["", CLOUD])
def test_a_preset_stays_while_it_means_the_wanted_locks(dmi: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it means two locks and the lists of both have changed."""
    monkeypatch.setattr("imds_guard.config.read.read_dmi_text", lambda: dmi)
    before = parse_config(SAMPLE)
    assert len(before.policy.locks) == (2 if dmi else 1)
    locks = [one._replace(allow=Identities(one.allow.users | {41001}, one.allow.groups)) for one in before.policy.locks]
    edited = edited_text(SAMPLE, before._replace(policy=make_policy(locks)))
    assert parse_config(edited).policy.locks == tuple(locks)
    assert [line for line in SAMPLE.splitlines() if line not in edited.splitlines()] == []
    assert 'preset = "default"' in edited.splitlines()


def test_a_lock_that_lost_an_endpoint_of_its_preset_lists_the_others() -> None:
    before = parse_config(SAMPLE)
    one = before.policy.locks[0]
    wanted = before._replace(policy=make_policy([Lock(one.name, one.endpoints[1:], one.allow)]))
    edited = edited_text(SAMPLE, wanted)
    assert parse_config(edited) == wanted
    assert comments(edited) == comments(SAMPLE)


@keeps_lists
def test_names_without_an_id_stay_as_they_are_written() -> None:
    assert '    "root",' in changed(HAND_MADE, [0, 41001]).splitlines()


def test_windows_line_ends_stay(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(HAND_MADE.replace("\n", "\r\n").encode())
    save_config(load_config(str(path)), str(path))
    assert path.read_bytes() == HAND_MADE.replace("\n", "\r\n").encode()


def test_a_generated_file_is_generated_anew(tmp_path: Path) -> None:
    """Nothing of the old configuration is left."""
    path = str(tmp_path / "config.toml")
    first = Config(policy_from_options(users=["41001"], ips=["192.0.2.1"]))
    second = Config(policy_from_options(users=["41002"], ips=["192.0.2.1"]))
    save_config(first, path)
    save_config(second, path)
    assert Path(path).read_text(encoding="utf-8") == dump_config(second)


def test_a_file_that_can_not_keep_its_comments_is_not_changed(tmp_path: Path) -> None:
    """No lock can be added as text to locks in one inline table."""
    text = 'lock = { web = { endpoints = ["192.0.2.1"], users = [41001] } }\n'
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    wanted = parse_config(HAND_MADE)
    with pytest.raises(GuardError, match=r"can't be changed without losing its comments; move the file away$"):
        save_config(wanted, str(tmp_path / "config.toml"))
    assert [(one.name, one.read_text(encoding="utf-8")) for one in tmp_path.iterdir()] == [("config.toml", text)]


def test_without_tomlkit_saving_is_refused_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(HAND_MADE, encoding="utf-8")
    monkeypatch.setitem(sys.modules, "tomlkit", None)
    message = r"install the package python3-tomlkit, or move the file away$"
    with pytest.raises(Unsupported, match=message):
        check_saving_to(str(path))
    with pytest.raises(Unsupported, match=message):
        save_config(parse_config(HAND_MADE), str(path))
    assert path.read_text(encoding="utf-8") == HAND_MADE


def test_without_tomlkit_a_generated_file_can_be_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "config.toml")
    config = parse_config(HAND_MADE)
    monkeypatch.setitem(sys.modules, "tomlkit", None)
    check_saving_to(path)
    save_config(config, path)
    check_saving_to(path)
    save_config(config._replace(backend="ebpf"), path)
    assert load_config(path).backend == "ebpf"


def test_an_unusable_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[lock.web]\n", encoding="utf-8")
    with pytest.raises(BadPolicy):
        check_saving_to(str(path))


def test_start_saves_its_options_for_the_next_boot(tmp_path: Path) -> None:
    """A later ``allow --save`` does not change them."""
    path = str(tmp_path / "config.toml")
    policy = policy_from_options(users=["41001"], ips=["192.0.2.1"])
    save(policy, GuardOptions(backend="iptables", resolve_groups=True, forwarded="leave"), path)
    found = load_config(path)
    assert (found.backend, found.resolve_groups, found.forwarded) == ("iptables", True, "leave")
    assert with_config(GuardOptions(), found) == GuardOptions(
        backend="iptables", resolve_groups=True, forwarded="leave"
    )
    save(policy_from_options(users=["41002"], ips=["192.0.2.1"]), GuardOptions(), path)
    assert load_config(path)._replace(policy=policy) == found
