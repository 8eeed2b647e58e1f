"""Writing the bootstrap layer: a tar.gz that depends on nothing but its content."""

import gzip
import hashlib
import io
import tarfile
from collections.abc import Mapping
from typing import NamedTuple

from snapshotter.digest import Digest

_LEVEL = 6


class Archive(NamedTuple):
    """A finished tar.gz. `diff_id` and `tar_bytes` are of the tar inside."""

    content: bytes
    diff_id: Digest
    tar_bytes: int


class _Hashing:
    """The file that tarfile writes to: hashes the tar and passes it on to gzip, so it is never in memory whole."""

    def __init__(self, sink: gzip.GzipFile) -> None:
        self._sink = sink
        self.sha256 = hashlib.sha256()
        self.total = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.total += len(data)
        return self._sink.write(data)

    def tell(self) -> int:
        return self.total


def write(members: Mapping[str, bytes]) -> Archive:
    """ustar with the directory `image/` and the members in the order given; gzip with neither time nor name."""
    out = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=out, mtime=0) as packed:
        sink = _Hashing(packed)
        with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as archive:  # type: ignore[call-overload]
            directory = tarfile.TarInfo("image")
            directory.type, directory.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(directory)
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size, info.mode = len(content), 0o444
                archive.addfile(info, io.BytesIO(content))
    return Archive(out.getvalue(), Digest("sha256:" + sink.sha256.hexdigest()), sink.total)
