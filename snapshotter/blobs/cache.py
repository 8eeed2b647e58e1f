"""The ciphertext cache: one file per chunk, `chunks/<2 hex>/<hex of the chunk's name>`.

Nothing in it is believed: whoever uses an entry verifies it. Anybody may delete, cut, swap or replace files and
directories here at any time, so every operation looks again and no failure is more than a miss. Directories are held
open and entries opened without following links, so that a link planted here leads nowhere.

The cache gives way: it stays within its quota, leaves `min_free` of the disk to others, and stops writing for a while
when the disk does not take it. It says so once, not once a chunk.
"""

import errno
import os
import stat
import threading
import time
from collections import Counter as Tally
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import structlog

from snapshotter import failpoints
from snapshotter.blobs.chunks import Counters
from snapshotter.config import Reserve

log = structlog.get_logger(__name__)

_BUCKETS = 256
_TOUCH_SECONDS = 3600  # an entry's mtime is its last use, at this resolution
_AGE_SECONDS = 600  # resolution of eviction
_LOW_WATERMARK = 0.9  # of the quota, after an eviction
_RELIEF = 1.25  # of the reserve is free, after the disk had less than the reserve
_FULL_SHARE = 0.1  # of the cache goes when the disk says that it is full, whatever it says is free
_PAUSE_SECONDS = 10.0  # after a failed write nothing is written for so long
_NO_RESERVE = Reserve("0")
_TEMPORARY = ".new-"
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Entry(NamedTuple):
    bucket: int
    name: str
    size: int
    used: float  # seconds since the epoch, as the file says


class ChunkCache:
    """Chunks by their 32-byte names, at most `quota` bytes of them (0: nothing is kept). Thread-safe."""

    def __init__(self, directory: Path, quota: int, counters: Counters, min_free: Reserve = _NO_RESERVE) -> None:
        self._path = directory
        self._quota = quota
        self._min_free = min_free
        self._counters = counters
        self._buckets: list[int] = [-1] * _BUCKETS
        self._opening = threading.Lock()
        self._evicting = threading.Lock()
        self._sums = threading.Lock()
        self._bytes = 0
        self._entries = 0
        self._paused_until = 0.0
        self._trouble = ""  # why nothing was written last; "" if it was
        self._short = False  # the disk has less than the reserve
        self._full = False  # the disk refused a write for lack of space or inodes
        self._serial = 0
        self._next_bucket = 0

    @property
    def keeps(self) -> bool:
        """Whether a `put` now is likely to be kept."""
        return self._quota > 0 and not self._short and time.monotonic() >= self._paused_until

    def stats(self) -> dict[str, int]:
        """Bytes and entries as far as known: what others deleted is noticed at the next eviction."""
        return {"bytes": max(self._bytes, 0), "entries": max(self._entries, 0)}

    def scan(self) -> None:
        """Count what is there, and remove what interrupted writes have left. Once, at the start."""
        size = entries = 0
        for entry in self._walk(clean=True):
            size, entries = size + entry.size, entries + 1
        self._add(size, entries)

    def get(self, name: bytes, size: int) -> bytes | None:
        """The entry, if there is one of exactly `size` bytes."""
        text = name.hex()
        try:
            fd = os.open(text, _READ, dir_fd=self._bucket(name[0]))
        except OSError:
            return None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size != size:
                return None
            data = os.read(fd, size)
            if abs(time.time() - status.st_mtime) > _TOUCH_SECONDS:
                with suppress(OSError):
                    os.utime(fd)
            return data if len(data) == size else None
        except OSError:
            return None
        finally:
            os.close(fd)

    def has(self, name: bytes, size: int) -> bool:
        """Whether `get` would probably find it."""
        try:
            status = os.stat(name.hex(), dir_fd=self._bucket(name[0]), follow_symlinks=False)
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size == size

    def put(self, name: bytes, data: bytes | memoryview) -> bool:
        """Keep a chunk, evicting others if need be. False if that is impossible, which is never an error."""
        if not self.keeps or len(data) > self._quota or not self._has_room(len(data)):
            return False
        self._claim(len(data))
        size = entries = 0
        try:
            try:
                size, entries = self._write(name, data)
            except FileNotFoundError:  # somebody removed the directory
                self._bucket(name[0], make=True, anew=True)
                size, entries = self._write(name, data)
        except OSError as error:
            self._counters.add("cache_errors")
            self._full = self._full or error.errno in (errno.ENOSPC, errno.EDQUOT)
            self._paused_until = time.monotonic() + _PAUSE_SECONDS
            self._say(error.strerror or str(error))
            return False
        finally:
            self._add(size - len(data), entries)
        self._say("")
        return True

    def relieve(self) -> None:
        """Give space back if the disk has too little. To be called every few seconds, where it may take a while."""
        free, reserve = self._space()
        if free < reserve or self._short or self._full:
            held = self.stats()["bytes"]
            excess = max(int(reserve * _RELIEF) - free, int(held * _FULL_SHARE) if self._full else 0)
            size, entries = self.shrink(max(0, held - excess), None)
            log.debug("cache gives way to its disk", bytes=size, entries=entries)
            self._full = False
            free, reserve = self._space()
            self._short = free < reserve
            if self._short:
                self._say("the disk is short of space")

    def drop(self, name: bytes) -> None:
        """Forget an entry that turned out to be bad."""
        try:
            bucket = self._bucket(name[0])
            status = os.stat(name.hex(), dir_fd=bucket, follow_symlinks=False)
            self._unlink(bucket, name.hex(), stat.S_ISDIR(status.st_mode))
        except OSError:
            return
        self._add(-status.st_size, -1)

    def shrink(self, target: int | None, unused_since: float | None) -> tuple[int, int]:
        """Remove what was last used before `unused_since` (epoch), then what was used least recently until at most
        `target` bytes are left. Returns bytes and entries that are gone.
        """
        size = entries = 0
        with self._evicting:
            if unused_since is not None:
                for entry in self._walk():
                    if entry.used < unused_since and self._remove(entry):
                        size, entries = size + entry.size, entries + 1
            if target is not None:
                more = self._shrink_to(target)
                size, entries = size + more[0], entries + more[1]
        return size, entries

    def close(self) -> None:
        for bucket, fd in enumerate(self._buckets):
            if fd >= 0:
                os.close(fd)
                self._buckets[bucket] = -1

    def _space(self) -> tuple[int, int]:
        """Bytes that are free on the disk, and that are to stay so."""
        try:
            disk = os.statvfs(self._path)
        except OSError:  # nothing is there yet; a disk that fails will say so itself
            return 0, 0
        return disk.f_bavail * disk.f_frsize, self._min_free.of(disk.f_blocks * disk.f_frsize)

    def _has_room(self, needed: int) -> bool:
        free, reserve = self._space()
        if reserve and free - needed < reserve:
            self._short = True  # as ordinary as a full quota, unless it lasts
        return not self._short

    def _say(self, trouble: str) -> None:
        """Log a change from working to not working, from one reason to another, or back."""
        if trouble == self._trouble:
            return
        with self._sums:
            before, self._trouble = self._trouble, trouble
        if trouble == before:  # another thread was faster
            return
        if trouble:
            log.warning("chunks are not cached", error=trouble, directory=str(self._path))
        else:
            log.info("chunks are cached again")

    def _write(self, name: bytes, data: bytes | memoryview) -> tuple[int, int]:
        """Write beside and rename, so that readers see the whole or nothing. Returns growth in bytes and entries."""
        bucket, text = self._bucket(name[0], make=True), name.hex()
        with self._sums:
            self._serial += 1
            temporary = f"{_TEMPORARY}{os.getpid()}-{self._serial}"
        fd = os.open(temporary, _WRITE, 0o600, dir_fd=bucket)
        try:
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(fd, rest) :]
            finally:
                os.close(fd)
            size, entries = len(data), 1
            with suppress(OSError):
                status = os.stat(text, dir_fd=bucket, follow_symlinks=False)
                size, entries = size - status.st_size, 0
                if stat.S_ISDIR(status.st_mode):
                    self._unlink(bucket, text, directory=True)
            failpoints.hit("cache.written")
            os.rename(temporary, text, src_dir_fd=bucket, dst_dir_fd=bucket)
            failpoints.hit("cache.renamed")
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=bucket)
            raise
        return size, entries

    def _unlink(self, bucket: int, text: str, directory: bool) -> None:
        """Remove an entry. A directory in its place is moved away if it cannot be removed."""
        if not directory:
            os.unlink(text, dir_fd=bucket)
            return
        try:
            os.rmdir(text, dir_fd=bucket)
        except OSError:
            os.rename(text, f"{_TEMPORARY}{os.getpid()}-{text}", src_dir_fd=bucket, dst_dir_fd=bucket)

    def _bucket(self, bucket: int, make: bool = False, anew: bool = False) -> int:
        """Descriptor of a bucket's directory. `make` it if it is missing; look for it `anew` if it may be gone."""
        fd = self._buckets[bucket]
        if fd >= 0 and not anew:
            return fd
        with self._opening:
            if self._buckets[bucket] != fd:
                return self._buckets[bucket]  # another thread was faster
            if make:
                self._path.mkdir(parents=True, exist_ok=True, mode=0o700)
            parent = os.open(self._path, _DIRECTORY)
            try:
                opened = _open_directory(parent, f"{bucket:02x}", make)
            finally:
                os.close(parent)
            if fd >= 0:
                # Others may be using the old number right now: keep it meaning a directory of ours.
                os.dup2(opened, fd, inheritable=False)
                os.close(opened)
                return fd
            self._buckets[bucket] = opened
            return opened

    def _walk(self, clean: bool = False) -> Iterator[Entry]:
        """Every entry, beginning with a bucket after the last one that was evicted from."""
        for step in range(_BUCKETS):
            bucket = (self._next_bucket + step) % _BUCKETS
            try:
                fd = self._bucket(bucket)
                with os.scandir(fd) as found:
                    for item in found:
                        with suppress(OSError):
                            status = item.stat(follow_symlinks=False)
                            if item.name.startswith(_TEMPORARY):
                                if clean and abs(time.time() - status.st_mtime) > _TOUCH_SECONDS:
                                    os.unlink(item.name, dir_fd=fd)
                            else:
                                yield Entry(bucket, item.name, status.st_size, status.st_mtime)
            except OSError:
                continue

    def _claim(self, size: int) -> None:
        """Count `size` bytes before they are written, so that other threads leave room for them; evict if need be."""
        with self._sums:
            fits = self._bytes + size <= self._quota
            self._bytes += size if fits else 0
        if not fits:
            with self._evicting:
                if self._bytes + size > self._quota:  # else another thread has done it
                    self._shrink_to(int(self._quota * _LOW_WATERMARK) - size)
                self._add(size, 0)

    def _shrink_to(self, target: int) -> tuple[int, int]:
        """Remove the entries longest unused until `target` bytes are left. Returns bytes and entries removed."""
        before = self._bytes
        ages: Tally[int] = Tally()
        size = entries = 0
        for entry in self._walk():
            ages[int(entry.used) // _AGE_SECONDS] += entry.size
            size, entries = size + entry.size, entries + 1
        with self._sums:  # what was counted so far may have missed what others did
            self._bytes += size - before
            self._entries = entries
        excess = size - target
        cutoff = None
        for age in sorted(ages):
            cutoff = age
            excess -= ages[age]
            if excess <= 0:
                break
        return (0, 0) if cutoff is None else self._evict_until(cutoff, size - target)

    def _evict_until(self, cutoff: int, excess: int) -> tuple[int, int]:
        """Remove entries of age slot `cutoff` and older until `excess` bytes are gone. Returns bytes and entries."""
        size = entries = 0
        for entry in self._walk():
            if size >= excess:
                self._next_bucket = entry.bucket
                break
            if int(entry.used) // _AGE_SECONDS <= cutoff and self._remove(entry):
                size, entries = size + entry.size, entries + 1
        return size, entries

    def _remove(self, entry: Entry) -> bool:
        """Whether it was there and could be removed."""
        failpoints.hit("cache.evicts")
        try:
            os.unlink(entry.name, dir_fd=self._bucket(entry.bucket))
        except OSError:
            return False
        self._add(-entry.size, -1)
        self._counters.add("evictions")
        return True

    def _add(self, size: int, entries: int) -> None:
        with self._sums:
            self._bytes += size
            self._entries += entries


def _open_directory(parent: int, text: str, make: bool) -> int:
    for _ in range(2 if make else 0):
        with suppress(FileExistsError):
            os.mkdir(text, 0o700, dir_fd=parent)
        try:
            return os.open(text, _DIRECTORY, dir_fd=parent)
        except NotADirectoryError:  # a file or a link in its place
            os.unlink(text, dir_fd=parent)
    return os.open(text, _DIRECTORY, dir_fd=parent)
