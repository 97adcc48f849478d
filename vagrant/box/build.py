# SPDX-License-Identifier: Apache-2.0
"""vagrant/build-box: a box for vagrant-libvirt from what a QEMU row boots, made without a mount and without root.

The disk boots by itself (MBR, syslinux on a FAT partition), so that libvirt needs to be told of no kernel: libvirt's
own user could not read one below somebody's ~/.vagrant.d. The modules' partition is the QEMU rows' image as it is; the
root is the QEMU rows' userland with PACKAGES added.
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
"""What Vagrant needs beside a row's userland. udev loads the network card's module."""
CONSOLE = "console=tty0 console=ttyS0 net.ifnames=0 random.trust_cpu=on tsc=reliable panic=-1 oops=panic"
NO_UNITS = ("apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer")
"""Work that nobody asked for, on an emulated processor."""
DISK_GIB = 4
VAGRANT, SHADOW = 1000, 42
"""IDs of user and group vagrant, and of group shadow (base-passwd has it on every Debian)."""


def fetch(matrix: Matrix, row: Row) -> Path:
    """The row's box, built unless it is in the cache, and found from now on by the Vagrantfile."""
    files = kernel.fetch(matrix.archive, row.kernel)
    packages = tuple(sorted({*row.userland.packages, *PACKAGES}))
    root = userland.fetch(matrix.archive, replace(row.userland, packages=packages))
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
    """Makes the link lead to this box, in one step."""
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
    """The QEMU row's initramfs and behind it an archive with another /init.

    The kernel unpacks archives that follow each other into one root; a later file replaces an earlier one
    (Documentation/driver-api/early-userspace/buffer-format.rst).
    """
    archive = initramfs._Cpio()
    archive.add("init", stat.S_IFREG | 0o755, (HERE / "init").read_bytes())
    joined = scratch / "initrd"
    joined.write_bytes(rows.read_bytes() + gzip.compress(archive.finish(), mtime=0))
    return joined


def _customise(root: Path, scratch: Path) -> None:
    """The vagrant user, its key, sshd, DHCP. Numbers as every box has them: Vagrant expects user "vagrant"."""
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
    """The format of vagrant-libvirt's boxes: a gzipped tar of metadata.json, Vagrantfile and box.img."""
    metadata = disk.with_name("metadata.json")
    size = -(-image.virtual_size(disk) // image.GIB)
    words = {"provider": "libvirt", "format": "qcow2", "virtual_size": size}
    metadata.write_text(json.dumps(words) + "\n", encoding="ascii")
    with tarfile.open(box, "w:gz", compresslevel=1) as archive:
        for path in (metadata, HERE / "Vagrantfile", disk):
            archive.add(path, arcname=path.name, filter=_nobody)


def _nobody(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 built, 2 usage, 3 could not be built."""
    parser = argparse.ArgumentParser(prog="vagrant/build-box", description="packs a row as a box for vagrant-libvirt")
    parser.add_argument("row", help="a row of kernels.toml")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.box", help="copy it there, too")
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
