"""RAFS v6 bootstrap reader: superblock, extended superblock, blob table, chunk table (docs/formats.md).

A bootstrap is an EROFS image without data plus Nydus' private tables. Everything in it is hostile until checked: this
module checks the fixed structures when it parses them, `rafs6_tree` what it reads, `rafs6_check` the whole tree.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

from snapshotter.config import Limits
from snapshotter.errors import LimitExceeded, MalformedImage
from snapshotter.formats import erofs, rafs6_check, rafs6_tree
from snapshotter.formats.blobmeta import FLAG_COMPRESSED, ChunkTable
from snapshotter.formats.blobtable import ENTRY_SIZE, BlobEntry
from snapshotter.formats.erofs import BLOCK
from snapshotter.formats.rafs6_tree import TreeEntry

MAGIC_V5 = b"SFAR"
COMPAT_RAFS6 = 0x4000_0000
INCOMPAT = erofs.INCOMPAT_CHUNKED_FILE | erofs.INCOMPAT_DEVICE_TABLE
EXTENDED_OFFSET, DEVICES_OFFSET = 1152, 1408
DEVICE_SLOT_OFFSET = DEVICES_OFFSET // erofs.DEVICE_SLOT.size
MAX_BLOBS = 254  # 8-bit device ids, of which 0 is the bootstrap

FLAG_COMPRESSION_NONE, FLAG_COMPRESSION_LZ4, FLAG_HASH_BLAKE3, FLAG_HASH_SHA256 = 1, 2, 4, 8
FLAG_EXPLICIT_UID_GID, FLAG_HAS_XATTR, FLAG_COMPRESSION_GZIP, FLAG_COMPRESSION_ZSTD = 0x10, 0x20, 0x40, 0x80
FLAG_INLINED_CHUNK_DIGEST, FLAG_TARFS = 0x100, 0x200
FLAG_ENCRYPTION_NONE, FLAG_ENCRYPTION_XTS = 0x0100_0000, 0x0200_0000
FLAG_SEALED = 0x1_0000_0000
_COMPRESSIONS = FLAG_COMPRESSION_NONE | FLAG_COMPRESSION_LZ4 | FLAG_COMPRESSION_GZIP | FLAG_COMPRESSION_ZSTD
_HASHES = FLAG_HASH_BLAKE3 | FLAG_HASH_SHA256
_IGNORABLE = 0xFC00_0000  # reserved for features that may be ignored
_KNOWN_FLAGS = 0x1FF | FLAG_ENCRYPTION_NONE | FLAG_SEALED | _IGNORABLE
_SEALED_REQUIRED = FLAG_SEALED | FLAG_HASH_BLAKE3 | FLAG_EXPLICIT_UID_GID
_SEALED_FLAGS = _SEALED_REQUIRED | (_COMPRESSIONS & ~FLAG_COMPRESSION_GZIP) | FLAG_HAS_XATTR

EXTENDED = struct.Struct("<QQIIQQQII200s")
RECORD = struct.Struct("<32sIIIIQQQII")
RECORD_COMPRESSED, RECORD_ENCRYPTED = 1, 4


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
        """Use `parse`."""
        self.data = data
        self.limits = limits
        self._digests: list[bytes] | None = None
        self._parse_superblock()
        self._parse_extended()
        self._parse_blobs()

    @classmethod
    def parse(cls, data: bytes | bytearray | memoryview, limits: Limits) -> Self:
        """Raises MalformedImage (reason bad-bootstrap; "unsupported: …" names what could be valid) and LimitExceeded.

        The tree is not looked at: that is `validate`.
        """
        view = memoryview(data).toreadonly()
        if bytes(view[:4]) == MAGIC_V5:
            raise MalformedImage("bootstrap: unsupported: RAFS v5")
        if len(view) > limits.bootstrap_unpacked_bytes:
            raise LimitExceeded("bootstrap: larger than limits.bootstrap_unpacked_bytes")
        if len(view) < 2 * BLOCK or len(view) % BLOCK:
            raise MalformedImage(f"bootstrap: {len(view)} bytes are no whole number of blocks")
        return cls(view, limits)

    @property
    def sealed(self) -> bool:
        return bool(self.flags & FLAG_SEALED)

    def _parse_superblock(self) -> None:
        fields = erofs.SUPERBLOCK.unpack_from(self.data, erofs.SUPERBLOCK_OFFSET)
        magic, checksum, compat, bits, slots, self.root_nid, self.inodes, time, nanos, self._blocks = fields[:10]
        self.meta_blkaddr, xattr_blkaddr, uuid, volume, incompat, algorithms, self._devices, slot_offset = fields[10:]
        if magic != erofs.MAGIC or not compat & COMPAT_RAFS6:
            raise MalformedImage("bootstrap: not a RAFS v6 superblock")
        if bits != erofs.BLOCK_BITS:
            raise MalformedImage(f"bootstrap: unsupported: block size 2^{bits}")
        if (
            checksum
            or slots
            or xattr_blkaddr
            or algorithms
            or incompat != INCOMPAT
            or slot_offset != DEVICE_SLOT_OFFSET
        ):
            raise MalformedImage("bootstrap: superblock has features that RAFS v6 does not use")
        if not self.inodes:
            raise MalformedImage("bootstrap: has no inodes")
        if self.inodes > self.limits.inodes:
            raise LimitExceeded(f"bootstrap: {self.inodes} inodes are more than limits.inodes")
        if self.meta_blkaddr * BLOCK >= len(self.data):
            raise MalformedImage("bootstrap: inodes lie outside")
        # Whether nothing but what was read is set; asked for in sealed images only.
        self._plain_superblock = compat == COMPAT_RAFS6 and not (time or nanos or any(uuid + volume))
        self._plain_superblock &= not any(self.data[erofs.SUPERBLOCK_OFFSET + 90 : EXTENDED_OFFSET])

    def _parse_extended(self) -> None:
        fields = EXTENDED.unpack_from(self.data, EXTENDED_OFFSET)
        self.flags, self._blob_table, blob_bytes, self.chunk_size = fields[:4]
        self._chunk_table, chunk_bytes, self._prefetch_table, prefetch_bytes, padding, reserved = fields[4:]
        self._check_flags(any(reserved) or padding)
        if self.chunk_size & (self.chunk_size - 1) or not BLOCK <= self.chunk_size <= 16 << 20:
            raise MalformedImage(f"bootstrap: impossible chunk size {self.chunk_size}")
        if self.chunk_size > self.limits.chunk_bytes:
            raise LimitExceeded(f"bootstrap: chunk size {self.chunk_size} is more than limits.chunk_bytes")
        if self.sealed and bool(self._prefetch_table) != bool(prefetch_bytes):
            raise MalformedImage("bootstrap: prefetch table has a place but no size, or the reverse")
        if not self._prefetch_table:
            prefetch_bytes = 0  # old tools leave a size there
        if blob_bytes % ENTRY_SIZE or chunk_bytes % RECORD.size or prefetch_bytes % 4:
            raise MalformedImage("bootstrap: a table ends in a part of a record")
        self._blob_count, self.record_count = blob_bytes // ENTRY_SIZE, chunk_bytes // RECORD.size
        self._prefetch_count = prefetch_bytes // 4
        if self._prefetch_count > self.limits.inodes:
            raise LimitExceeded("bootstrap: prefetch table is longer than limits.inodes")
        tables = [
            (DEVICES_OFFSET, erofs.DEVICE_SLOT.size * self._devices),
            (self._blob_table, blob_bytes),
            (self._chunk_table, chunk_bytes),
            (self._prefetch_table, prefetch_bytes),
        ]
        end = DEVICES_OFFSET
        for offset, size in sorted(table for table in tables if table[1]):
            if offset < end or offset + size > len(self.data):
                raise MalformedImage("bootstrap: tables overlap or lie outside")
            end = offset + size

    def _check_flags(self, reserved: int) -> None:
        if self.flags & FLAG_ENCRYPTION_XTS:
            raise MalformedImage("bootstrap: unsupported: AES-128-XTS encryption")
        if self.flags & FLAG_TARFS:
            raise MalformedImage("bootstrap: unsupported: tarfs")
        if self.flags & ~_KNOWN_FLAGS:
            raise MalformedImage(f"bootstrap: unsupported: flags {self.flags:#x}")
        for mask in (_COMPRESSIONS, _HASHES):
            if (self.flags & mask).bit_count() != 1:
                raise MalformedImage(f"bootstrap: contradicting flags {self.flags:#x}")
        if not self.sealed:
            return
        if self.flags & ~_SEALED_FLAGS or self.flags & _SEALED_REQUIRED != _SEALED_REQUIRED:
            raise MalformedImage(f"bootstrap: flags {self.flags:#x} are not those of sealed format version 1")
        if reserved or not self._plain_superblock:
            raise MalformedImage("bootstrap: reserved fields of a sealed image are in use")

    def _parse_blobs(self) -> None:
        if self._blob_count != self._devices or self._blob_count > min(self.limits.layers, MAX_BLOBS):
            raise MalformedImage(f"bootstrap: {self._blob_count} blobs and {self._devices} devices")
        entries = []
        chunks = 0
        free = len(self.data)  # first byte behind everything that has an address in the flattened image so far
        for index in range(self._blob_count):
            at = self._blob_table + ENTRY_SIZE * index
            entry = BlobEntry.parse(self.data[at : at + ENTRY_SIZE])
            if entry.blob_index != index or entry.chunk_size != self.chunk_size:
                raise MalformedImage(f"blob table entry {index}: wrong index or chunk size")
            if entry.sealed != self.sealed:
                raise MalformedImage(f"blob table entry {index}: sealed and plain blobs in one image")
            chunks += entry.chunk_count
            if chunks > self.limits.chunks:
                raise LimitExceeded("blob table: more chunks than limits.chunks")
            if entry.compressed_size > self.limits.blob_bytes:
                raise LimitExceeded(f"blob table entry {index}: larger than limits.blob_bytes")
            free = self._check_slot(index, entry, free)
            entries.append(entry)
        if len({entry.blob_id for entry in entries}) != len(entries):
            raise MalformedImage("blob table: a blob comes twice")
        self.blobs: tuple[BlobEntry, ...] = tuple(entries)

    def _check_slot(self, index: int, entry: BlobEntry, free: int) -> int:
        at = DEVICES_OFFSET + erofs.DEVICE_SLOT.size * index
        tag, blocks, unified, reserved = erofs.DEVICE_SLOT.unpack_from(self.data, at)
        if tag != entry.blob_id.encode() or blocks * BLOCK != entry.uncompressed_size or any(reserved):
            raise MalformedImage(f"device slot {index}: contradicts the blob table")
        # The kernel maps whatever it reads of the primary device behind this address to the slot's device instead.
        if unified and unified * BLOCK < free:
            raise MalformedImage(f"device slot {index}: overlaps what is before it")
        return max(free, unified * BLOCK + entry.uncompressed_size if unified else 0)

    @property
    def prefetch(self) -> tuple[int, ...]:
        """Inode numbers of the prefetch table, up to its first zero. The root stands for everything."""
        at = self._prefetch_table
        raw = self.data[at : at + 4 * self._prefetch_count]
        nids = struct.unpack(f"<{self._prefetch_count}I", raw)
        return nids[: nids.index(0)] if 0 in nids else nids

    def chunk_records(self) -> Iterator[ChunkRecord]:
        """The chunk table, in its own order."""
        at = self._chunk_table
        raw = self.data[at : at + RECORD.size * self.record_count]
        return map(ChunkRecord._make, RECORD.iter_unpack(raw))

    def digests(self, blob_index: int, count: int) -> bytes:
        """32 bytes per chunk of the blob in chunk index order. Raises MalformedImage for unknown and repeated chunks.

        In a sealed image every chunk has its record. Plain images merged from layers leave out chunks that no file
        uses: they get zeros, and a chunk whose digest is all zeros never verifies.
        """
        if count != self.blobs[blob_index].chunk_count:
            raise MalformedImage(f"chunk table: blob {blob_index} does not have {count} chunks")
        if self._digests is None:
            self._digests = self._read_digests()
        return self._digests[blob_index]

    def _read_digests(self) -> list[bytes]:
        digests = [bytearray(32 * blob.chunk_count) for blob in self.blobs]
        seen = [bytearray(blob.chunk_count) for blob in self.blobs]
        for record in self.chunk_records():
            blob, index = record.blob_index, record.index
            if blob >= len(seen) or index >= len(seen[blob]) or seen[blob][index]:
                raise MalformedImage(f"chunk table: chunk {index} of blob {blob} is unknown or comes twice")
            seen[blob][index] = 1
            digests[blob][32 * index : 32 * index + 32] = record.digest
        if self.sealed and not all(map(all, seen)):
            raise MalformedImage("chunk table: a chunk has no record")
        return list(map(bytes, digests))

    def validate(self, tables: Sequence[ChunkTable]) -> None:
        """Check the chunk table and the whole tree. `tables`: one per blob. Raises MalformedImage, LimitExceeded."""
        if [len(table) for table in tables] != [blob.chunk_count for blob in self.blobs]:
            raise MalformedImage("bootstrap: chunk information does not fit the blob table")
        for record in self.chunk_records():
            self._check_record(record, tables)
        rafs6_check.validate(self, tables)

    def _check_record(self, record: ChunkRecord, tables: Sequence[ChunkTable]) -> None:
        """The chunk table must say what the chunk information says."""
        if record.blob_index >= len(tables) or record.index >= len(tables[record.blob_index]):
            raise MalformedImage("chunk table: record of an unknown chunk")
        table, index = tables[record.blob_index], record.index
        if (
            record.uncompressed_offset != table.uncompressed_offsets[index]
            or record.uncompressed_size != table.uncompressed_sizes[index]
            or record.compressed_offset != table.compressed_offsets[index]
            or record.compressed_size != table.compressed_sizes[index]
        ):
            raise MalformedImage(f"chunk table: chunk {index} contradicts the chunk information")
        if self.sealed and (
            record.crc
            or record.flags != RECORD_ENCRYPTED | (table.flags[index] & FLAG_COMPRESSED and RECORD_COMPRESSED)
        ):
            raise MalformedImage(f"chunk table: chunk {index} has a checksum or other flags than the chunk information")

    def walk(self) -> Iterator[TreeEntry]:
        """Every name, parents before children, siblings by bytes; see rafs6_tree.walk."""
        return rafs6_tree.walk(self)
