"""One data blob: stored chunks back to back, and the tables that describe them.

Sealed: chunks and nothing else; the chunk information goes into the bootstrap layer. Plain: chunk information and its
header follow the chunks, as stock readers want it, and are repeated beside the bootstrap.
"""

import asyncio
import hashlib
from array import array
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from snapshotter.build.chunker import ChunkStore
from snapshotter.build.options import Options
from snapshotter.config import Limits
from snapshotter.crypto.chunk import CODEC_NONE, DIGEST_BLAKE3
from snapshotter.digest import Digest
from snapshotter.errors import LimitExceeded
from snapshotter.formats import blobmeta, blobtable, sealed
from snapshotter.formats.blobmeta import ChunkInfo, ChunkTable
from snapshotter.formats.blobtable import CIPHER_NONE, CIPHER_SEALED, SEALED_FEATURES, BlobEntry
from snapshotter.formats.rafs6_write import BlobTable

_BLOCK = 4096  # of device space, where every chunk begins on a block
_PIECE = 1 << 20
_PLAIN_FEATURES = blobtable.FEATURE_ALIGNED | blobtable.FEATURE_CAP_TAR_TOC


@dataclass(frozen=True, slots=True)
class Blob:
    """A finished blob. Its bytes are read from the spool again each time."""

    digest: Digest
    size: int
    table: BlobTable
    meta_file: bytes  # image/<hex>.blob.meta
    keys_file: bytes  # image/<hex>.keys; empty in plain images
    _chunks: "_StoredChunks"

    async def content(self) -> AsyncIterator[bytes]:
        pieces = self._chunks.pieces()
        while piece := await asyncio.to_thread(next, pieces, b""):
            yield piece


@dataclass(frozen=True, slots=True)
class _StoredChunks:
    """Chunks of a store in the order of a blob, and what follows them."""

    store: ChunkStore
    numbers: "array[int]"
    tail: bytes = b""

    def pieces(self) -> Iterator[bytes]:
        """In pieces of about 1 MiB."""
        batch: list[bytes] = []
        size = 0
        for number in self.numbers:
            batch.append(self.store.read(number))
            size += len(batch[-1])
            if size >= _PIECE:
                yield b"".join(batch)
                batch, size = [], 0
        if batch:
            yield b"".join(batch)
        if self.tail:
            yield self.tail

    def digest(self) -> Digest:
        hasher = hashlib.sha256()
        for piece in self.pieces():
            hasher.update(piece)
        return Digest("sha256:" + hasher.hexdigest())

    def table(self, flags: int) -> tuple[ChunkTable, int, int]:
        """Chunk information with `flags` in every entry; bytes in device space, bytes stored."""
        table = ChunkTable()
        device = stored = 0
        store = self.store
        for number in self.numbers:
            size, packed = store.sizes[number], store.stored_sizes[number]
            compressed = blobmeta.FLAG_COMPRESSED if store.codecs[number] != CODEC_NONE else 0
            table.append(ChunkInfo(device, size, stored, packed, flags | compressed, 0))
            device += size + -size % _BLOCK
            stored += packed
        return table, device, stored


def make(store: ChunkStore, numbers: "array[int]", index: int, options: Options, limits: Limits) -> Blob:
    """The blob with these chunks in this order; `index` is its place among the image's blobs."""
    if len(numbers) > limits.chunks:
        raise LimitExceeded(f"blob {index}: {len(numbers)} chunks are more than limits.chunks")
    chunks = _StoredChunks(store, numbers)
    return _plain(chunks, index, options) if options.plain else _sealed(chunks, index, options)


def _sealed(chunks: _StoredChunks, index: int, options: Options) -> Blob:
    table, device_bytes, size = chunks.table(blobmeta.FLAG_ENCRYPTED)
    digest = chunks.digest()
    ci_size = blobtable.V2_SIZE * len(table)
    entry = BlobEntry(
        blob_id=digest.hex,
        blob_index=index,
        chunk_size=options.chunk_size,
        chunk_count=len(table),
        compression_algo=options.codec.algorithm,
        digest_algo=DIGEST_BLAKE3,
        features=SEALED_FEATURES,
        compressed_size=size,
        uncompressed_size=device_bytes,
        ci_compressed_size=ci_size,
        ci_uncompressed_size=ci_size,
        cipher_algo=CIPHER_SEALED,
    )
    store = chunks.store
    keys = sealed.KeysFile.pack(digest.hex, ((store.digest(n), store.secret(n)) for n in chunks.numbers))
    meta = blobmeta.pack_file(table, entry)
    return Blob(digest, size, BlobTable(entry, table, _digests(chunks)), meta, keys, chunks)


def _plain(chunks: _StoredChunks, index: int, options: Options) -> Blob:
    table, device_bytes, data_size = chunks.table(0)
    records = table.encode_v1()
    size = data_size + len(records) + blobmeta.HEADER_SIZE

    def entry(blob_id: str) -> BlobEntry:
        return BlobEntry(
            blob_id=blob_id,
            blob_index=index,
            chunk_size=options.chunk_size,
            chunk_count=len(table),
            compression_algo=options.codec.algorithm,
            digest_algo=DIGEST_BLAKE3,
            features=_PLAIN_FEATURES,
            compressed_size=size,
            uncompressed_size=device_bytes,
            ci_offset=data_size,
            ci_compressed_size=len(records),
            ci_uncompressed_size=len(records),
            cipher_algo=CIPHER_NONE,
        )

    # The header at the tail does not name the blob, so it can be made before the blob's digest is known.
    header = blobmeta.pack_file(table, entry(""))[-blobmeta.HEADER_SIZE :]
    whole = _StoredChunks(chunks.store, chunks.numbers, records + header)
    digest = whole.digest()
    meta = blobmeta.pack_file(table, entry(digest.hex))
    return Blob(digest, size, BlobTable(entry(digest.hex), table, _digests(chunks)), meta, b"", whole)


def _digests(chunks: _StoredChunks) -> bytes:
    return b"".join(chunks.store.digest(number) for number in chunks.numbers)
