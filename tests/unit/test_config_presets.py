# SPDX-License-Identifier: Apache-2.0
"""Presets stay presets, whatever command saves: the addresses of one differ by version and by machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from imds_guard.config.options import policy_from_options
from imds_guard.config.read import Config, load_config, parse_config
from imds_guard.config.spelling import NO_PRESETS, known_presets
from imds_guard.config.store import check_saving_to, save_config
from imds_guard.config.write import dump_config
from imds_guard.policy import edit
from imds_guard.policy.endpoint_syntax import parse_endpoint
from imds_guard.policy.model import Identities, Policy, make_policy

AZURE = "7783-7084-3265-9085-8269-3286-77"
AWS = "Amazon EC2"


@pytest.fixture(autouse=True, params=["", AZURE, AWS], ids=["no cloud", "Azure", "AWS"])
def dmi(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On Azure the default preset has the WireServer, which is a lock of its own."""
    text = str(request.param)
    for module in ("spelling", "read"):
        name = "dmi_text" if module == "spelling" else "read_dmi_text"
        monkeypatch.setattr(f"imds_guard.config.{module}.{name}", lambda: text)
    return text


def started(dmi: str, ips: Sequence[str] = (), presets: Sequence[str] = ()) -> Policy:
    return policy_from_options(users=["41001"], ips=ips, presets=presets, dmi_text=dmi)


def endpoint_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(('  "', "preset", "[lock"))]


@pytest.mark.parametrize(
    ("ips", "presets", "lines"),
    [
        ((), (), ['[lock."default"]', 'preset = "default"']),
        ((), ("all",), ['[lock."default"]', 'preset = "all"']),
        ((), ("aws",), ['[lock."default"]', 'preset = "aws"']),
        ((), ("aws", "gcp"), ['[lock."default"]', 'preset = ["aws", "gcp"]']),
        ((), ("wireserver",), ['[lock."default"]', 'preset = "wireserver"']),
        (("10.0.0.1",), ("aws",), ['[lock."default"]', 'preset = "aws"', '  "10.0.0.1",']),
        (("169.254.169.254",), (), ['[lock."default"]', '  "169.254.169.254",']),
    ],
)
def test_what_the_command_line_says_is_written(
    ips: Sequence[str], presets: Sequence[str], lines: list[str], dmi: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.toml"
    config = Config(started(dmi, ips, presets))
    save_config(config, str(path), presets)
    assert endpoint_lines(path.read_text(encoding="utf-8")) == lines
    assert load_config(str(path)) == config


def test_another_list_for_one_of_the_addresses_is_no_preset(dmi: str, tmp_path: Path) -> None:
    """The rest of the preset is written by its addresses: no name means that."""
    path = tmp_path / "config.toml"
    policy = edit.allow(started(dmi), Identities(frozenset({41002})), parse_endpoint("169.254.169.254"))
    save_config(Config(policy), str(path))
    assert "preset" not in path.read_text(encoding="utf-8")
    assert load_config(str(path)).policy == policy


def test_an_allow_of_everywhere_keeps_it(dmi: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    policy = edit.allow(started(dmi), Identities(frozenset({41002})), None)
    save_config(Config(policy), str(path))
    assert 'preset = "default"' in path.read_text(encoding="utf-8")
    assert load_config(str(path)).policy == policy


@pytest.mark.parametrize("names", ['"default"', '"aws"', '["aws", "gcp"]'])
def test_a_file_of_a_person_keeps_its_preset_beside_a_new_address(names: str, dmi: str, tmp_path: Path) -> None:
    pytest.importorskip("tomlkit")
    path = tmp_path / "config.toml"
    path.write_text(f"# ours\n[lock.web]\npreset = {names} # theirs\nusers = [41001]\n", encoding="utf-8")
    before = load_config(str(path))
    web = next(lock for lock in before.policy.locks if lock.name == "web")
    more = web._replace(endpoints=(*web.endpoints, parse_endpoint("10.0.0.1")))
    wanted = make_policy([more, *(lock for lock in before.policy.locks if lock.name != "web")])
    save_config(before._replace(policy=wanted), str(path))
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ours\n[lock.web]\n")
    assert sorted(endpoint_lines(text)[1:]) == ['  "10.0.0.1",', f"preset = {names} # theirs"]


def test_a_new_lock_of_a_file_of_a_person_is_a_preset(dmi: str, tmp_path: Path) -> None:
    pytest.importorskip("tomlkit")
    path = tmp_path / "config.toml"
    text = '# ours\n[lock.web]\nendpoints = ["10.0.0.1"]\nusers = [41001]\n'
    path.write_text(text, encoding="utf-8")
    policy = make_policy([*parse_config(text).policy.locks, *started(dmi).locks])
    save_config(Config(policy), str(path))
    assert path.read_text(encoding="utf-8").startswith(text)
    assert endpoint_lines(path.read_text(encoding="utf-8"))[-2:] == ['[lock."default"]', 'preset = "default"']


def test_what_an_earlier_version_wrote_needs_no_editor(
    dmi: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tomlkit", None)
    path = tmp_path / "config.toml"
    config = Config(started(dmi))
    for presets in (NO_PRESETS, known_presets()):
        path.write_text(dump_config(config, presets), encoding="utf-8")
        check_saving_to(str(path))
        save_config(config, str(path))
        assert 'preset = "default"' in path.read_text(encoding="utf-8")
