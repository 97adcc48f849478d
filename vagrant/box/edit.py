# SPDX-License-Identifier: Apache-2.0
"""Edits an ext2 image by debugfs(8), without a mount; files may belong to root without root's help."""

from __future__ import annotations

from pathlib import Path

from vagrant.matrix.errors import MatrixError
from vagrant.matrix.process import find, run


class Edit:
    """Changes to an image, collected as commands of debugfs. apply() makes them."""

    def __init__(self, image: Path, scratch: Path) -> None:
        self._image = image
        self._scratch = scratch / "edit"
        self._scratch.mkdir()
        self._commands: list[str] = []

    def names(self, folder: str) -> list[str]:
        """The names in a folder before the changes."""
        # A line of "ls -p": /inode/mode/uid/gid/name/size/
        lines = run(["debugfs", "-R", f"ls -p {folder}", str(self._image)]).splitlines()
        return [line.split("/")[5] for line in lines if line.startswith("/")]

    def append(self, path: str, text: str, mode: int = 0o644, group: int = 0) -> None:
        """Appends text to a file, which must exist and not be empty."""
        before = run(["debugfs", "-R", f"cat {path}", str(self._image)])
        if not before:
            raise MatrixError(f"{self._image} has no {path} to append to")
        self.replace(path, before + text, mode, group)

    def replace(self, path: str, text: str, mode: int = 0o644, group: int = 0) -> None:
        """Writes a file with this text; an existing file is replaced."""
        folder, _, name = path.rpartition("/")
        source = self._scratch / f"{len(self._commands)}-{name}"
        source.write_text(text, encoding="utf-8")
        if name in self.names(folder):
            self.remove(path)
        self.put(source, path, mode, group=group)

    def put(self, source: Path, path: str, mode: int = 0o644, owner: int = 0, group: int = 0) -> None:
        """Makes a new file."""
        self._commands.append(f"write {source} {path}")
        self._own(path, 0o100000 | mode, owner, group)

    def folder(self, path: str, mode: int = 0o755, owner: int = 0, group: int = 0) -> None:
        """Makes a new folder."""
        self._commands.append(f"mkdir {path}")
        self._own(path, 0o040000 | mode, owner, group)

    def link(self, path: str, target: str) -> None:
        """Makes a new symbolic link."""
        self._commands.append(f"symlink {path} {target}")

    def remove(self, path: str) -> None:
        """Removes a file."""
        self._commands.append(f"rm {path}")

    def apply(self) -> None:
        """Makes the changes. Raises MatrixError with the messages of debugfs when one of them fails."""
        script = self._scratch / "commands"
        script.write_text("\n".join(self._commands) + "\n", encoding="utf-8")
        # debugfs always exits with 0. Its stderr shows errors, after a line with its version.
        only_errors = f'{find("debugfs")} "$@" 2>&1 >/dev/null'
        said = run(["sh", "-c", only_errors, "sh", "-w", "-f", str(script), str(self._image)]).splitlines()
        if len(said) != 1 or not said[0].startswith("debugfs "):
            raise MatrixError(f"debugfs could not change {self._image.name}: {'; '.join(said[1:]) or said}")

    def _own(self, path: str, mode: int, owner: int, group: int) -> None:
        for field, value in (("mode", f"0{mode:o}"), ("uid", owner), ("gid", group)):
            self._commands.append(f"set_inode_field {path} {field} {value}")
