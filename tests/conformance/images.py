"""Lazy images without a registry and without EROFS: verdicts by label, mounts are binds of a directory."""

import ctypes
import errno
import os
from pathlib import Path

from snapshotter.errors import PolicyDenied, SnapshotterError
from snapshotter.mounts.mountinfo import read_mounts
from snapshotter.snapshots.remote import ImageRecord, LayerRequest, LayerVerdict, NamedLayer

VERDICT = "containerd.io/snapshot/test.verdict"  # data, image, ordinary, denied, broken
STORED = 1_000_000  # what the metadata of every image takes up
_MS_BIND = 4096
_libc = ctypes.CDLL(None, use_errno=True)


def bind(source: Path, target: Path) -> None:
    if _libc.mount(os.fsencode(source), os.fsencode(target), None, _MS_BIND, None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


class FakeImages:
    """A `RemoteImages` whose every image holds one file, `image/hello`, below `directory`."""

    def __init__(self, directory: Path, *, only_verified: bool = False) -> None:
        self.only_verified = only_verified
        self.requests: list[LayerRequest] = []
        self.mounted: dict[int, Path] = {}
        self._content = directory / "image"
        self._content.mkdir(parents=True, exist_ok=True)
        (self._content / "hello").write_text("hello")

    async def resolve(self, request: LayerRequest) -> LayerVerdict:
        self.requests.append(request)
        verdict = request.labels.get(VERDICT, "ordinary")
        if verdict == "denied":
            raise PolicyDenied("image registry/app:1: not today", reason="not-sealed")
        if verdict == "broken":
            raise SnapshotterError("registry is on fire")
        if verdict == "data":
            return LayerVerdict("data")
        if verdict == "image":
            digest = "sha256:" + "1" * 64
            record = ImageRecord("registry/app:1", digest, digest, request.chain_id, True, 0o700, 5, 6)
            return LayerVerdict("image", record)
        return LayerVerdict("ordinary")

    async def recall(self, layer: NamedLayer) -> LayerVerdict:
        record = ImageRecord(layer.reference, layer.manifest or "", layer.bootstrap, layer.chain_id, True, 0o700, 5, 6)
        return LayerVerdict("image", record)

    async def stored(self, record: ImageRecord) -> int:
        return STORED

    async def mount(self, attach_id: int, record: ImageRecord, target: Path) -> None:
        if not any(mount.point == str(target) for mount in read_mounts()):
            bind(self._content, target)
        self.mounted[attach_id] = target

    async def unmount(self, attach_id: int, target: Path) -> None:
        if _libc.umount2(os.fsencode(target), 0) and ctypes.get_errno() not in (errno.EINVAL, errno.ENOENT):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))
        self.mounted.pop(attach_id, None)
