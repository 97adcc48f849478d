# SPDX-License-Identifier: Apache-2.0
"""Writes folders as an OCI archive: one tar with an image layout (github.com/opencontainers/image-spec).

python3 oci.py OUT ARCH VERSION EPOCH LAYER-FOLDER...    prints the digest of the image's manifest

The same files give the same archive, byte for byte, with the same zlib: names are sorted, and times, owners and modes
are set here.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

NAME = "localhost/imds-guard-node"
CONFIG: dict[str, Any] = {
    "Entrypoint": ["/usr/bin/imds-guard-node"],
    "Cmd": ["keep"],
    "Env": [
        "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL=C.UTF-8",
        "PYTHONDONTWRITEBYTECODE=1",
        # The passwd and group files of the node, not of this image (imds-guard(8), ENVIRONMENT).
        "IMDS_GUARD_NAMES_ROOT=/proc/1/root",
    ],
    "WorkingDir": "/",
}
_TYPE = "application/vnd.oci.image"


class Blob(NamedTuple):
    """A file of the layout. ``media`` is its media type."""

    media: str
    content: bytes

    @property
    def digest(self) -> str:
        """``sha256:`` and hex digits."""
        return _digest(self.content)

    def descriptor(self, **more: Any) -> dict[str, Any]:
        """How other blobs name this one."""
        return {"mediaType": self.media, "digest": self.digest, "size": len(self.content), **more}


class Layer(NamedTuple):
    """A layer, and the digest of its tar before it was compressed."""

    blob: Blob
    diff_id: str


def image(folders: Sequence[Path], arch: str, version: str, epoch: int) -> tuple[bytes, str]:
    """The archive, and the digest of the manifest in it."""
    layers = [_layer(folder, epoch) for folder in folders]
    config = _json_blob(f"{_TYPE}.config.v1+json", _configuration(layers, arch, version, epoch))
    manifest = _json_blob(
        f"{_TYPE}.manifest.v1+json",
        {
            "schemaVersion": 2,
            "mediaType": f"{_TYPE}.manifest.v1+json",
            "config": config.descriptor(),
            "layers": [layer.blob.descriptor() for layer in layers],
        },
    )
    # podman and skopeo read the first annotation, containerd the second.
    names = {
        "org.opencontainers.image.ref.name": f"{NAME}:{version}",
        "io.containerd.image.name": f"{NAME}:{version}",
    }
    index = {"schemaVersion": 2, "manifests": [manifest.descriptor(annotations=names)]}
    files = {"oci-layout": _dump({"imageLayoutVersion": "1.0.0"}), "index.json": _dump(index)}
    for blob in (*(layer.blob for layer in layers), config, manifest):
        files[f"blobs/sha256/{blob.digest.partition(':')[2]}"] = blob.content
    return _archive(files, epoch), manifest.digest


def _configuration(layers: Sequence[Layer], arch: str, version: str, epoch: int) -> dict[str, Any]:
    created = datetime.fromtimestamp(epoch, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    labels = {
        "org.opencontainers.image.title": "imds-guard-node",
        "org.opencontainers.image.version": version,
        "org.opencontainers.image.description": "Locks the metadata endpoints of the node that it runs on",
    }
    return {
        "created": created,
        "architecture": arch,
        "os": "linux",
        "config": {**CONFIG, "Labels": labels},
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        "history": [{"created": created, "created_by": "packaging/build-image"} for _ in layers],
    }


# --- tar ------------------------------------------------------------------------------------------------------------


def _layer(folder: Path, epoch: int) -> Layer:
    """Everything below a folder. The owner is root, whoever built it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for path in sorted(folder.rglob("*")):
            member = archive.gettarinfo(path, str(path.relative_to(folder)))
            if member is None:
                continue  # a socket
            _normalize(member, epoch)
            if member.isreg():
                with open(path, "rb") as file:
                    archive.addfile(member, file)
            else:
                archive.addfile(member)
    content = stream.getvalue()
    packed = gzip.compress(content, compresslevel=6, mtime=0)
    return Layer(Blob(f"{_TYPE}.layer.v1.tar+gzip", packed), _digest(content))


def _normalize(member: tarfile.TarInfo, epoch: int) -> None:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = epoch
    if member.isdir():
        member.mode = 0o1777 if member.name == "tmp" else 0o755
    elif not member.issym():
        member.mode = 0o755 if member.mode & 0o100 else 0o644


def _archive(files: dict[str, bytes], epoch: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.mode = len(content), epoch, 0o644
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


# --- JSON -----------------------------------------------------------------------------------------------------------


def _json_blob(media: str, value: dict[str, Any]) -> Blob:
    return Blob(media, _dump(value))


def _dump(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def main(arguments: Sequence[str]) -> None:
    """Writes the archive; on stderr the size of each layer, on stdout the digest."""
    out, arch, version, epoch, *folders = arguments
    content, digest = image([Path(folder) for folder in folders], arch, version, int(epoch))
    Path(out).write_bytes(content)
    sys.stdout.write(f"{digest}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
