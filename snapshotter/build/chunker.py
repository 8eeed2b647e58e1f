"""Files into chunks, each distinct chunk stored once: cut, digest, look up, compress, seal, spool.

Digests and look-ups happen in the reader's thread, so which chunks exist, and their numbers, depend only on the input.
Compression and sealing run in a few threads on batches of about a megabyte (smaller units cost more in hand-over than
they gain); results are taken in the order they were handed in. A stored chunk does not depend on its position, so
chunks go to one spool file in the order of first use and blobs are put together from it later.
"""

import os
from array import array
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, NamedTuple, Protocol, Self

from blake3 import blake3

from snapshotter.build.tar import Entry
from snapshotter.config import Limits
from snapshotter.crypto import chunk
from snapshotter.crypto.secret import SecretBytes
from snapshotter.errors import InvalidArgument, LimitExceeded

DEFAULT_CHUNK_SIZE = 256 << 10
MIN_CHUNK_SIZE, MAX_CHUNK_SIZE = 4 << 10, 8 << 20
_BATCH = 1 << 20  # bytes of chunks handed to a thread together
_DIGEST = 32


@dataclass(frozen=True, slots=True)
class Codec:
    """How chunks are compressed: RAFS algorithm number and level."""

    algorithm: int
    level: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """`zstd`, `zstd:1` … `zstd:19`, `lz4` or `none`. Raises InvalidArgument."""
        name, _, level = text.partition(":")
        if name == "zstd" and (not level or (level.isascii() and level.isdigit() and 1 <= int(level) <= 19)):
            return cls(chunk.CODEC_ZSTD, int(level or 3))
        if text == "lz4":
            return cls(chunk.CODEC_LZ4)
        if text == "none":
            return cls(chunk.CODEC_NONE)
        raise InvalidArgument(f"codec {text!r}: must be zstd, zstd:1 … zstd:19, lz4 or none")


DEFAULT_CODEC = Codec(chunk.CODEC_ZSTD, 3)


def check_chunk_size(size: int) -> int:
    """Raises InvalidArgument unless it is a power of two from 4 KiB to 8 MiB."""
    if not MIN_CHUNK_SIZE <= size <= MAX_CHUNK_SIZE or size & (size - 1):
        raise InvalidArgument(f"chunk size {size}: must be a power of two from 4 KiB to 8 MiB")
    return size


class Packed(NamedTuple):
    """One chunk as a blob holds it. `secret` is its M, empty in plain images."""

    stored: bytes
    codec: int
    secret: bytes


class Packer(Protocol):
    """Makes the stored form of a chunk; called from several threads."""

    def __call__(self, data: bytes, digest: bytes) -> Packed: ...


class PlainPacker:
    """Compresses, as stock Nydus images have it."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    def __call__(self, data: bytes, digest: bytes) -> Packed:  # noqa: ARG002 - a plain chunk is not keyed
        stored, used = chunk.compress(data, self._codec.algorithm, self._codec.level)
        return Packed(stored, used, b"")


class SealingPacker:
    """Compresses and seals under the convergence secret S."""

    def __init__(self, codec: Codec, secret: SecretBytes) -> None:
        self._codec = codec
        self._secret = secret.expose()

    def __call__(self, data: bytes, digest: bytes) -> Packed:
        compressed, used = chunk.compress(data, self._codec.algorithm, self._codec.level)
        secret = chunk.derive(self._secret, digest)
        return Packed(chunk.seal(secret, compressed, len(data), used), used, secret)


class ChunkStore:
    """Every distinct chunk of an image by number, in compact columns (about 100 bytes each), and their stored bytes."""

    def __init__(self, spool: IO[bytes]) -> None:
        self._spool = spool
        self._end = 0
        self._slots = array("I", bytes(4 << 12))  # open addressing; number + 1, 0 is free
        self.digests = bytearray()
        self.secrets = bytearray()
        self.sizes = array("I")
        self.stored_sizes = array("I")
        self.offsets = array("Q")
        self.codecs = bytearray()

    def __len__(self) -> int:
        return len(self.sizes)

    def intern(self, digest: bytes, size: int) -> tuple[int, bool]:
        """Number of the chunk with this digest, and whether it is new. New ones are to be `append`ed in this order."""
        mask = len(self._slots) - 1
        slot = int.from_bytes(digest[:8], "little") & mask
        while number := self._slots[slot]:
            if self.digests[(number - 1) * _DIGEST : number * _DIGEST] == digest:
                return number - 1, False
            slot = (slot + 1) & mask
        number = len(self.sizes)
        if number == 0xFFFFFFFE:
            raise LimitExceeded("image: more than four billion chunks")
        self._slots[slot] = number + 1
        self.digests += digest
        self.sizes.append(size)
        if 2 * number > mask:
            self._grow()
        return number, True

    def _grow(self) -> None:
        slots = array("I", bytes(8 * len(self._slots)))
        mask = len(slots) - 1
        for number in range(len(self.sizes)):
            slot = int.from_bytes(self.digests[number * _DIGEST : number * _DIGEST + 8], "little") & mask
            while slots[slot]:
                slot = (slot + 1) & mask
            slots[slot] = number + 1
        self._slots = slots

    def append(self, packed: Packed) -> None:
        self._spool.write(packed.stored)
        self.offsets.append(self._end)
        self._end += len(packed.stored)
        self.stored_sizes.append(len(packed.stored))
        self.codecs.append(packed.codec)
        self.secrets += packed.secret

    def flush(self) -> None:
        self._spool.flush()

    def read(self, number: int) -> bytes:
        """Stored bytes of a chunk; only after `flush`."""
        return os.pread(self._spool.fileno(), self.stored_sizes[number], self.offsets[number])

    def digest(self, number: int) -> bytes:
        return bytes(self.digests[number * _DIGEST : (number + 1) * _DIGEST])

    def secret(self, number: int) -> bytes:
        return bytes(self.secrets[number * _DIGEST : (number + 1) * _DIGEST])


class Chunker:
    """Cuts the files of an image, layer after layer, into chunk numbers of a store. Use as a context manager."""

    def __init__(self, store: ChunkStore, pack: Packer, chunk_size: int, limits: Limits) -> None:
        self._store = store
        self._pack = pack
        self._chunk_size = chunk_size
        # The bootstrap holds eight bytes per chunk of each file, a hole's too; a sparse file may claim exabytes.
        self._index_left = int(limits.bootstrap_unpacked_bytes) // 16
        self._zeros = bytes(chunk_size)
        self._zero_digest = blake3(self._zeros).digest()
        self._batch: list[tuple[bytes, bytes]] = []
        self._batch_bytes = 0
        threads = min(4, os.cpu_count() or 1)
        self._most_pending = threads + 2
        self._pending: deque[Future[list[Packed]]] = deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pack")
        self.read_bytes = 0  # of file content, holes included

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def cut(self, entry: Entry) -> "array[int]":
        """Chunk numbers of a file's content, one for each `chunk_size` piece."""
        size = self._chunk_size
        self._index_left -= -(-entry.size // size)
        if self._index_left < 0:
            raise LimitExceeded("image: index of its chunks would be larger than limits.bootstrap_unpacked_bytes")
        self.read_bytes += entry.size
        numbers = array("Q")
        rest = bytearray()  # of a chunk that data and holes share
        for piece in entry.pieces(size):
            if isinstance(piece, bytes):
                if entry.extents is None:
                    numbers.append(self._add(piece))
                    continue
                rest += piece
                while len(rest) >= size:
                    numbers.append(self._add(bytes(rest[:size])))
                    del rest[:size]
                continue
            if rest:
                filling = min(piece, size - len(rest))
                rest += bytes(filling)
                piece -= filling
                if len(rest) < size:
                    continue
                numbers.append(self._add(bytes(rest)))
            whole, left = divmod(piece, size)
            if whole:
                numbers.extend(array("Q", (self._zero(),)) * whole)
            rest = bytearray(left)
        if rest:
            numbers.append(self._add(bytes(rest)))
        return numbers

    def finish(self) -> None:
        """Everything handed in so far is in the store afterwards."""
        self._submit()
        while self._pending:
            self._collect()
        self._store.flush()

    def _zero(self) -> int:
        number, new = self._store.intern(self._zero_digest, self._chunk_size)
        if new:
            self._enqueue(self._zeros, self._zero_digest)
        return number

    def _add(self, data: bytes) -> int:
        if data == self._zeros:
            return self._zero()
        digest = blake3(data).digest()
        number, new = self._store.intern(digest, len(data))
        if new:
            self._enqueue(data, digest)
        return number

    def _enqueue(self, data: bytes, digest: bytes) -> None:
        self._batch.append((data, digest))
        self._batch_bytes += len(data)
        if self._batch_bytes >= _BATCH:
            self._submit()

    def _submit(self) -> None:
        if not self._batch:
            return
        if len(self._pending) >= self._most_pending:
            self._collect()
        self._pending.append(self._pool.submit(_pack_all, self._pack, self._batch))
        self._batch, self._batch_bytes = [], 0

    def _collect(self) -> None:
        for packed in self._pending.popleft().result():
            self._store.append(packed)


def _pack_all(pack: Packer, batch: list[tuple[bytes, bytes]]) -> list[Packed]:
    return [pack(data, digest) for data, digest in batch]
