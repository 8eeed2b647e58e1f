"""Write OCI image layouts: layers from directories or tar members, config, manifest, index (OCI image-spec 1.1)."""

import gzip
import hashlib
import io
import json
import os
import shutil
import stat
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

MEDIA_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
MEDIA_CONFIG = "application/vnd.oci.image.config.v1+json"
MEDIA_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
PATH_ENV = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
EPOCH = 1_700_000_000  # mtime of everything made here


@dataclass(frozen=True)
class Layer:
    """A stored layer: its descriptor and the digest of its uncompressed tar."""

    descriptor: Mapping[str, Any]
    diff_id: str

    @property
    def digest(self) -> str:
        return str(self.descriptor["digest"])

    @property
    def size(self) -> int:
        return int(self.descriptor["size"])


class _Hashing(io.RawIOBase):
    """Passes writes on and hashes them."""

    def __init__(self, sink: IO[bytes] | gzip.GzipFile) -> None:
        self._sink = sink
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self._sink.write(data)


class Layout:
    """An OCI layout directory; images are added one by one, `index.json` is rewritten each time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._blobs = path / "blobs/sha256"
        self._blobs.mkdir(parents=True, exist_ok=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')

    def add_blob(self, content: bytes, media_type: str) -> dict[str, Any]:
        """Store a blob and return its descriptor."""
        name = hashlib.sha256(content).hexdigest()
        (self._blobs / name).write_bytes(content)
        return {"mediaType": media_type, "digest": f"sha256:{name}", "size": len(content)}

    def take_blobs(self, other: "Layout") -> None:
        """Have all blobs of another layout here too, as hard links where that is possible."""
        for blob in other._blobs.iterdir():
            try:
                os.link(blob, self._blobs / blob.name)
            except OSError:
                shutil.copyfile(blob, self._blobs / blob.name)

    @contextmanager
    def _new_layer(self) -> Iterator[tuple[tarfile.TarFile, list[Layer]]]:
        temporary = self._blobs / ".new"
        done: list[Layer] = []
        with temporary.open("wb") as raw:
            stored = _Hashing(raw)
            with gzip.GzipFile("", "wb", compresslevel=6, fileobj=stored, mtime=0) as packed:
                plain = _Hashing(packed)
                with tarfile.open(fileobj=plain, mode="w|", format=tarfile.PAX_FORMAT) as tar:
                    yield tar, done
        name = stored.sha256.hexdigest()
        temporary.rename(self._blobs / name)
        size = (self._blobs / name).stat().st_size
        descriptor = {"mediaType": MEDIA_LAYER, "digest": f"sha256:{name}", "size": size}
        done.append(Layer(descriptor, f"sha256:{plain.sha256.hexdigest()}"))

    def add_tree(self, top: Path) -> Layer:
        """A layer from a directory; overlayfs whiteouts in it become OCI whiteouts."""
        with self._new_layer() as (tar, done):
            _pack_tree(tar, top)
        return done[0]

    def add_members(self, members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> Layer:
        """A layer from single tar members."""
        with self._new_layer() as (tar, done):
            for info, content in members:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return done[0]

    def add_image(self, name: str, layers: Sequence[Layer], config: Mapping[str, Any]) -> str:
        """Write config, manifest and index entry; `config` is its inner table (Env, Cmd, …). Returns the digest."""
        document = {
            "architecture": "amd64",
            "os": "linux",
            "config": dict(config),
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
            "history": [{"created_by": "tests"} for _ in layers],
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": MEDIA_MANIFEST,
            "config": self.add_blob(json.dumps(document).encode(), MEDIA_CONFIG),
            "layers": [layer.descriptor for layer in layers],
        }
        entry = self.add_blob(json.dumps(manifest).encode(), MEDIA_MANIFEST)
        self._set_entry(name, entry)
        return str(entry["digest"])

    def _set_entry(self, name: str, entry: dict[str, Any]) -> None:
        path = self.path / "index.json"
        old = json.loads(path.read_text())["manifests"] if path.exists() else []
        key = "org.opencontainers.image.ref.name"
        kept = [item for item in old if item["annotations"][key] != name]
        index = {"schemaVersion": 2, "manifests": [*kept, {**entry, "annotations": {key: name}}]}
        path.write_text(json.dumps(index))

    def layers(self, name: str) -> list[Layer]:
        """The layers of an image of this layout, to build another image on it."""
        key = "org.opencontainers.image.ref.name"
        entries = json.loads((self.path / "index.json").read_text())["manifests"]
        digest = next(item["digest"] for item in entries if item["annotations"][key] == name)
        manifest = json.loads(self.blob(digest))
        config = json.loads(self.blob(manifest["config"]["digest"]))
        return [Layer(d, i) for d, i in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True)]

    def blob(self, digest: str) -> bytes:
        return (self._blobs / digest.removeprefix("sha256:")).read_bytes()


def _pack_tree(tar: tarfile.TarFile, top: Path) -> None:
    """Add a directory in sorted order with its xattrs and hard links, mtimes cut to whole seconds."""
    first_names: dict[int, str] = {}
    for here, directories, files in os.walk(top):
        directories.sort()
        at = os.path.relpath(here, top)
        if at != "." and _xattrs(here).get("trusted.overlay.opaque") == b"y":
            tar.addfile(member(f"{at}/.wh..wh..opq"))
        for name in sorted([*directories, *files]):
            path = os.path.join(here, name)
            target = name if at == "." else f"{at}/{name}"
            status = os.lstat(path)
            if stat.S_ISSOCK(status.st_mode):
                continue
            if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                tar.addfile(member(os.path.join(os.path.dirname(target), f".wh.{name}")))
                continue
            info = tar.gettarinfo(path, target)
            info.mtime, info.uname, info.gname = int(status.st_mtime), "", ""
            info.pax_headers = {
                f"SCHILY.xattr.{key}": value.decode("utf-8", "surrogateescape")
                for key, value in _xattrs(path).items()
                if not key.startswith("trusted.")
            }
            if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
                if status.st_ino in first_names:
                    info.type, info.linkname, info.size = tarfile.LNKTYPE, first_names[status.st_ino], 0
                else:
                    info.type, info.size, info.linkname = tarfile.REGTYPE, status.st_size, ""
                    first_names[status.st_ino] = target
            if info.type == tarfile.REGTYPE:
                with open(path, "rb") as content:
                    tar.addfile(info, content)
            else:
                tar.addfile(info)


def _xattrs(path: str) -> dict[str, bytes]:
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)}


def member(
    name: str, mode: int = 0o644, *, link: str | None = None, xattrs: Mapping[str, str] | None = None
) -> tarfile.TarInfo:
    """A root-owned tar member: a directory when `name` ends with "/", a symlink when `link` is given, else a file."""
    info = tarfile.TarInfo(name.rstrip("/"))
    info.mode, info.mtime = mode, EPOCH
    if name.endswith("/"):
        info.type, info.mode = tarfile.DIRTYPE, 0o755
    elif link is not None:
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, link, 0o777
    info.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in (xattrs or {}).items()}
    return info


def unpack(archive: Path, target: Path) -> None:
    """Unpack a tar of our own making, with the safe filter where this Python has one (3.11.4 and later)."""
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(target, filter="data")
        else:
            tar.extractall(target)
