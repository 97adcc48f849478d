# SPDX-License-Identifier: Apache-2.0
"""vagrant/build-box: makes a box for vagrant-libvirt from the files of a QEMU row, without a mount and without root.

The disk boots by itself (MBR, syslinux on a FAT partition). So libvirt needs no kernel file, which its user could not
read below somebody's ~/.vagrant.d. The partition for modules is the image of the QEMU rows; the root is the userland
of the QEMU rows with PACKAGES added.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import shutil
import stat
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vagrant.box import image, machines
from vagrant.box.edit import Edit
from vagrant.matrix import cache, initramfs, kernel, table, userland
from vagrant.matrix.errors import MatrixError
from vagrant.matrix.kernel import KernelFiles
from vagrant.matrix.table import Matrix, Row

HERE = Path(__file__).resolve().parent
PACKAGES = ("openssh-server", "sudo", "udev")
"""Packages that Vagrant needs beside the userland of the row. udev loads the module of the network card."""
CONSOLE = "console=tty0 console=ttyS0 net.ifnames=0 random.trust_cpu=on tsc=reliable panic=-1 oops=panic"
NO_UNITS = ("apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer")
"""Periodic work that would slow down an emulated processor."""
DISK_GIB = 4
VAGRANT, SHADOW = 1000, 42
"""The ID of user and group vagrant, and the ID of group shadow, which is the same on every Debian (base-passwd)."""


def fetch(matrix: Matrix, row: Row) -> Path:
    """The box of a row, which is built unless it is in the cache. From now on the Vagrantfile uses it."""
    if not machines.has_box(row):
        raise MatrixError(f"boxes are for {machines.ARCHITECTURE} alone: use ./run matrix {row.name}")
    files = kernel.fetch(matrix.archive, row.kernel)
    packages = tuple(sorted({*row.userland.packages, *PACKAGES}))
    root = userland.fetch(matrix.archive, replace(row.userland, packages=packages), row.kernel.architecture)
    recipe: dict[str, object] = {
        "kernel": files.initrd.parent.name,
        "userland": root.parent.name,
        "cmdline": machines.cmdline(row),
        "files": _files_hash(),
    }
    folder = cache.entry("boxes", row.name, recipe, lambda draft: _build(draft, row, files, root))
    box = folder / f"{row.name}.box"
    point(machines.link(row.name), box)
    return box


def _files_hash() -> str:
    content = hashlib.sha256()
    made_by = (HERE / "build.py", HERE / "edit.py", HERE / "image.py")
    for path in (*made_by, HERE / "init", HERE / "Vagrantfile", *sorted((HERE / "root").iterdir())):
        content.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return content.hexdigest()


def point(link: Path, box: Path) -> None:
    """Points the link to this box, in one step."""
    link.parent.mkdir(parents=True, exist_ok=True)
    draft = link.with_name(f".{link.name}.{os.getpid()}")
    draft.symlink_to(box)
    draft.replace(link)


def _build(draft: Path, row: Row, files: KernelFiles, root: Path) -> None:
    with tempfile.TemporaryDirectory(dir=draft) as folder:
        scratch = Path(folder)
        own_root = scratch / "root.img"
        shutil.copyfile(root, own_root)
        _customise(own_root, scratch)
        image.grow(own_root, DISK_GIB * image.GIB)
        boot = scratch / "boot.img"
        image.make_boot(
            boot, files.vmlinuz, _initrd(files.initrd, scratch), f"{CONSOLE} {machines.cmdline(row)}".strip()
        )
        disk = scratch / "disk.img"
        image.join(disk, [boot, files.modules, own_root])
        own_root.unlink()
        image.to_qcow2(disk, scratch / "box.img")
        _pack(draft / f"{row.name}.box", scratch / "box.img")


def _initrd(rows: Path, scratch: Path) -> Path:
    """The initramfs of the QEMU row, followed by an archive with another /init.

    The kernel unpacks archives that follow each other into one root; a later file replaces an earlier one
    (Documentation/driver-api/early-userspace/buffer-format.rst).
    """
    archive = initramfs._Cpio()
    archive.add("init", stat.S_IFREG | 0o755, (HERE / "init").read_bytes())
    joined = scratch / "initrd"
    joined.write_bytes(rows.read_bytes() + gzip.compress(archive.finish(), mtime=0))
    return joined


def _customise(root: Path, scratch: Path) -> None:
    """Sets up what Vagrant expects: the user vagrant with its key, sshd and DHCP."""
    files = HERE / "root"
    edit = Edit(root, scratch)
    edit.append("/etc/passwd", f"vagrant:x:{VAGRANT}:{VAGRANT}:Vagrant:/home/vagrant:/bin/bash\n")
    edit.append("/etc/shadow", "vagrant:*:19000:0:99999:7:::\n", 0o640, SHADOW)
    edit.append("/etc/group", f"vagrant:x:{VAGRANT}:\n")
    edit.append("/etc/gshadow", "vagrant:*::\n", 0o640, SHADOW)
    edit.folder("/home/vagrant", 0o755, VAGRANT, VAGRANT)
    edit.folder("/home/vagrant/.ssh", 0o700, VAGRANT, VAGRANT)
    edit.put(files / "authorized_keys", "/home/vagrant/.ssh/authorized_keys", 0o600, VAGRANT, VAGRANT)
    edit.put(files / "sudoers", "/etc/sudoers.d/vagrant", 0o440)
    edit.put(files / "80-vagrant.network", "/etc/systemd/network/80-vagrant.network")
    edit.put(files / "ssh-vagrant.conf", "/etc/ssh/sshd_config.d/vagrant.conf")
    edit.folder("/etc/systemd/system/ssh.service.d")
    edit.put(files / "ssh-key.conf", "/etc/systemd/system/ssh.service.d/key.conf")
    edit.replace("/etc/hostname", "guest\n")
    edit.replace("/etc/hosts", "127.0.0.1 localhost guest\n::1 localhost\n")
    edit.replace("/etc/resolv.conf", "")
    for name in edit.names("/etc/ssh"):
        if name.startswith("ssh_host_"):
            edit.remove(f"/etc/ssh/{name}")
    edit.link("/etc/systemd/system/multi-user.target.wants/systemd-networkd.service", _unit("systemd-networkd.service"))
    for unit in NO_UNITS:
        edit.link(f"/etc/systemd/system/{unit}", "/dev/null")
    edit.apply()


def _unit(name: str) -> str:
    return f"/lib/systemd/system/{name}"


def _pack(box: Path, disk: Path) -> None:
    """Packs a box for vagrant-libvirt: a gzipped tar of metadata.json, Vagrantfile and box.img."""
    metadata = disk.with_name("metadata.json")
    size = -(-image.virtual_size(disk) // image.GIB)
    values = {"provider": "libvirt", "format": "qcow2", "virtual_size": size}
    metadata.write_text(json.dumps(values) + "\n", encoding="ascii")
    with tarfile.open(box, "w:gz", compresslevel=1) as archive:
        for path in (metadata, HERE / "Vagrantfile", disk):
            archive.add(path, arcname=path.name, filter=_owned_by_root)


def _owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 built, 2 usage, 3 could not be built."""
    parser = argparse.ArgumentParser(prog="vagrant/build-box", description="makes a box for vagrant-libvirt from a row")
    parser.add_argument("row", help="a row of kernels.toml")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.box", help="also copy the box there")
    options = parser.parse_args(argv)
    try:
        matrix = table.load()
        box = fetch(matrix, matrix.row(options.row))
        if options.output:
            shutil.copyfile(box, options.output)
    except MatrixError as error:
        sys.stderr.write(f"build-box: {error}\n")
        return 3
    print(options.output or box)
    return 0
