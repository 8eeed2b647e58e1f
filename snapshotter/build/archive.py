"""Writing the bootstrap layer: a tar.gz that depends on nothing but its content."""

import gzip
import io
import tarfile
from collections.abc import Mapping

_LEVEL = 6


def pack(members: Mapping[str, bytes]) -> bytes:
    """An uncompressed ustar archive: the directory `image/`, then the members in the order given."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        directory = tarfile.TarInfo("image")
        directory.type, directory.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(directory)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o444
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def compress(tar: bytes) -> bytes:
    """One gzip member with neither a time nor a name in its header."""
    out = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=out, mtime=0) as file:
        file.write(tar)
    return out.getvalue()
