# SPDX-License-Identifier: Apache-2.0
"""The configuration as a file: what it is stays what it is when it is saved, and its first bytes may be a mark."""

from __future__ import annotations

import codecs
import os
import stat
from pathlib import Path

import pytest

from imds_guard.config.boot_file import BootFile
from imds_guard.config.read import load_config
from imds_guard.config.store import save_config
from imds_guard.errors import BadPolicy
from imds_guard.policy.model import Mode

TEXT = '# Of a person.\nmode = "enforce"\n\n[lock.x]\nendpoints = ["192.0.2.1"]\nusers = ["root"]  # and nobody else\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A configuration that its administrator has put where it suits, and made unreadable for others."""
    path = tmp_path / "real" / "config.toml"
    path.parent.mkdir()
    path.write_text(TEXT, encoding="utf-8")
    path.chmod(0o600)
    return path


def save_audit(path: Path) -> None:
    """Saves another mode to the file."""
    config = load_config(str(path))
    save_config(config._replace(policy=config.policy._replace(mode=Mode.AUDIT)), str(path))


def test_saving_keeps_the_mode(file: Path) -> None:
    """A file that others may not read stays like that."""
    save_audit(file)
    assert file.read_text(encoding="utf-8") == TEXT.replace("enforce", "audit")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(file.parent) == ["config.toml"]


@pytest.mark.skipif(os.geteuid() != 0, reason="makes files of other users")
def test_saving_keeps_the_owner(file: Path) -> None:
    os.chown(file, 41_001, 51_001)
    file.chmod(0o640)
    save_audit(file)
    found = file.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (41_001, 51_001, 0o640)


@pytest.mark.parametrize("target", ["real/config.toml", "{}/real/config.toml"], ids=["relative", "absolute"])
def test_saving_keeps_a_symbolic_link(file: Path, tmp_path: Path, target: str) -> None:
    """Tools for configurations put links in /etc. The file that a link leads to is the one to change."""
    link, second = tmp_path / "config.toml", tmp_path / "second.toml"
    link.symlink_to(target.format(tmp_path))
    second.symlink_to(link)
    save_audit(second)
    assert (os.readlink(link), os.readlink(second)) == (target.format(tmp_path), str(link))
    assert file.read_text(encoding="utf-8") == TEXT.replace("enforce", "audit")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_link_that_leads_nowhere_is_filled(file: Path, tmp_path: Path) -> None:
    """Also where the folder is not there yet. A new file may be read by everybody."""
    link, target = tmp_path / "config.toml", tmp_path / "new" / "config.toml"
    link.symlink_to(target)
    save_config(load_config(str(file)), str(link))
    assert link.is_symlink()
    assert load_config(str(target)) == load_config(str(file))
    assert stat.S_IMODE(target.stat().st_mode) == 0o644


def test_a_byte_order_mark_is_no_part_of_the_text(file: Path) -> None:
    """Editors on Windows write it. Errors name the same lines as without it."""
    expected = load_config(str(file))
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    assert load_config(str(file)) == expected
    save_audit(file)
    assert load_config(str(file)).policy.mode is Mode.AUDIT
    file.write_bytes(codecs.BOM_UTF8 + b'mode = "enforce"\nmoed = 1\n')
    with pytest.raises(BadPolicy, match=":2: unknown key 'moed'"):
        load_config(str(file))


@pytest.mark.skipif(os.geteuid() != 0, reason="boot takes files of root alone")
def test_boot_takes_a_file_with_a_byte_order_mark(file: Path) -> None:
    expected = load_config(str(file))
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    assert BootFile(str(file)).load() == expected


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_named(file: Path, encoding: str) -> None:
    """ "Unicode" in the menu of some editors. The first byte that is not UTF-8 would say less."""
    file.write_bytes("\ufeff".encode(encoding) + TEXT.encode(encoding))
    with pytest.raises(BadPolicy, match=r"config\.toml: this is not TOML: it is UTF-16; save it as UTF-8$"):
        load_config(str(file))
