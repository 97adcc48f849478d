# SPDX-License-Identifier: Apache-2.0
"""The file that says which rules should be in force in this network namespace."""

from __future__ import annotations

from pathlib import Path

from imds_guard.backends.iptables.state_file import StateFile


def test_it_is_read_back_and_removed_with_what_a_killed_command_left(tmp_path: Path) -> None:
    file = StateFile(str(tmp_path / "run"), "kind")
    assert file.read() == ""
    file.write("drop")
    (path,) = (tmp_path / "run").iterdir()
    assert (file.read(), path.name.startswith("kind-")) == ("drop", True)
    path.with_name(path.name + ".new").write_text("half", encoding="ascii")
    assert file.read() == "drop"
    file.remove()
    assert (file.read(), list((tmp_path / "run").iterdir())) == ("", [])
    file.remove()
