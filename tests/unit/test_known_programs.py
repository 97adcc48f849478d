# SPDX-License-Identifier: Apache-2.0
"""The key known_programs: which names it takes, what they match, and that --save keeps them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imds_guard.backends import Neighbour
from imds_guard.commands import look
from imds_guard.commands.boot import with_config
from imds_guard.commands.options import GuardOptions
from imds_guard.commands.save import save
from imds_guard.config.boot_file import known_programs_of
from imds_guard.config.known_programs import is_known
from imds_guard.config.options import policy_from_options
from imds_guard.config.read import Config, parse_config
from imds_guard.config.write import dump_config
from imds_guard.errors import BadPolicy

LOCK = '[lock.web]\nendpoints = ["192.0.2.1"]\nusers = [41001]\n'
NAMES = ("cil_sock4_connect", "a.b_c")
LISTED = f'known_programs = ["{NAMES[0]}", "{NAMES[1]}"]\n'


def test_a_list_of_names_is_read_and_written() -> None:
    config = parse_config(LISTED + LOCK)
    assert config.known_programs == NAMES
    assert parse_config(dump_config(config)) == config
    assert "known_programs" not in dump_config(parse_config(LOCK))
    assert with_config(GuardOptions(), config).known_programs == NAMES


@pytest.mark.parametrize("name", ["", "a b", "a-b", "é", "x" * 129, "a\\n"])
def test_a_name_that_no_program_has_is_refused_with_its_line(name: str) -> None:
    with pytest.raises(BadPolicy, match=r"config:2: known_programs contains .* names of BPF programs are letters"):
        parse_config(f'mode = "audit"\nknown_programs = ["{name}"]\n{LOCK}')


@pytest.mark.parametrize("value", ["1", '"one"', "[1]", "true"])
def test_another_value_is_refused(value: str) -> None:
    with pytest.raises(BadPolicy, match=r"known_programs = .* must be a list of strings"):
        parse_config(f"known_programs = {value}\n{LOCK}")


@pytest.mark.parametrize(
    ("program", "known"),
    [
        ("a.b_c", True),
        ("cil_sock4_conne", True),
        ("cil_sock4_connect", False),
        ("cil_sock4", False),
        ("a.b_", False),
        ("", False),
    ],
)
def test_the_first_15_characters_of_a_name_are_compared(program: str, known: bool) -> None:
    """The kernel has no more of it. A program without a name is never known."""
    assert is_known(program, NAMES) is known


def test_save_keeps_the_list_as_it_is_written(tmp_path: Path) -> None:
    pytest.importorskip("tomlkit")
    path = tmp_path / "config.toml"
    listed = '# load balancer\nknown_programs = [\n  "cil_sock4_connect",  # from its agent\n]\n'
    for text in (listed, "known_programs = []\n"):
        path.write_text(text + LOCK, encoding="utf-8")
        save(policy_from_options(users=["41002"], ips=["192.0.2.1"]), GuardOptions(), str(path))
        assert path.read_text(encoding="utf-8").startswith(text)


def test_the_key_is_read_from_a_file_that_is_unusable_otherwise(tmp_path: Path) -> None:
    """Where others than root can change it, as where a user runs the tests, it is not asked."""
    path = tmp_path / "config.toml"
    path.write_text(f"{LISTED}colour = 1\n", encoding="utf-8")
    assert known_programs_of(str(path)) == (frozenset(NAMES) if os.geteuid() == 0 else frozenset())
    path.write_text("known_programs = [", encoding="utf-8")
    assert known_programs_of(str(path)) == frozenset()
    assert known_programs_of(str(tmp_path / "nothing")) == frozenset()


def test_neighbours_are_known_by_the_file_or_by_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, third = (Neighbour(name, f"fault of {name}") for name in ("one", "other", "third"))
    monkeypatch.setattr("imds_guard.config.boot_file.known_programs_of", lambda path: frozenset({path}))
    assert look.split_known([one, other, third], "one", ("third",)) == ([other], [one, third])
    assert look.split_known([], "one") == ([], [])


def test_a_configuration_without_the_key_knows_none() -> None:
    assert Config(policy_from_options(nobody=True)).known_programs == ()
