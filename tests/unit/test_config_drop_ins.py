# SPDX-License-Identifier: Apache-2.0
"""config.d: drop-ins are part of the configuration, each is checked like it, and each keeps what stands in it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from imds_guard.commands import service
from imds_guard.config import source
from imds_guard.config.boot_file import BootFile, mode_of, require_files_of_root, says_audit, warnings_of_file
from imds_guard.config.read import Config, load_config
from imds_guard.config.store import check_saving_to, make_folder, save_config
from imds_guard.errors import BadPolicy, GuardError
from imds_guard.kernel.children import run_in_child
from imds_guard.policy import edit
from imds_guard.policy.endpoint_syntax import parse_endpoint
from imds_guard.policy.model import Identities, Lock, Policy, make_policy
from tests.kernel import places

MAIN = """\
# the machine's
mode = "audit"

[lock.web]
endpoints = ["192.0.2.1"]
users = [41001] # Ada
"""
TEAM = """\
# the team's
[lock.team]
endpoints = ["192.0.2.2"]   # theirs
users = [
    41002, # Ben
]
"""
FILTERED = """\
[filter.region]
locks = ["team"]
users = [41003]
allow = ["GET /latest/meta-data/placement/region"]
"""


class Folder:
    """A configuration in a folder of root's."""

    def __init__(self, above: Path) -> None:
        self.path = str(above / "config.toml")
        self.drop_ins = above / "config.d"
        self.drop_ins.mkdir()
        self.write(MAIN)

    def write(self, text: str, name: str = "") -> str:
        """Writes a file, and returns its path."""
        path = str(self.drop_ins / name) if name else self.path
        Path(path).write_text(text, encoding="utf-8")
        return path

    def read(self, name: str = "") -> str:
        """The text of a file."""
        return Path(str(self.drop_ins / name) if name else self.path).read_text(encoding="utf-8")

    def refusal(self) -> str:
        """What reading it says, which is the same at boot."""
        with pytest.raises(BadPolicy) as one:
            load_config(self.path)
        with pytest.raises(BadPolicy) as other:
            BootFile(self.path).load()
        assert str(one.value) == str(other.value)
        return str(one.value)


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    if os.geteuid() != 0:
        pytest.skip("only root has a folder that root alone can change")
    above = Path(tempfile.mkdtemp(dir="/run", prefix="imds-guard-test-"))
    folder = Folder(above)
    monkeypatch.setitem(source.DROP_INS, folder.path, str(folder.drop_ins))
    yield folder
    shutil.rmtree(above)


def locks(policy: Policy) -> dict[str, frozenset[int]]:
    return {lock.name: lock.allow.users for lock in policy.locks}


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_drop_in_adds_locks_and_filters(config: Folder) -> None:
    config.write(TEAM, "10-team.toml")
    config.write(FILTERED, "20-filter.toml")
    read, booted = load_config(config.path), BootFile(config.path).load()
    assert read == booted
    assert locks(read.policy) == {"web": frozenset({41001}), "team": frozenset({41002})}
    assert [one.name for one in read.policy.filters] == ["region"]
    assert read.policy.mode.value == "audit"


def test_all_locks_may_be_in_drop_ins(config: Folder) -> None:
    config.write('mode = "audit"\n')
    assert config.refusal() == f"{config.path}: no lock is described: add [lock.NAME]"
    config.write(TEAM, "team.toml")
    assert set(locks(load_config(config.path).policy)) == {"team"}


def test_filters_count_in_the_order_of_the_names(config: Folder) -> None:
    config.write(FILTERED.replace("region", "last").replace("team", "web"), "b.toml")
    config.write(FILTERED.replace("region", "second").replace("team", "web"), "a.toml")
    config.write(MAIN + FILTERED.replace("region", "first").replace("team", "web"))
    assert [one.name for one in load_config(config.path).policy.filters] == ["first", "second", "last"]


@pytest.mark.parametrize("name", ["team.conf", ".team.toml", "team.toml.dpkg-new", "team.toml~", "toml"])
def test_other_names_are_not_read(config: Folder, name: str) -> None:
    config.write("nonsense", name)
    assert set(locks(load_config(config.path).policy)) == {"web"}


def test_another_file_stands_alone(config: Folder) -> None:
    config.write("nonsense", "team.toml")
    other = Path(config.path).with_name("other.toml")
    other.write_text(MAIN, encoding="utf-8")
    assert set(locks(load_config(str(other)).policy)) == {"web"}


def test_there_may_be_no_folder(config: Folder) -> None:
    config.drop_ins.rmdir()
    assert set(locks(BootFile(config.path).load().policy)) == {"web"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[lock.web]\nendpoints = ['192.0.2.9']\nusers = [1]", "{here}:1: lock 'web' is defined in {main}:4, too"),
        ('strict = true\n[lock.a]\nendpoints = ["192.0.2.9"]\nusers = [1]', "{here}:1: strict is for the whole conf"),
        ('mode = "audit"', "{here}:1: mode is for the whole configuration, so it stands in config.toml"),
        ("stric = true", "{here}:1: unknown key 'stric' at the top"),
        ("[lock.a]\n\nusers = [1]", "{here}:1: lock 'a' locks nothing"),
        ("[lock.a]\nendpoints = ['192.0.2.9']\nuser = [1]", "{here}:3: unknown key 'user' in lock 'a'"),
        ("[lock.a]\n\nendpoints = ['192.0.2.1']\nusers = [1]", "{here}:1: "),  # web has that address
        ("lock = 1", "{here}:1: locks are tables with a name"),
        ("= 1", "{here}:1: this is not TOML"),
        ("\udcff", "{here}: this is not TOML: byte 0 is not UTF-8"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(config: Folder, text: str, sentence: str) -> None:
    here = str(config.drop_ins / "team.toml")
    Path(here).write_bytes(text.encode(errors="surrogateescape"))
    assert config.refusal().startswith(sentence.format(here=here, main=config.path))


def test_a_filter_of_two_drop_ins_names_both(config: Folder) -> None:
    first = config.write(FILTERED.replace("team", "web"), "a.toml")
    second = config.write("\n" + FILTERED.replace("team", "web"), "b.toml")
    assert config.refusal() == f"{second}:2: filter 'region' is defined in {first}:1, too"


# --- whose it is ------------------------------------------------------------------------------------------------------


def test_a_drop_in_that_others_can_change_is_a_bad_configuration_at_boot(config: Folder) -> None:
    """What they could write there would be locked, and unlocked, by root."""
    path = config.write(TEAM, "team.toml")
    os.chown(path, 41002, -1)
    with pytest.raises(BadPolicy, match="can be changed by others than root"):
        BootFile(config.path).load()
    assert warnings_of_file(config.path) == [
        f"at boot {path} would not be used: {path} (owner 41002, group 0, mode 0644) can be changed by others than "
        "root, who could open the lock; chown it to root, and chmod go-w"
    ]


@pytest.mark.parametrize("drop_in", ["team.toml", ""])
def test_so_is_a_folder_that_others_can_change(config: Folder, drop_in: str) -> None:
    """Also an empty one: they could put a file there at any time."""
    if drop_in:
        config.write(TEAM, drop_in)
    config.drop_ins.chmod(0o777)
    with pytest.raises(BadPolicy, match=r"the drop-ins of the configuration .* are not used: .*config\.d"):
        BootFile(config.path).load()
    assert any(str(config.drop_ins) in line for line in warnings_of_file(config.path))


def test_a_link_to_a_file_of_others_is_theirs(config: Folder) -> None:
    theirs = Path(tempfile.mkdtemp(dir="/run", prefix="imds-guard-test-"))
    try:
        (theirs / "a.toml").write_text(TEAM, encoding="utf-8")
        os.chown(theirs, 41002, -1)
        (config.drop_ins / "team.toml").symlink_to(theirs / "a.toml")
        with pytest.raises(BadPolicy, match="can be changed by others than root"):
            BootFile(config.path).load()
    finally:
        shutil.rmtree(theirs)


def test_what_the_file_itself_says_holds_beside_a_bad_drop_in(config: Folder) -> None:
    """on_error and the mode decide what boot does then."""
    config.write('on_error = "open"\n' + MAIN)
    config.write("nonsense", "team.toml")
    file = BootFile(config.path)
    for _ in range(2):
        with pytest.raises(BadPolicy, match=r"team\.toml: this is not TOML"):
            file.load()
    assert file.string("on_error") == "open"
    assert says_audit(config.path)
    mode = mode_of(config.path)
    assert mode is not None
    assert mode.value == "audit"


def test_install_service_refuses_what_boot_would_refuse(config: Folder) -> None:
    """Or the next boot would put the emergency lock on."""
    path = config.write(TEAM, "team.toml")
    require_files_of_root(config.path)
    os.chown(path, 41002, -1)
    with pytest.raises(BadPolicy, match=r"team\.toml is not used: .* can be changed by others than root"):
        service._check_configuration(service.ServiceOptions(), config.path)
    os.chown(path, 0, 0)
    config.drop_ins.chmod(0o777)
    with pytest.raises(BadPolicy, match=r"the drop-ins of the configuration .* are not used"):
        service._check_configuration(service.ServiceOptions(), config.path)


def test_the_folder_is_made_for_all_to_read(config: Folder) -> None:
    config.drop_ins.rmdir()
    before = os.umask(0o077)
    try:
        assert make_folder(config.path) == str(config.drop_ins)
    finally:
        os.umask(before)
    assert config.drop_ins.stat().st_mode & 0o7777 == 0o755
    config.drop_ins.chmod(0o700)
    assert make_folder(config.path) is None
    assert config.drop_ins.stat().st_mode & 0o7777 == 0o700, "what is there stays as it is"


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_name_that_has_another_id_now_is_named_with_file_and_line(config: Folder) -> None:
    path = config.write(TEAM.replace("41002", '{ name = "root", id = 41002 }'), "team.toml")
    file = BootFile(config.path)
    file.load()
    file.ask()  # one of files alone is no definite answer
    file.load()
    sentence = f"{path}:5: users: 'root' was 41002 when it was saved and is 0 now: correct the name or the id"
    assert str(file.changed_names()) == sentence


def test_so_is_a_name_without_an_answer(config: Folder) -> None:
    path = config.write(TEAM.replace("41002", '"imds-guard-absent"'), "team.toml")
    file = BootFile(config.path)
    file.load()
    with pytest.raises(BadPolicy) as caught:
        file.require_answers()
    assert str(caught.value).startswith(f"{path}:5: the name service gave no ID for 'imds-guard-absent' within ")


# --- saving -----------------------------------------------------------------------------------------------------------


def saved(config: Folder, policy: Policy) -> list[str]:
    """Saves ``policy``, and returns the files that were written."""
    check_saving_to(config.path)
    written = save_config(load_config(config.path)._replace(policy=policy), config.path)
    assert load_config(config.path).policy == policy
    return written


def test_a_lock_is_saved_where_it_stands(config: Folder) -> None:
    pytest.importorskip("tomlkit")
    config.write(TEAM, "team.toml")
    before = load_config(config.path).policy
    written = saved(config, edit.allow(before, Identities(frozenset({41009})), parse_endpoint("192.0.2.2")))
    assert written == [str(config.drop_ins / "team.toml")]
    assert config.read() == MAIN
    text = config.read("team.toml")
    assert "41009" in text
    assert {"# the team's", "# theirs", "# Ben"} <= {f"#{line.partition('#')[2]}" for line in text.splitlines()}


def test_a_new_lock_goes_to_the_file_itself(config: Folder) -> None:
    pytest.importorskip("tomlkit")
    config.write(TEAM, "team.toml")
    before = load_config(config.path).policy
    new = Lock("new", (parse_endpoint("192.0.2.7"),), Identities(frozenset({41009})))
    saved(config, make_policy([*before.locks, new], before.mode))
    assert config.read("team.toml") == TEAM
    assert config.read().startswith(MAIN)
    assert '[lock."new"]' in config.read()


def test_a_lock_that_is_gone_goes_where_it_stood(config: Folder) -> None:
    pytest.importorskip("tomlkit")
    config.write(TEAM, "team.toml")
    before = load_config(config.path).policy
    saved(config, make_policy([lock for lock in before.locks if lock.name == "web"], before.mode))
    assert config.read() == MAIN
    assert "lock" not in config.read("team.toml")


def test_a_split_lock_keeps_its_filters(config: Folder) -> None:
    """allow --ip splits a lock: the new part stands in the file itself, and the filter names both."""
    pytest.importorskip("tomlkit")
    config.write(TEAM.replace('"192.0.2.2"', '"192.0.2.2", "192.0.2.3"'), "team.toml")
    config.write(FILTERED, "z.toml")
    before = load_config(config.path).policy
    after = edit.allow(before, Identities(frozenset({41009})), parse_endpoint("192.0.2.3"))
    saved(config, after)
    assert len(after.filters[0].locks) == 2
    assert config.read().startswith(MAIN)


def test_a_generated_file_beside_drop_ins_is_edited(config: Folder) -> None:
    """Written anew it would have the locks of the drop-ins, too."""
    pytest.importorskip("tomlkit")
    os.unlink(config.path)
    save_config(load_one(MAIN, config), config.path)
    config.write(TEAM, "team.toml")
    before = load_config(config.path).policy
    saved(config, edit.allow(before, Identities(frozenset({41009})), parse_endpoint("192.0.2.1")))
    assert config.read("team.toml") == TEAM


def test_without_the_file_itself_drop_ins_count_when_it_is_saved(config: Folder) -> None:
    """Else the new file would lock what they lock, and the next boot could use neither."""
    pytest.importorskip("tomlkit")
    config.write(TEAM, "team.toml")
    before = load_config(config.path)
    os.unlink(config.path)
    check_saving_to(config.path)
    assert save_config(before, config.path) == [config.path]
    assert load_config(config.path) == before
    assert config.read("team.toml") == TEAM
    assert "lock.team" not in config.read()


def test_without_the_file_itself_a_bad_drop_in_is_named_before_anything_is_saved(config: Folder) -> None:
    config.write(TEAM + "user = [1]\n", "team.toml")
    os.unlink(config.path)
    with pytest.raises(BadPolicy, match=r"team\.toml:7: unknown key 'user'"):
        check_saving_to(config.path)
    assert not os.path.exists(config.path)


@pytest.mark.parametrize("exists", [True, False])
def test_when_one_file_can_not_be_written_none_is_changed(config: Folder, exists: bool) -> None:
    """A part of the change would be another policy: an endpoint gone from one file, and not yet in the other."""
    pytest.importorskip("tomlkit")
    config.write(TEAM.replace('"192.0.2.2"', '"192.0.2.2", "192.0.2.3"'), "team.toml")
    before = load_config(config.path)
    if not exists:
        os.unlink(config.path)
    texts = [config.read(name) for name in (["", "team.toml"] if exists else ["team.toml"])]
    wanted = before._replace(
        policy=edit.allow(before.policy, Identities(frozenset({41009})), parse_endpoint("192.0.2.3"))
    )

    def inside() -> str:
        places.with_read_only_folder(str(config.drop_ins))
        with pytest.raises(GuardError) as caught:
            save_config(wanted, config.path)
        return str(caught.value)

    said = run_in_child(inside, timeout_s=60)
    assert "team.toml could not be written" in said
    assert [config.read(name) for name in (["", "team.toml"] if exists else ["team.toml"])] == texts
    assert os.path.exists(config.path) is exists


def load_one(text: str, config: Folder) -> Config:
    other = Path(config.path).with_name("other.toml")
    other.write_text(text, encoding="utf-8")
    return load_config(str(other))
