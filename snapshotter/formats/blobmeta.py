"""Chunk information (CI) of a data blob: where each chunk lies, stored and decoded (Nydus RAFS v6 "blob.meta").

Two record sizes exist: v1 (16 bytes, plain blobs) and v2 (24 bytes; sealed blobs and others). A header of 4096 bytes
follows the records. Tables are arrays; there is no object per chunk. Little-endian throughout.
"""

import struct
from array import array
from collections.abc import Iterator
from typing import NamedTuple

import lz4.block
import zstandard

from snapshotter.config import Limits
from snapshotter.errors import LimitExceeded, MalformedImage
from snapshotter.formats.blobtable import (
    FEATURE_CHUNK_INFO_V2,
    FEATURE_INLINED_FS_META,
    V1_SIZE,
    V2_SIZE,
    BlobEntry,
    record_size,
)

HEADER_SIZE = 4096
MAGIC = 0xB10BB10B
FLAG_COMPRESSED, FLAG_ZRAN, FLAG_BATCH, FLAG_ENCRYPTED, FLAG_CRC32 = 1, 2, 4, 8, 16
CODEC_NONE, CODEC_LZ4, CODEC_GZIP, CODEC_ZSTD = 0, 1, 2, 3

_V1 = struct.Struct("<QQ")
_V2 = struct.Struct("<QQQ")
_HEADER = struct.Struct("<IIIIQQQQQI4032xI")
_BLOCK_MASK = 4095


class ChunkInfo(NamedTuple):
    """One chunk. Offsets and sizes in bytes; uncompressed offsets are in device space and 4096-aligned."""

    uncompressed_offset: int
    uncompressed_size: int
    compressed_offset: int
    compressed_size: int
    flags: int
    data: int = 0


class ChunkTable:
    """All chunks of one blob in chunk index order."""

    __slots__ = ("_coff", "_csize", "_data", "_flags", "_uoff", "_usize")

    def __init__(self) -> None:
        self._uoff, self._coff, self._data = array("Q"), array("Q"), array("Q")
        self._usize, self._csize = array("I"), array("I")
        self._flags = array("B")

    def append(self, info: ChunkInfo) -> None:
        self._uoff.append(info.uncompressed_offset)
        self._usize.append(info.uncompressed_size)
        self._coff.append(info.compressed_offset)
        self._csize.append(info.compressed_size)
        self._flags.append(info.flags)
        self._data.append(info.data)

    def __len__(self) -> int:
        return len(self._uoff)

    def __getitem__(self, index: int) -> ChunkInfo:
        return ChunkInfo(
            self._uoff[index],
            self._usize[index],
            self._coff[index],
            self._csize[index],
            self._flags[index],
            self._data[index],
        )

    def __iter__(self) -> Iterator[ChunkInfo]:
        return map(ChunkInfo, self._uoff, self._usize, self._coff, self._csize, self._flags, self._data)

    def encode_v1(self) -> bytes:
        out = bytearray()
        for info in self:
            size, stored = info.uncompressed_size - 1, info.compressed_size - 1
            first = info.uncompressed_offset | (size & 0xFFFFF) << 44 | (size & 0xF00000) >> 12
            out += _V1.pack(first, info.compressed_offset | (stored & 0xFFFFF) << 44 | (stored & 0xF00000) << 20)
        return bytes(out)

    def encode_v2(self) -> bytes:
        out = bytearray()
        for info in self:
            first = info.uncompressed_offset >> 12 | (info.uncompressed_size - 1) << 32 | info.flags << 56
            out += _V2.pack(first, info.compressed_offset | info.compressed_size << 40, info.data)
        return bytes(out)

    @classmethod
    def decode_v1(cls, data: bytes, count: int, limits: Limits) -> "ChunkTable":
        """Raises MalformedImage and LimitExceeded."""
        _check_count(len(data), count, V1_SIZE, limits)
        table = cls()
        for first, second in _V1.iter_unpack(data):
            if first & 0xFF:
                raise MalformedImage("chunk information: reserved bits are set")
            size = (first >> 44 | (first & 0xF00) << 12) + 1
            stored = (second >> 44 | second >> 20 & 0xF00000) + 1
            flags = FLAG_COMPRESSED if stored != size else 0
            info = ChunkInfo(first & 0xFFFFFFFF000, size, second & 0xFFFFFFFFFF, stored, flags)
            table.append(info)
        table.check(limits)
        return table

    @classmethod
    def decode_v2(cls, data: bytes, count: int, limits: Limits) -> "ChunkTable":
        """Raises MalformedImage and LimitExceeded."""
        _check_count(len(data), count, V2_SIZE, limits)
        table = cls()
        for first, second, extra in _V2.iter_unpack(data):
            size = (first >> 32 & 0xFFFFFF) + 1
            info = ChunkInfo((first & 0xFFFFFFFF) << 12, size, second & 0xFFFFFFFFFF, second >> 40, first >> 56, extra)
            table.append(info)
        table.check(limits)
        return table

    def check(self, limits: Limits) -> None:
        """Chunks ascend in device space without overlap, none is empty or larger than limits.chunk_bytes."""
        end = 0
        for index, (offset, size, stored) in enumerate(zip(self._uoff, self._usize, self._csize, strict=True)):
            if offset < end or offset & _BLOCK_MASK:
                raise MalformedImage(f"chunk {index}: device offset {offset} overlaps or is not aligned")
            if size > limits.chunk_bytes:
                raise LimitExceeded(f"chunk {index}: {size} bytes are more than limits.chunk_bytes")
            if not stored:
                raise MalformedImage(f"chunk {index}: is stored in no bytes")
            end = offset + size

    @property
    def device_bytes(self) -> int:
        """Size of the device: the end of the last chunk, rounded up to 4096."""
        return (self._uoff[-1] + self._usize[-1] + _BLOCK_MASK) & ~_BLOCK_MASK if self._uoff else 0


class CiHeader(NamedTuple):
    """The header that follows the records."""

    features: int
    compressor: int
    entries: int
    offset: int
    compressed_size: int
    uncompressed_size: int
    zran_offset: int
    zran_size: int
    zran_count: int

    @classmethod
    def parse(cls, raw: bytes) -> "CiHeader":
        if len(raw) != HEADER_SIZE:
            raise MalformedImage(f"chunk information: header has {len(raw)} bytes")
        first, *fields, last = _HEADER.unpack(raw)
        if (first, last) != (MAGIC, MAGIC):
            raise MalformedImage("chunk information: bad magic")
        return cls(*fields)

    def pack(self) -> bytes:
        return _HEADER.pack(MAGIC, *self, MAGIC)


def header_of(entry: BlobEntry) -> CiHeader:
    """The header a blob with this entry must have."""
    return CiHeader(
        entry.features,
        entry.ci_compressor,
        entry.chunk_count,
        entry.ci_offset,
        entry.ci_compressed_size,
        entry.ci_uncompressed_size,
        0,
        0,
        0,
    )


def parse_file(data: bytes, entry: BlobEntry, limits: Limits) -> ChunkTable:
    """`image/<hex>.blob.meta`: uncompressed records, zeros to a multiple of 4096, header. Raises MalformedImage."""
    size = entry.chunk_count * record_size(entry.features)
    padded = (size + _BLOCK_MASK) & ~_BLOCK_MASK
    if len(data) != padded + HEADER_SIZE or data[size:padded].strip(b"\0"):
        raise MalformedImage(f"blob {entry.blob_id}: blob.meta has {len(data)} bytes, expected {padded + HEADER_SIZE}")
    _check_header(CiHeader.parse(data[padded:]), entry)
    return _decode(data[:size], entry, limits)


def decode_ci(payload: bytes, header: bytes, entry: BlobEntry, limits: Limits) -> ChunkTable:
    """The records as they lie in the blob (compressed by ci_compressor) and the header behind them."""
    _check_header(CiHeader.parse(header), entry)
    size = entry.chunk_count * record_size(entry.features)
    if entry.chunk_count > limits.chunks:
        raise LimitExceeded(f"blob {entry.blob_id}: more chunks than limits.chunks")
    if entry.ci_uncompressed_size != size or len(payload) != entry.ci_compressed_size:
        raise MalformedImage(f"blob {entry.blob_id}: chunk information has another size than its entry says")
    return _decode(_unpack(payload, entry.ci_compressor, size), entry, limits)


def check_location(entry: BlobEntry, blob_size: int, limits: Limits) -> None:
    """Before a range read of the CI: is it inside the blob, and no larger than its chunk count allows?"""
    if entry.chunk_count > limits.chunks:
        raise LimitExceeded(f"blob {entry.blob_id}: more chunks than limits.chunks")
    bound = entry.chunk_count * V2_SIZE
    end = entry.ci_offset + entry.ci_compressed_size + HEADER_SIZE
    if entry.ci_compressed_size > bound or end > blob_size or not entry.ci_compressed_size:
        raise MalformedImage(f"blob {entry.blob_id}: chunk information lies outside of the blob")


def pack_file(table: ChunkTable, entry: BlobEntry) -> bytes:
    """The inverse of `parse_file`."""
    records = table.encode_v2() if entry.features & FEATURE_CHUNK_INFO_V2 else table.encode_v1()
    return records + bytes(-len(records) % 4096) + header_of(entry).pack()


def _decode(records: bytes, entry: BlobEntry, limits: Limits) -> ChunkTable:
    v2 = bool(entry.features & FEATURE_CHUNK_INFO_V2)
    decode = ChunkTable.decode_v2 if v2 else ChunkTable.decode_v1
    table = decode(records, entry.chunk_count, limits)
    if table.device_bytes > entry.uncompressed_size:
        raise MalformedImage(f"blob {entry.blob_id}: chunks lie outside of its device")
    return table


def _check_header(header: CiHeader, entry: BlobEntry) -> None:
    # A blob cannot know whether a bootstrap will be merged from it: tools clear that bit in the merged blob table.
    features = header.features & ~FEATURE_INLINED_FS_META
    if features != entry.features & ~FEATURE_INLINED_FS_META or header[1:6] != header_of(entry)[1:6]:
        raise MalformedImage(f"blob {entry.blob_id}: chunk information header contradicts the blob table")
    if header.zran_size or header.zran_count:
        raise MalformedImage(f"blob {entry.blob_id}: unsupported: zran or batch tables")


def _check_count(size: int, count: int, each: int, limits: Limits) -> None:
    if count > limits.chunks:
        raise LimitExceeded(f"chunk information: {count} chunks are more than limits.chunks")
    if size != count * each:
        raise MalformedImage(f"chunk information: {size} bytes for {count} chunks")


def _unpack(payload: bytes, codec: int, size: int) -> bytes:
    try:
        if codec == CODEC_NONE or (codec == CODEC_ZSTD and len(payload) == size):
            out = payload
        elif codec == CODEC_ZSTD:
            frame = zstandard.get_frame_parameters(payload)
            if frame.content_size != size:
                raise MalformedImage("chunk information: zstd frame states another size")
            out = zstandard.ZstdDecompressor().decompress(payload, max_output_size=size)
        elif codec == CODEC_LZ4:
            out = payload if len(payload) == size else lz4.block.decompress(payload, uncompressed_size=size)
        else:
            raise MalformedImage(f"chunk information: unsupported codec {codec}")
    except (zstandard.ZstdError, lz4.block.LZ4BlockError, ValueError) as error:
        raise MalformedImage("chunk information: does not decompress") from error
    if len(out) != size:
        raise MalformedImage("chunk information: decompresses to another size")
    return out
