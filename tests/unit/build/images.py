"""Images from raw layers: layouts, conversions, and real mounts of both sides."""

import asyncio
import gzip
import hashlib
import io
import os
import stat
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from snapshotter import labels
from snapshotter.build.convert import Converter, Summary
from snapshotter.build.options import Options
from snapshotter.cli.opened import Opened, open_image, resolve
from snapshotter.config import Config, Limits
from snapshotter.crypto import chunk
from snapshotter.crypto.secret import SecretBytes
from snapshotter.formats import blobmeta
from snapshotter.image.resolver import LazyImage
from snapshotter.mounts import syscalls
from snapshotter.registry.layout import OciLayout
from snapshotter.registry.reference import LayoutLocation
from tests.harness.oci import Layer, Layout

PLATFORM = "linux/amd64"
SECRET = bytes(range(32))
CREATED = 1_700_000_000


class KeyPair(NamedTuple):
    public: bytes
    private: Path


def key_pair(directory: Path) -> KeyPair:
    key = ec.generate_private_key(ec.SECP256R1())
    private = directory / "private.pem"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return KeyPair(public, private)


def layout(path: Path, layers: Sequence[bytes], config: Mapping[str, Any] | None = None, name: str = "src") -> Path:
    """An OCI layout with one image of these uncompressed tar layers, stored as gzip."""
    made = Layout(path)
    found = []
    for tar in layers:
        descriptor = made.add_blob(gzip.compress(tar, 1, mtime=0), labels.MEDIA_LAYER_GZIP)
        found.append(Layer(descriptor, "sha256:" + hashlib.sha256(tar).hexdigest()))
    made.add_image(name, found, config or {"Cmd": ["/bin/sh"]})
    return path


def tar_of(members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


class Quiet:
    def begin(self, what: str, total: int) -> None: ...
    def advance(self, count: int) -> None: ...
    def end(self) -> None: ...


def options(keys: KeyPair | None, **changes: Any) -> Options:
    """Sealed for `keys`, or plain."""
    defaults: dict[str, Any] = {
        "recipients": (keys.public,) if keys else (),
        "plain": keys is None,
        "secret": SecretBytes(SECRET),
        "chunk_size": 4096,
        "platform": PLATFORM,
        "created": CREATED,
    }
    return Options(**defaults | changes)


async def convert(
    source: Path, target: Path, chosen: Options, tag: str = "out", limits: Limits | None = None, name: str = "src"
) -> Summary:
    limits = limits or Limits()
    converter = Converter(
        OciLayout(source, limits),
        LayoutLocation(source, name).reference,
        OciLayout(target, limits),
        LayoutLocation(target, tag).reference,
        chosen,
        limits,
        Quiet(),
    )
    return await converter.run()


async def opened(path: Path, keys: KeyPair | None, tag: str = "out") -> tuple[LazyImage, Opened]:
    """The converted image as a node would open it."""
    config, source = Config(), OciLayout(path, Limits())
    _, image = await resolve(source, LayoutLocation(path, tag).reference, PLATFORM, config)
    assert isinstance(image, LazyImage)
    return image, await open_image(source, image, [keys.private] if keys else [], config)


def device_bytes(path: Path, found: Opened, index: int) -> bytes:
    """Blob `index` decoded into its device space."""
    device = found.devices[index]
    stored = (path / "blobs/sha256" / device.digest.hex).read_bytes()
    out = bytearray(device.device_bytes)
    for number, info in enumerate(device.chunks):
        piece = slice(32 * number, 32 * number + 32)
        out[info.uncompressed_offset : info.uncompressed_offset + info.uncompressed_size] = chunk.decode(
            stored[info.compressed_offset : info.compressed_offset + info.compressed_size],
            digest=device.digests[piece],
            size=info.uncompressed_size,
            codec=device.codec if info.flags & blobmeta.FLAG_COMPRESSED else chunk.CODEC_NONE,
            digester=device.digester,
            sealed_secret=device.secrets[piece] or None,
        )
    return bytes(out)


@contextmanager
def mounted(kind: str, configure: Callable[[int], None], target: Path) -> Iterator[Path]:
    target.mkdir(exist_ok=True)
    context = syscalls.fsopen(kind)
    try:
        configure(context)
        syscalls.fscreate(context)
        mount = syscalls.fsmount(context, 0)
    finally:
        os.close(context)
    try:
        syscalls.move_mount(mount, str(target))
    finally:
        os.close(mount)
    try:
        yield target
    finally:
        syscalls.umount(str(target), syscalls.MNT_DETACH)  # whoever looks at all mounts may hold it for a moment


@contextmanager
def erofs(layout_path: Path, found: Opened, work: Path) -> Iterator[Path]:
    """The kernel's view of a converted image, from files with its decoded blobs."""
    bootstrap = work / "bootstrap"
    bootstrap.write_bytes(found.files["image/image.boot"])
    devices = []
    for index in range(len(found.devices)):
        devices.append(work / f"device-{index}")
        devices[-1].write_bytes(device_bytes(layout_path, found, index))

    def configure(context: int) -> None:
        syscalls.fsconfig(context, "ro")
        syscalls.fsconfig(context, "source", str(bootstrap))
        for device in devices:
            syscalls.fsconfig(context, "device", str(device))

    with mounted("erofs", configure, work / "erofs") as target:
        yield target


@contextmanager
def overlay(lowers: Sequence[Path], target: Path, upper: Path | None = None) -> Iterator[Path]:
    """An overlay mount; `lowers` top first. With `upper` it can be written to (its sibling `<upper>.work` is made)."""

    def configure(context: int) -> None:
        syscalls.fsconfig(context, "lowerdir", ":".join(map(str, lowers)))
        if upper is not None:
            work = upper.with_suffix(".work")
            work.mkdir(exist_ok=True)
            syscalls.fsconfig(context, "upperdir", str(upper))
            syscalls.fsconfig(context, "workdir", str(work))

    with mounted("overlay", configure, target) as mount:
        yield mount


class Seen(NamedTuple):
    """What a program can see of one name."""

    mode: str
    uid: int
    gid: int
    size: int
    mtime_ns: int
    device: int
    target: str
    xattrs: tuple[tuple[str, bytes], ...]
    content: str
    names: tuple[str, ...]  # of the same inode, if it is no directory


def tree(top: Path) -> dict[str, Seen]:
    """Everything below `top`, by relative path; `.` is the top itself."""
    same: dict[tuple[int, int], list[str]] = defaultdict(list)
    found: dict[str, tuple[str, os.stat_result]] = {}
    paths = [str(top)]
    with ExitStack():
        for here, directories, files in os.walk(top):
            paths += [os.path.join(here, name) for name in (*directories, *files)]
    for path in paths:
        status = os.lstat(path)
        name = os.path.relpath(path, top)
        found[name] = (path, status)
        if not stat.S_ISDIR(status.st_mode):
            same[status.st_dev, status.st_ino].append(name)
    return {name: _seen(path, status, same) for name, (path, status) in found.items()}


def _seen(path: str, status: os.stat_result, same: Mapping[tuple[int, int], list[str]]) -> Seen:
    mode = status.st_mode
    xattrs = tuple(
        sorted(
            (name, os.getxattr(path, name, follow_symlinks=False)) for name in os.listxattr(path, follow_symlinks=False)
        )
    )
    return Seen(
        mode=stat.filemode(mode),
        uid=status.st_uid,
        gid=status.st_gid,
        size=0 if stat.S_ISDIR(mode) else status.st_size,
        mtime_ns=status.st_mtime_ns,
        device=status.st_rdev,
        target=os.readlink(path) if stat.S_ISLNK(mode) else "",
        xattrs=xattrs,
        content=hashlib.sha256(Path(path).read_bytes()).hexdigest() if stat.S_ISREG(mode) else "",
        names=() if stat.S_ISDIR(mode) else tuple(sorted(same[status.st_dev, status.st_ino])),
    )


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)
