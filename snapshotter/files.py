"""Reading files that somebody else may have replaced, writing files that survive a crash, and files in memory."""

import fcntl
import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

from snapshotter import failpoints

_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034  # Python 3.11 has the names only when built on a system that has them
_SEALS = 1 | 2 | 4 | 8  # SEAL, SHRINK, GROW, WRITE


def read_regular(path: Path, limit: int) -> bytes | None:
    """Content of a regular file of at most `limit` bytes; None for anything else: missing, longer, link, fifo, …"""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):  # the latter for a name that no file can have
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            return None
        with os.fdopen(os.dup(fd), "rb") as file:
            return file.read(limit)
    except OSError:
        return None
    finally:
        os.close(fd)


def write_atomic(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replace `path` so that a crash leaves the old or the new content, never a part. Creates the directory."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        failpoints.hit("file.written")
        os.replace(temporary, path)
        failpoints.hit("file.renamed")
    except BaseException:
        os.unlink(temporary)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames inside `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def seal_memfd(name: str, parts: Sequence[tuple[int, bytes | memoryview]]) -> int:
    """A memfd with these parts at their places, which nobody can change any more. The caller owns it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        for place, part in parts:
            rest = memoryview(part)
            while rest:
                written = os.pwrite(fd, rest, place)
                place, rest = place + written, rest[written:]
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_sealed(fd: int) -> bool:
    """Whether `fd` was made by `seal_memfd`. Raises OSError if it is no memfd."""
    return fcntl.fcntl(fd, _F_GET_SEALS) & _SEALS == _SEALS
