"""What the data path knows about chunks: a chunk and its name in caches, the table of a blob, and counters."""

import hashlib
import threading
from collections import Counter
from typing import NamedTuple, Protocol

from snapshotter.crypto import chunk as codec
from snapshotter.digest import Digest


class Chunk(NamedTuple):
    """One chunk of a blob, made for the time of one read."""

    number: int  # its place in the table
    offset: int  # in the device, bytes
    size: int
    stored_offset: int  # in the blob, bytes
    stored_size: int
    codec: int
    digest: bytes
    secret: bytes | None  # None: not sealed

    @property
    def name(self) -> bytes:
        """32 bytes that name the stored form in caches, safe to show. Equal for equal stored forms of all images."""
        if self.secret is not None:
            return codec.chunk_id(self.secret, self.codec, self.stored_size)
        return hashlib.sha256(b"plain %s %d %d" % (self.digest, self.codec, self.stored_size)).digest()


class ChunkTable(Protocol):
    """The chunks of one blob of one attached image, in device order."""

    node: int  # unique on this machine
    digest: Digest
    size: int  # of the stored blob, bytes
    device_bytes: int
    digester: int
    count: int
    trigger: int  # a read of this chunk is to be told to the fetcher; -1: none
    expected: int  # device offset at which the last large read would be continued
    decoded_to: int  # chunks before this one were decoded ahead for it

    def find(self, offset: int) -> int:
        """Index of the last chunk that begins at or before a device offset; -1 if there is none."""

    def chunk(self, index: int) -> Chunk: ...


class Counters:
    """Event counts of the data path, from any thread."""

    NAMES = (
        "reads", "hits", "misses", "requests", "fetched_bytes", "verify_failures", "retries", "evictions",
        "cache_errors", "eio",
    )  # fmt: skip

    def __init__(self) -> None:
        self._counts = Counter(dict.fromkeys(self.NAMES, 0))
        self._lock = threading.Lock()

    def add(self, name: str, count: int = 1) -> None:
        with self._lock:
            self._counts[name] += count

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)
