"""Chunk information (CI) of a data blob: where each chunk lies, stored and decoded (docs/formats.md).

Two record sizes exist: v1 (16 bytes, plain blobs) and v2 (24 bytes; sealed blobs, and plain ones with checksums). A
header of 4096 bytes follows the records. Tables are arrays; there is no object per chunk. Little-endian throughout.
"""

import struct
from array import array
from collections.abc import Iterator
from typing import NamedTuple, Self

import lz4.block
import zstandard

from snapshotter.config import Limits
from snapshotter.errors import LimitExceeded, MalformedImage
from snapshotter.formats.blobtable import (
    CODEC_LZ4,
    CODEC_NONE,
    CODEC_ZSTD,
    FEATURE_CHUNK_INFO_V2,
    FEATURE_INLINED_FS_META,
    SEALED_OVERHEAD,
    V1_SIZE,
    V2_SIZE,
    BlobEntry,
    record_size,
)
from snapshotter.formats.erofs import BLOCK, align

HEADER_SIZE = 4096
MAGIC = 0xB10BB10B
FLAG_COMPRESSED, FLAG_ZRAN, FLAG_BATCH, FLAG_ENCRYPTED, FLAG_CRC32 = 1, 2, 4, 8, 16

_V1 = struct.Struct("<QQ")
_V2 = struct.Struct("<QQQ")
_HEADER = struct.Struct("<IIIIQQQQQI4032sI")
_ZSTD_WINDOW = 8 << 20


class ChunkInfo(NamedTuple):
    """One chunk. Offsets and sizes in bytes; uncompressed offsets are in device space and 4096-aligned."""

    uncompressed_offset: int
    uncompressed_size: int
    compressed_offset: int
    compressed_size: int
    flags: int
    data: int = 0


class ChunkTable:
    """All chunks of one blob in chunk index order, 33 bytes each."""

    __slots__ = (
        "_data",
        "compressed_offsets",
        "compressed_sizes",
        "flags",
        "uncompressed_offsets",
        "uncompressed_sizes",
    )

    def __init__(self) -> None:
        # Columns, for those who walk through all of a table. To be changed by `append` only.
        self.uncompressed_offsets = array("Q")
        self.uncompressed_sizes = array("I")
        self.compressed_offsets = array("Q")
        self.compressed_sizes = array("I")
        self.flags = array("B")
        self._data = array("Q")

    def append(self, info: ChunkInfo) -> None:
        self.uncompressed_offsets.append(info.uncompressed_offset)
        self.uncompressed_sizes.append(info.uncompressed_size)
        self.compressed_offsets.append(info.compressed_offset)
        self.compressed_sizes.append(info.compressed_size)
        self.flags.append(info.flags)
        self._data.append(info.data)

    def __len__(self) -> int:
        return len(self.flags)

    def __getitem__(self, index: int) -> ChunkInfo:
        return ChunkInfo(
            self.uncompressed_offsets[index],
            self.uncompressed_sizes[index],
            self.compressed_offsets[index],
            self.compressed_sizes[index],
            self.flags[index],
            self._data[index],
        )

    def __iter__(self) -> Iterator[ChunkInfo]:
        return map(
            ChunkInfo,
            self.uncompressed_offsets,
            self.uncompressed_sizes,
            self.compressed_offsets,
            self.compressed_sizes,
            self.flags,
            self._data,
        )

    @property
    def device_bytes(self) -> int:
        """Size of the device: the end of the last chunk, rounded up to 4096."""
        return align(self.uncompressed_offsets[-1] + self.uncompressed_sizes[-1], BLOCK) if self.flags else 0

    def encode_v1(self) -> bytes:
        """16 bytes per chunk; flags and data have no place there. A chunk is compressed when its two sizes differ."""
        out = bytearray()
        for info in self:
            size, stored = info.uncompressed_size - 1, info.compressed_size - 1
            first = info.uncompressed_offset | (size & 0xFFFFF) << 44 | (size & 0xF00000) >> 12
            out += _V1.pack(first, info.compressed_offset | (stored & 0xFFFFF) << 44 | (stored & 0xF00000) << 20)
        return bytes(out)

    def encode_v2(self) -> bytes:
        """24 bytes per chunk."""
        out = bytearray()
        for info in self:
            first = info.uncompressed_offset >> 12 | (info.uncompressed_size - 1) << 32 | info.flags << 56
            out += _V2.pack(first, info.compressed_offset | info.compressed_size << 40, info.data)
        return bytes(out)

    @classmethod
    def decode_v1(cls, data: bytes | memoryview, count: int, limits: Limits) -> Self:
        """Raises MalformedImage and LimitExceeded."""
        _check_count(len(data), count, V1_SIZE, limits)
        table = cls()
        for first, second in _V1.iter_unpack(data):
            if first & 0xFF:
                raise MalformedImage("chunk information: reserved bits are set")
            size = (first >> 44 | (first & 0xF00) << 12) + 1
            stored = (second >> 44 | second >> 20 & 0xF00000) + 1
            flags = FLAG_COMPRESSED if stored != size else 0
            table.append(ChunkInfo(first & 0xFFFFFFFF000, size, second & 0xFFFFFFFFFF, stored, flags))
        table._check(limits)
        return table

    @classmethod
    def decode_v2(cls, data: bytes | memoryview, count: int, limits: Limits) -> Self:
        """Raises MalformedImage and LimitExceeded."""
        _check_count(len(data), count, V2_SIZE, limits)
        table = cls()
        for first, second, extra in _V2.iter_unpack(data):
            size = (first >> 32 & 0xFFFFFF) + 1
            offset = (first & 0xFFFFFFFF) << 12
            table.append(ChunkInfo(offset, size, second & 0xFFFFFFFFFF, second >> 40, first >> 56, extra))
        table._check(limits)
        return table

    def _check(self, limits: Limits) -> None:
        """Chunks ascend in device space without overlap, none is empty or larger than limits.chunk_bytes."""
        if self.uncompressed_sizes and max(self.uncompressed_sizes) > limits.chunk_bytes:
            raise LimitExceeded("chunk information: a chunk is larger than limits.chunk_bytes")
        end = 0
        columns = zip(self.uncompressed_offsets, self.uncompressed_sizes, self.compressed_sizes, strict=True)
        for index, (offset, size, stored) in enumerate(columns):
            if offset < end or not stored:
                raise MalformedImage(f"chunk information: chunk {index} overlaps another or is stored in no bytes")
            end = offset + size


class CiHeader(NamedTuple):
    """The header that follows the records."""

    features: int
    compressor: int
    entries: int
    offset: int
    compressed_size: int
    uncompressed_size: int
    zran_offset: int = 0  # of tables that batched and zran chunks need
    zran_size: int = 0
    zran_count: int = 0

    @classmethod
    def parse(cls, raw: bytes | memoryview) -> Self:
        """Raises MalformedImage."""
        if len(raw) != HEADER_SIZE:
            raise MalformedImage(f"chunk information: header has {len(raw)} bytes")
        first, *fields, reserved, last = _HEADER.unpack(raw)
        if (first, last) != (MAGIC, MAGIC) or any(reserved):
            raise MalformedImage("chunk information: bad magic or reserved bytes in its header")
        return cls(*fields)

    def pack(self) -> bytes:
        return _HEADER.pack(MAGIC, *self, bytes(4032), MAGIC)


def header_of(entry: BlobEntry) -> CiHeader:
    """The header a blob with this entry must have."""
    return CiHeader(
        entry.features,
        entry.ci_compressor,
        entry.chunk_count,
        entry.ci_offset,
        entry.ci_compressed_size,
        entry.ci_uncompressed_size,
    )


def pack_file(table: ChunkTable, entry: BlobEntry) -> bytes:
    """`image/<hex>.blob.meta`. Its last HEADER_SIZE bytes are also the CI header of a plain blob."""
    records = table.encode_v2() if entry.features & FEATURE_CHUNK_INFO_V2 else table.encode_v1()
    return records + bytes(-len(records) % BLOCK) + header_of(entry).pack()


def parse_file(data: bytes | memoryview, entry: BlobEntry, limits: Limits) -> ChunkTable:
    """`image/<hex>.blob.meta`: uncompressed records, zeros to a multiple of 4096, header.

    Raises MalformedImage, LimitExceeded; whatever it says is compared with the blob's entry in the bootstrap.
    """
    size = entry.chunk_count * record_size(entry.features)
    padded = align(size, BLOCK)
    if len(data) != padded + HEADER_SIZE or any(data[size:padded]):
        raise MalformedImage(f"blob {entry.blob_id}: blob.meta has {len(data)} bytes, expected {padded + HEADER_SIZE}")
    _check_header(CiHeader.parse(data[padded:]), entry)
    return _decode(data[:size], entry, limits)


def check_location(entry: BlobEntry, blob_size: int, limits: Limits) -> None:
    """Before a ranged read of [ci_offset, + ci_compressed_size + HEADER_SIZE): is all of it inside the blob?"""
    if entry.chunk_count > limits.chunks:
        raise LimitExceeded(f"blob {entry.blob_id}: more chunks than limits.chunks")
    end = entry.ci_offset + entry.ci_compressed_size + HEADER_SIZE
    if not 0 < entry.ci_compressed_size <= entry.chunk_count * V2_SIZE or end > blob_size:
        raise MalformedImage(f"blob {entry.blob_id}: chunk information lies outside of the blob")


def decode_ci(payload: bytes | memoryview, header: bytes | memoryview, entry: BlobEntry, limits: Limits) -> ChunkTable:
    """The records as they lie in a plain blob, compressed by ci_compressor, and the header behind them.

    Raises MalformedImage, LimitExceeded. Never allocates more than the entry's chunk count needs.
    """
    if entry.chunk_count > limits.chunks:
        raise LimitExceeded(f"blob {entry.blob_id}: more chunks than limits.chunks")
    _check_header(CiHeader.parse(header), entry)
    size = entry.chunk_count * record_size(entry.features)
    if entry.ci_uncompressed_size != size or len(payload) != entry.ci_compressed_size:
        raise MalformedImage(f"blob {entry.blob_id}: chunk information has another size than its entry says")
    return _decode(_unpack(payload, entry.ci_compressor, size), entry, limits)


def _decode(records: bytes | memoryview, entry: BlobEntry, limits: Limits) -> ChunkTable:
    v2 = bool(entry.features & FEATURE_CHUNK_INFO_V2)
    decode = ChunkTable.decode_v2 if v2 else ChunkTable.decode_v1
    table = decode(records, entry.chunk_count, limits)
    where = f"blob {entry.blob_id}"
    if table.device_bytes > entry.uncompressed_size or max(table.uncompressed_sizes, default=0) > entry.chunk_size:
        raise MalformedImage(f"{where}: a chunk is larger than chunk_size or lies outside of the device")
    if entry.sealed:
        _check_sealed(table, entry, where)
    else:
        _check_plain(table, entry, where)
    return table


def _check_sealed(table: ChunkTable, entry: BlobEntry, where: str) -> None:
    """Chunks fill device and blob in index order, without gaps."""
    device = stored = 0
    for info in table:
        if info.flags & ~FLAG_COMPRESSED != FLAG_ENCRYPTED or info.data:
            raise MalformedImage(f"{where}: flags {info.flags:#x} or data word in a sealed chunk")
        if info.uncompressed_offset != device or info.compressed_offset != stored:
            raise MalformedImage(f"{where}: chunks do not follow each other")
        plain = info.compressed_size - SEALED_OVERHEAD
        fits = 0 < plain < info.uncompressed_size if info.flags & FLAG_COMPRESSED else plain == info.uncompressed_size
        if not fits:
            raise MalformedImage(f"{where}: stored size of a chunk is impossible")
        device += align(info.uncompressed_size, BLOCK)
        stored += info.compressed_size
    if device != entry.uncompressed_size or stored != entry.compressed_size:
        raise MalformedImage(f"{where}: chunks do not add up to the sizes of device and blob")


def _check_plain(table: ChunkTable, entry: BlobEntry, where: str) -> None:
    end = entry.data_size
    for info in table:
        if info.flags & ~(FLAG_COMPRESSED | FLAG_CRC32):
            raise MalformedImage(f"{where}: unsupported: chunk flags {info.flags:#x}")
        if info.compressed_offset + info.compressed_size > end:
            raise MalformedImage(f"{where}: a chunk lies outside of the blob's data")
        if info.compressed_size != info.uncompressed_size and (
            info.compressed_size > info.uncompressed_size or not info.flags & FLAG_COMPRESSED
        ):
            raise MalformedImage(f"{where}: stored size of a chunk is impossible")


def _check_header(header: CiHeader, entry: BlobEntry) -> None:
    # A plain blob cannot know whether a bootstrap will be merged from it; merging clears the bit in the blob table.
    differing = header.features ^ entry.features
    if differing & (~0 if entry.sealed else ~FEATURE_INLINED_FS_META) or header[1:6] != header_of(entry)[1:6]:
        raise MalformedImage(f"blob {entry.blob_id}: chunk information header contradicts the blob table")
    if header.zran_offset or header.zran_size or header.zran_count:
        raise MalformedImage(f"blob {entry.blob_id}: unsupported: zran or batch tables")


def _check_count(size: int, count: int, each: int, limits: Limits) -> None:
    if count > limits.chunks:
        raise LimitExceeded(f"chunk information: {count} chunks are more than limits.chunks")
    if size != count * each:
        raise MalformedImage(f"chunk information: {size} bytes for {count} chunks")


def _unpack(payload: bytes | memoryview, codec: int, size: int) -> bytes | memoryview:
    """`size` bytes, or MalformedImage. What did not get smaller was stored as it is."""
    if codec == CODEC_NONE or (codec in (CODEC_LZ4, CODEC_ZSTD) and len(payload) == size):
        out = payload
    elif codec == CODEC_ZSTD:
        out = unzstd(payload, size, "chunk information")
    elif codec == CODEC_LZ4:
        try:
            out = lz4.block.decompress(payload, uncompressed_size=size)
        except (lz4.block.LZ4BlockError, ValueError):
            raise MalformedImage("chunk information: not a valid lz4 block of its size") from None
    else:
        raise MalformedImage(f"chunk information: unsupported: compression {codec}")
    if len(out) != size:
        raise MalformedImage("chunk information: decompresses to another size")
    return out


def unzstd(payload: bytes | memoryview, size: int, what: str) -> bytes:
    """One zstd frame of at most `size` bytes; raises MalformedImage naming `what` for anything else."""
    try:
        # The library allocates what a frame's header states, whatever limit it is given: look there first.
        frame = zstandard.get_frame_parameters(payload)
        if frame.content_size not in (size, zstandard.CONTENTSIZE_UNKNOWN) or frame.dict_id:
            raise MalformedImage(f"{what}: zstd frame states another size or a dictionary")
        decoder = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        return decoder.decompress(payload, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError:
        raise MalformedImage(f"{what}: not a valid zstd frame of its size") from None
