"""RAFS v6 bootstrap reader: superblock, extended superblock, blob table, chunk table (docs/formats.md).

A bootstrap is an EROFS image without data plus Nydus' private tables. Everything in it is hostile until checked: this
module checks the fixed structures when it parses them, `rafs6_tree` the tree.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

from snapshotter.config import Limits
from snapshotter.errors import LimitExceeded, MalformedImage
from snapshotter.formats.blobmeta import ChunkTable
from snapshotter.formats.blobtable import BLOCK, ENTRY_SIZE, BlobEntry

EROFS_MAGIC = 0xE0F5E1E2
COMPAT_RAFS6 = 0x4000_0000
INCOMPAT = 0xC  # CHUNKED_FILE | DEVICE_TABLE
DEVICE_SLOT_OFFSET = 11
SUPERBLOCK_OFFSET, EXTENDED_OFFSET, DEVICES_OFFSET = 1024, 1152, 1408
SLOT_SIZE, RECORD_SIZE = 128, 80

FLAG_COMPRESSION_NONE, FLAG_COMPRESSION_LZ4, FLAG_HASH_BLAKE3, FLAG_HASH_SHA256 = 1, 2, 4, 8
FLAG_EXPLICIT_UID_GID, FLAG_HAS_XATTR, FLAG_COMPRESSION_GZIP, FLAG_COMPRESSION_ZSTD = 0x10, 0x20, 0x40, 0x80
FLAG_INLINED_CHUNK_DIGEST, FLAG_TARFS = 0x100, 0x200
FLAG_ENCRYPTION_NONE, FLAG_ENCRYPTION_XTS = 0x0100_0000, 0x0200_0000
FLAG_SEALED = 0x1_0000_0000
_COMPRESSIONS = FLAG_COMPRESSION_NONE | FLAG_COMPRESSION_LZ4 | FLAG_COMPRESSION_GZIP | FLAG_COMPRESSION_ZSTD
_HASHES = FLAG_HASH_BLAKE3 | FLAG_HASH_SHA256
_KNOWN_FLAGS = 0x1FF | FLAG_ENCRYPTION_NONE | 0xFC00_0000 | FLAG_SEALED


SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sIHHH38x")
EXTENDED = struct.Struct("<QQIIQQQII200x")
SLOT = struct.Struct("<64sII56x")
RECORD = struct.Struct("<32sIIIIQQQII")


class ChunkRecord(NamedTuple):
    """One 80-byte record of the chunk table."""

    digest: bytes
    blob_index: int
    flags: int
    compressed_size: int
    uncompressed_size: int
    compressed_offset: int
    uncompressed_offset: int
    file_offset: int
    index: int  # type: ignore[assignment]  # the field's name hides tuple.index, which nobody calls
    crc: int


class Bootstrap:
    """A parsed bootstrap; `data` is kept, nothing of it is copied."""

    def __init__(self, data: memoryview, limits: Limits) -> None:
        self.data = data
        self.limits = limits
        self._parse_superblock()
        self._parse_extended()
        self._parse_blobs()

    @classmethod
    def parse(cls, data: bytes | memoryview, limits: Limits) -> Self:
        """Raises MalformedImage (reason bad-bootstrap) and LimitExceeded."""
        view = memoryview(data)
        if bytes(view[:4]) == b"SFAR":
            raise MalformedImage("bootstrap: unsupported: RAFS v5")
        if len(view) < 2 * BLOCK or len(view) % BLOCK or len(view) > limits.bootstrap_unpacked_bytes:
            raise MalformedImage(f"bootstrap: {len(view)} bytes are no whole number of blocks, or too many")
        return cls(view, limits)

    @property
    def sealed(self) -> bool:
        return bool(self.flags & FLAG_SEALED)

    def _parse_superblock(self) -> None:
        fields = SUPERBLOCK.unpack_from(self.data, SUPERBLOCK_OFFSET)
        magic, checksum, compat, bits, extslots, self.root_nid, self.inodes = fields[:7]
        self.meta_blkaddr, xattr_blkaddr = fields[10:12]
        incompat, algorithms, self.device_count, slot_offset = fields[14:]
        if magic != EROFS_MAGIC or not compat & COMPAT_RAFS6:
            raise MalformedImage("bootstrap: not a RAFS v6 superblock")
        if bits != 12:
            raise MalformedImage(f"bootstrap: unsupported: block size 2^{bits}")
        if checksum or extslots or xattr_blkaddr or algorithms or incompat != INCOMPAT:
            raise MalformedImage("bootstrap: superblock has features that RAFS v6 does not use")
        if self.device_count and slot_offset != DEVICE_SLOT_OFFSET:
            raise MalformedImage("bootstrap: device table is not at its place")
        if not self.inodes or self.inodes > self.limits.inodes:
            raise LimitExceeded(f"bootstrap: {self.inodes} inodes")
        if self.meta_blkaddr * BLOCK >= len(self.data):
            raise MalformedImage("bootstrap: metadata lies outside")

    def _parse_extended(self) -> None:
        fields = EXTENDED.unpack_from(self.data, EXTENDED_OFFSET)
        self.flags, self._blob_table, blob_bytes, self.chunk_size = fields[:4]
        self._chunk_table, chunk_bytes, prefetch, prefetch_bytes, _ = fields[4:]
        if self.flags & ~_KNOWN_FLAGS:
            raise MalformedImage(f"bootstrap: unsupported flags {self.flags:#x}")
        for mask in (_COMPRESSIONS, _HASHES):
            if (self.flags & mask).bit_count() != 1:
                raise MalformedImage(f"bootstrap: contradicting flags {self.flags:#x}")
        if self.sealed and self.flags & (FLAG_ENCRYPTION_NONE | FLAG_INLINED_CHUNK_DIGEST):
            raise MalformedImage("bootstrap: sealed, but says it is not encrypted")
        if self.chunk_size & (self.chunk_size - 1) or not BLOCK <= self.chunk_size <= 16 << 20:
            raise MalformedImage(f"bootstrap: chunk size {self.chunk_size}")
        if self.chunk_size > self.limits.chunk_bytes:
            raise LimitExceeded(f"bootstrap: chunk size {self.chunk_size} is more than limits.chunk_bytes")
        prefetch_bytes = prefetch_bytes if prefetch else 0
        if blob_bytes % ENTRY_SIZE or chunk_bytes % RECORD_SIZE or prefetch_bytes % 4:
            raise MalformedImage("bootstrap: a table has a part of a record")
        tables = [(self._blob_table, blob_bytes), (self._chunk_table, chunk_bytes), (prefetch, prefetch_bytes)]
        end = 0
        for offset, size in sorted(table for table in tables if table[1]):
            if offset < max(end, BLOCK) or offset + size > len(self.data):
                raise MalformedImage("bootstrap: tables overlap or lie outside")
            end = offset + size
        self._blob_count = blob_bytes // ENTRY_SIZE
        self.record_count = chunk_bytes // RECORD_SIZE
        self._prefetch = (prefetch, prefetch_bytes)

    def _parse_blobs(self) -> None:
        if self._blob_count != self.device_count or self._blob_count > self.limits.layers:
            raise MalformedImage(f"bootstrap: {self._blob_count} blobs, {self.device_count} devices")
        if DEVICES_OFFSET + SLOT_SIZE * self.device_count > max(self._blob_table, BLOCK):
            raise MalformedImage("bootstrap: device table runs into the blob table")
        entries = []
        for index in range(self._blob_count):
            at = self._blob_table + ENTRY_SIZE * index
            entry = BlobEntry.parse(self.data[at : at + ENTRY_SIZE])
            if entry.blob_index != index or entry.chunk_size != self.chunk_size:
                raise MalformedImage(f"blob table entry {index}: wrong index or chunk size")
            if entry.sealed != self.sealed:
                raise MalformedImage(f"blob table entry {index}: sealed and plain blobs are mixed")
            if entry.chunk_count > self.limits.chunks or entry.uncompressed_size > 1 << 44:
                raise LimitExceeded(f"blob table entry {index}: more chunks than limits.chunks")
            tag, blocks, _ = SLOT.unpack_from(self.data, DEVICES_OFFSET + SLOT_SIZE * index)
            if tag != entry.blob_id.encode() or blocks * BLOCK != entry.uncompressed_size:
                raise MalformedImage(f"device slot {index}: contradicts the blob table")
            entries.append(entry)
        if len({entry.blob_id for entry in entries}) != len(entries):
            raise MalformedImage("blob table: a blob comes twice")
        self.blobs: tuple[BlobEntry, ...] = tuple(entries)

    @property
    def prefetch(self) -> tuple[int, ...]:
        """Node ids of the prefetch table, up to its first zero."""
        offset, size = self._prefetch
        nids = self.data[offset : offset + size].cast("I") if size else []
        stop = next((i for i, nid in enumerate(nids) if not nid), len(nids))
        return tuple(nids[:stop])

    def chunk_records(self) -> Iterator[ChunkRecord]:
        end = self._chunk_table + RECORD_SIZE * self.record_count
        return map(ChunkRecord._make, RECORD.iter_unpack(self.data[self._chunk_table : end]))

    def digests(self, blob_index: int, count: int) -> bytes:
        """32 bytes per chunk of the blob in chunk index order. Raises MalformedImage unless each has exactly one.

        Plain images merged from layers may leave chunks without a record: no file uses them, and a chunk whose digest
        is all zeros never verifies.
        """
        out = bytearray(32 * count)
        seen = bytearray(count)
        for record in self.chunk_records():
            if record.blob_index != blob_index:
                continue
            if record.index >= count or seen[record.index]:
                raise MalformedImage(
                    f"chunk table: chunk {record.index} of blob {blob_index} is unknown or comes twice"
                )
            seen[record.index] = 1
            out[32 * record.index : 32 * record.index + 32] = record.digest
        if self.sealed and not all(seen):
            raise MalformedImage(f"chunk table: chunk {seen.index(0)} of blob {blob_index} is missing")
        return bytes(out)

    def validate(self, tables: Sequence[ChunkTable]) -> None:
        """Walk the whole tree with limits. `tables`: one per blob. Raises MalformedImage, LimitExceeded."""
        from snapshotter.formats.rafs6_tree import validate

        self._check_records(tables)
        validate(self, tables)

    def _check_records(self, tables: Sequence[ChunkTable]) -> None:
        """The chunk table must say what the chunk information says."""
        if len(tables) != len(self.blobs) or any(
            len(table) != blob.chunk_count for table, blob in zip(tables, self.blobs, strict=True)
        ):
            raise MalformedImage("bootstrap: chunk information does not fit the blob table")
        for record in self.chunk_records():
            if record.blob_index >= len(tables) or record.index >= len(tables[record.blob_index]):
                raise MalformedImage("chunk table: record of an unknown chunk")
            info = tables[record.blob_index][record.index]
            if (
                record.uncompressed_offset != info.uncompressed_offset
                or record.uncompressed_size != info.uncompressed_size
                or record.compressed_offset != info.compressed_offset
                or record.compressed_size != info.compressed_size
            ):
                raise MalformedImage(f"chunk table: record {record.index} contradicts the chunk information")
