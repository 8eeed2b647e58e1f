"""The directories of snapshots: how they are made, measured and destroyed.

<root>/snapshots/<id>/fs             files of an ordinary snapshot: the upper directory of its overlay
<root>/snapshots/<id>/work           overlay's work directory, of an active one
<root>/snapshots/<id>/mnt            where a lazy image's EROFS is mounted; never looked into from here
<root>/snapshots/<id>/snapshot.json  see `sidecar`
<root>/snapshots/new-…               being made
<root>/snapshots/unpack-…            an encrypted layer is being unpacked into it
<root>/snapshots/old-…               being destroyed
<root>/snapshots/lost-…              nobody knows what it is; kept for people to look at

`mnt` exists only while something is mounted there: a client that mounts too late gets an error, not an empty directory.
"""

import contextlib
import errno
import itertools
import os
import secrets
import stat
import sys
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple

from snapshotter.snapshots.model import Usage

Purpose = Literal["active", "view", "remote", "unpack"]
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SLICE = 4096  # directory entries held at a time
_NESTED = 64  # levels of directories that are walked down at once
_DEPTH = 512  # levels of directories that are measured; each costs a descriptor


class RootAttributes(NamedTuple):
    """Of a root directory: a child starts with its parent's, since overlayfs shows those of the topmost layer."""

    mode: int = 0o755
    uid: int = 0
    gid: int = 0


class Directories:
    def __init__(self, root: Path) -> None:
        """`root` exists; `<root>/snapshots` is made."""
        self.base = root / "snapshots"
        self.base.mkdir(mode=0o700, exist_ok=True)

    def path(self, number: int) -> Path:
        return Path(f"{self.base}/{number}")

    def files(self, number: int) -> Path:
        return Path(f"{self.base}/{number}/fs")

    def work(self, number: int) -> Path:
        return Path(f"{self.base}/{number}/work")

    def mountpoint(self, number: int) -> Path:
        return Path(f"{self.base}/{number}/mnt")

    def names(self) -> list[str]:
        return os.listdir(self.base)

    def attributes(self, number: int) -> RootAttributes:
        """Of the root directory of an ordinary snapshot."""
        status = self.files(number).stat()
        return RootAttributes(status.st_mode & 0o7777, status.st_uid, status.st_gid)

    def make(self, purpose: Purpose, attributes: RootAttributes) -> Path:
        """A new directory under a temporary name."""
        path = Path(tempfile.mkdtemp(prefix="unpack-" if purpose == "unpack" else "new-", dir=self.base))
        if purpose != "remote":
            files = path / "fs"
            files.mkdir()
            os.chown(files, attributes.uid, attributes.gid)
            files.chmod(attributes.mode)  # after chown, which clears bits; and mkdir obeys the umask
        if purpose == "active":
            (path / "work").mkdir()
            (path / "work").chmod(0o711)
        return path

    def make_mountpoint(self, number: int) -> None:
        """Present already is fine; mounted, too, since mkdir does not look behind a mount."""
        with contextlib.suppress(FileExistsError):
            self.mountpoint(number).mkdir()  # exist_ok would look at it

    def remove_mountpoint(self, number: int) -> None:
        """Does nothing while something is mounted there."""
        with contextlib.suppress(OSError):
            self.mountpoint(number).rmdir()

    def place(self, path: Path, number: int) -> Path:
        """Give a new directory its final name."""
        return path.rename(self.path(number))

    def retire(self, name: str, prefix: Literal["old", "lost"] = "old") -> Path:
        """Rename a directory, so that it is no snapshot's any more."""
        return (self.base / name).rename(self.base / f"{prefix}-{name}-{secrets.token_hex(4)}")


def destroy(path: Path) -> None:
    """Delete a directory however deep and large it is: what lies too deep is moved up, where it will be found again.

    Crosses no mount and follows no link. Raises OSError (EBUSY for a mount), and may be tried again.
    """
    top = os.open(path, _OPEN)
    try:
        _empty(top, top, 0)
    finally:
        os.close(top)
    path.rmdir()


def _empty(directory: int, top: int, depth: int) -> None:
    while True:
        with os.scandir(directory) as found:  # a slice at a time: there may be millions
            entries = list(itertools.islice(found, _SLICE))
        if not entries:
            return
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=directory)
            elif depth < _NESTED:
                inside = os.open(entry.name, _OPEN, dir_fd=directory)
                try:
                    _empty(inside, top, depth + 1)
                finally:
                    os.close(inside)
                os.rmdir(entry.name, dir_fd=directory)
            else:
                os.rename(entry.name, f".{secrets.token_hex(16)}", src_dir_fd=directory, dst_dir_fd=top)


def own(path: Path, *names: str) -> Usage:
    """Of a directory and the files `names` in it, and of nothing else there."""
    found = []
    for each in (path, *(path / name for name in names)):
        with contextlib.suppress(FileNotFoundError):
            found.append(_size(each.lstat()))
    return Usage(sum(found), len(found))


def _size(status: os.stat_result) -> int:
    """Directories count even where they have no block of their own, and so a snapshot is never nothing."""
    blocks = status.st_blocks * 512
    return max(blocks, status.st_size) if stat.S_ISDIR(status.st_mode) else blocks


def measure(path: Path) -> Usage:
    """Blocks and inodes below and including `path`; what has several links counts once, what vanishes does not.

    A container may be at work in there: nothing is followed out of the tree. Levels below the 512th do not count.
    """
    usage = glance(path, sys.maxsize)
    assert usage is not None
    return usage


def glance(path: Path, most: int = 64) -> Usage | None:
    """What `measure` finds, unless that is more than `most` inodes: quick enough to be waited for."""
    top = os.open(path, _OPEN)
    stack = [(top, os.scandir(top))]
    size, inodes = _size(os.fstat(top)), 1
    linked: set[tuple[int, int]] = set()
    try:
        while stack:
            directory, entries = stack[-1]
            entry = next(entries, None)
            if entry is None:
                entries.close()
                os.close(directory)
                stack.pop()
                continue
            try:
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode) and len(stack) < _DEPTH:
                    inside = os.open(entry.name, _OPEN, dir_fd=directory)
                    stack.append((inside, os.scandir(inside)))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise
                continue
            if not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1:
                if (status.st_dev, status.st_ino) in linked:
                    continue
                linked.add((status.st_dev, status.st_ino))
            size, inodes = size + _size(status), inodes + 1
            if inodes > most:
                return None
    finally:
        for directory, entries in stack:
            entries.close()
            os.close(directory)
    return Usage(size, inodes)
