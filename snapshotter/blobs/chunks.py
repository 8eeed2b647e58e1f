"""What the data path knows about chunks: a chunk and its name in caches, the table of a blob, and counters."""

import errno
import hashlib
import heapq
import threading
import time
from collections import Counter
from typing import NamedTuple, Protocol

from snapshotter.crypto import chunk as codec
from snapshotter.digest import Digest
from snapshotter.monitor.journal import Journal
from snapshotter.monitor.tally import Counts, Histograms

_IMAGE_SHIFT = 8  # a node is an image id and the number of one of its at most 256 devices
_LONGEST = 8  # waits remembered of each image


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
    """What the data path counts and measures, from any thread.

    Each image has counters of its own; those it was made from tell the sum, also of images that are gone.
    """

    NAMES = (
        "reads", "hits", "misses", "requests", "fetched_bytes", "verify_failures", "retries", "evictions",
        "cache_errors", "eio",
    )  # fmt: skip

    def __init__(self, journal: Journal | None = None) -> None:
        self.journal = journal or Journal()
        self.fetches = Histograms()  # seconds of ranges, by outcome
        self.waits = Histograms()  # seconds that reads waited for a registry
        self.decodes = Histograms()  # seconds of authenticating, decrypting, decompressing and checking a chunk
        self.failures = Counts()  # by FUSE operation and errno
        self.causes = Counts()  # of EIO, by reason
        self._counts = Counter(dict.fromkeys(self.NAMES, 0))
        self._images: dict[int, ImageCounters] = {}
        self._lock = threading.Lock()

    def of_image(self, image_id: int, manifest: str) -> "ImageCounters":
        """The counters of an image that is being attached."""
        with self._lock:
            made = self._images[image_id] = ImageCounters(self, manifest)
        return made

    def forget_image(self, image_id: int) -> "ImageCounters":
        """It was detached; its last counts."""
        with self._lock:
            image = self._images.pop(image_id)
            self._counts.update(image.snapshot())
        return image

    def images(self) -> "dict[int, ImageCounters]":
        with self._lock:
            return dict(self._images)

    def add(self, name: str, count: int = 1) -> None:
        with self._lock:
            self._counts[name] += count

    def read(self, hit: bool) -> None:
        """The kernel asked for something, and it was or was not on this machine."""
        with self._lock:
            self._counts["reads"] += 1
            self._counts["hits" if hit else "misses"] += 1

    def verify_failed(self, node: int, **fields: str | float) -> None:
        """A chunk of this node was not what its table says."""
        image = self._images.get(node >> _IMAGE_SHIFT)
        (image or self).add("verify_failures")
        if image:
            image.note("verify-failed", **fields)

    def failed(self, operation: str, number: int, reason: str = "") -> None:
        """The kernel was answered with an errno. `reason`: why it was EIO."""
        self.failures.add(operation, errno.errorcode.get(number, str(number)))
        if reason:
            self.add("eio")
            self.causes.add(reason)

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            total = Counter(self._counts)
            for image in self._images.values():
                total.update(image.snapshot())
            return dict(total)


class ImageCounters:
    """The share of one image, and its story in the journal."""

    def __init__(self, total: Counters, manifest: str) -> None:
        self.total = total
        self.manifest = manifest
        self.longest: list[tuple[float, float, int, int, int]] = []  # seconds, end, device, offset, length of a read
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, count: int = 1) -> None:
        with self._lock:
            self._counts[name] += count

    def read(self, hit: bool) -> None:
        with self._lock:
            self._counts["hits" if hit else "misses"] += 1
            self._counts["reads"] += 1
            first = self._counts["reads"] == 1
        if first:
            self.note("first-read", found="cached" if hit else "missing")

    def waited(self, seconds: float, device: int, offset: int, length: int) -> None:
        """A read was answered that had to wait for a registry."""
        self.total.waits.observe(seconds)
        with self._lock:
            heapq.heappush(self.longest, (seconds, time.time(), device, offset, length))
            if len(self.longest) > _LONGEST:
                heapq.heappop(self.longest)

    def note(self, event: str, **fields: str | float | None) -> None:
        self.total.journal.note(self.manifest, event, **fields)

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)
