"""One attached image as one sealed memfd: its bootstrap and, per data blob, everything needed to read any chunk.

    header      magic, version, number of blobs, image id, manifest and bootstrap digests, place of the texts below
    blobs       one descriptor each: digest, sizes, codec, digester, number of chunks, place of its index and records
    index       le32 per chunk: device offset of the chunk >> 12, ascending
    records     96 bytes per chunk: device offset, stored offset, both sizes, codec, digest, secret (zeros: not sealed)
    repository  host/repo in UTF-8
    bootstrap   the EROFS metadata image, page-aligned

Made by snapshotd from verified tables, kept by the keeper, mapped by blobd. It holds the chunk keys and never touches a
file system. A lookup is a bisect over the index: no Python object per chunk exists.
"""

import mmap
import os
import struct
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from snapshotter.blobs.chunks import Chunk
from snapshotter.digest import Digest
from snapshotter.errors import InvalidArgument, MalformedImage
from snapshotter.files import is_sealed, seal_memfd
from snapshotter.formats.blobmeta import FLAG_BATCH, FLAG_COMPRESSED, FLAG_ZRAN, ChunkTable

MAX_IMAGE_ID = (1 << 40) - 1
MAX_BLOBS = 254

_MAGIC = b"COCOATT\0"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQ32s32sQQQQ")
_BLOB = struct.Struct("<32sQQIIIIQQ")
_RECORD = struct.Struct("<QQIII4x32s32s")
_PAGE = 4096
_UNREADABLE = FLAG_ZRAN | FLAG_BATCH  # such chunks cannot be read on their own


@dataclass(frozen=True, slots=True)
class BlobDevice:
    """One data blob with its verified chunk table, the input of `pack`."""

    digest: Digest
    size: int  # of the stored blob, bytes
    device_bytes: int  # of the virtual device, a multiple of 4096
    codec: int  # of its compressed chunks
    digester: int
    chunks: ChunkTable
    digests: bytes  # 32 per chunk
    secrets: bytes  # 32 per chunk; b"" = not sealed


class BlobTable:
    """The chunks of one attached blob: a `blobs.chunks.ChunkTable`."""

    __slots__ = (
        "_index", "_records", "count", "decoded_to", "device_bytes", "digest", "digester", "expected", "node", "sealed",
        "size", "trigger",
    )  # fmt: skip

    def __init__(self, view: memoryview, position: int, node: int) -> None:
        """Read the descriptor at `position`. Raises MalformedImage if it points outside of `view`."""
        raw = _BLOB.unpack_from(view, position)
        self.digest = Digest(f"sha256:{raw[0].hex()}")
        self.size, self.device_bytes, _codec, self.digester, sealed, self.count = raw[1:7]
        self.sealed = bool(sealed)
        self.node = node
        self.trigger = self.expected = -1
        self.decoded_to = 0
        self._index = _slice(view, raw[7], 4 * self.count, 4).cast("I")
        self._records = _slice(view, raw[8], _RECORD.size * self.count, 8)

    def find(self, offset: int) -> int:
        """Index of the last chunk that begins at or before device offset `offset`; -1 if there is none."""
        return bisect_right(self._index, offset >> 12) - 1

    def chunk(self, index: int) -> Chunk:
        """Raises MalformedImage if the record contradicts the blob."""
        offset, stored_offset, size, stored_size, codec, digest, secret = _RECORD.unpack_from(
            self._records, index * _RECORD.size
        )
        if offset + size > self.device_bytes or stored_offset + stored_size > self.size or not size or not stored_size:
            raise MalformedImage(f"blob {self.digest}: chunk {index} lies outside", reason="internal")
        return Chunk(index, offset, size, stored_offset, stored_size, codec, digest, secret if self.sealed else None)


class Attachment:
    """An attached image. Owns `fd` and its mapping until `close`."""

    def __init__(self, fd: int) -> None:
        """Take over a memfd made by `pack`. Raises MalformedImage, and then the caller keeps `fd`."""
        if not is_sealed(fd):
            raise MalformedImage("attachment is not sealed", reason="internal")
        size = os.fstat(fd).st_size
        if size < _HEADER.size:
            raise MalformedImage("attachment is too short", reason="internal")
        # Private, because kernels before 6.7 refuse to share what is sealed against writing; nothing is copied.
        # Populated, so that mlockall with MCL_ONFAULT keeps every page of it in memory.
        self._map = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
        view = memoryview(self._map)
        try:
            self._parse(view)
        except (MalformedImage, UnicodeDecodeError, struct.error) as error:
            raise MalformedImage(f"attachment: {error}", reason="internal") from None
        self.fd = fd

    def _parse(self, view: memoryview) -> None:
        magic, version, count, image_id, manifest, bootstrap, *places = _HEADER.unpack_from(view)
        self.image_id: int = image_id
        if magic != _MAGIC or version != _VERSION:
            raise MalformedImage("unknown magic or version")
        if not 0 < self.image_id <= MAX_IMAGE_ID or count > MAX_BLOBS:
            raise MalformedImage("image id or number of blobs out of range")
        self.manifest = Digest(f"sha256:{manifest.hex()}")
        self.bootstrap_digest = Digest(f"sha256:{bootstrap.hex()}")
        self.repository = bytes(_slice(view, places[0], places[1], 1)).decode()
        self.bootstrap = _slice(view, places[2], places[3], _PAGE)
        _slice(view, _HEADER.size, count * _BLOB.size, 1)
        self.blobs = tuple(
            BlobTable(view, _HEADER.size + index * _BLOB.size, self.node(index + 1)) for index in range(count)
        )

    def node(self, device: int) -> int:
        """FUSE node of device 0 (the bootstrap) or of blob `device` - 1."""
        return self.image_id << 8 | device

    def close(self) -> None:
        """Unmap and close; reads that still use the mapping keep it alive until they end."""
        os.close(self.fd)


def pack(
    image_id: int,
    *,
    repository: str,
    manifest: Digest,
    bootstrap_digest: Digest,
    bootstrap: bytes | bytearray | memoryview,
    blobs: Sequence[BlobDevice],
) -> int:
    """A sealed memfd for `Attachment`, which the caller owns. `repository` is host/repo, where blobs are fetched.

    Raises InvalidArgument for a bad id or tables that contradict themselves.
    """
    if not 0 < image_id <= MAX_IMAGE_ID or len(blobs) > MAX_BLOBS or not bootstrap:
        raise InvalidArgument("attachment: image id, number of blobs or bootstrap out of range")
    place = _HEADER.size + len(blobs) * _BLOB.size
    descriptors, parts = [], list[tuple[int, bytes | memoryview]]()
    for blob in blobs:
        index, records = _tables(blob)
        index_place = _align(place, 8)
        records_place = _align(index_place + len(index), 8)
        place = records_place + len(records)
        parts += [(index_place, index), (records_place, records)]
        descriptors.append(
            _BLOB.pack(
                bytes.fromhex(blob.digest.hex), blob.size, blob.device_bytes, blob.codec, blob.digester,
                bool(blob.secrets), len(blob.chunks), index_place, records_place,
            )
        )  # fmt: skip
    name = repository.encode()
    parts.append((place, name))
    bootstrap_place = _align(place + len(name), _PAGE)
    parts.append((bootstrap_place, memoryview(bootstrap)))
    header = _HEADER.pack(
        _MAGIC, _VERSION, len(blobs), image_id, bytes.fromhex(manifest.hex), bytes.fromhex(bootstrap_digest.hex),
        place, len(name), bootstrap_place, len(bootstrap),
    )  # fmt: skip
    parts.insert(0, (0, header + b"".join(descriptors)))
    return seal_memfd(f"image-{image_id}", parts)


def _tables(blob: BlobDevice) -> tuple[bytes, bytes]:
    """Index and records of one blob."""
    count = len(blob.chunks)
    if len(blob.digests) != 32 * count or len(blob.secrets) not in (0, 32 * count) or blob.device_bytes % _PAGE:
        raise InvalidArgument(f"blob {blob.digest}: tables of different lengths")
    index, records = array("I"), bytearray(count * _RECORD.size)
    end = 0
    for number, chunk in enumerate(blob.chunks):
        start = chunk.uncompressed_offset
        if start % _PAGE or start < end or chunk.flags & _UNREADABLE:
            raise InvalidArgument(f"blob {blob.digest}: chunk {number} overlaps, is not aligned, or is of another kind")
        end = start + chunk.uncompressed_size
        if end > blob.device_bytes or chunk.compressed_offset + chunk.compressed_size > blob.size:
            raise InvalidArgument(f"blob {blob.digest}: chunk {number} lies outside")
        index.append(start >> 12)
        _RECORD.pack_into(
            records, number * _RECORD.size, start, chunk.compressed_offset, chunk.uncompressed_size,
            chunk.compressed_size, blob.codec if chunk.flags & FLAG_COMPRESSED else 0,
            blob.digests[32 * number : 32 * number + 32], blob.secrets[32 * number : 32 * number + 32],
        )  # fmt: skip
    return index.tobytes(), bytes(records)


def _align(place: int, to: int) -> int:
    return -(-place // to) * to


def _slice(view: memoryview, place: int, length: int, alignment: int) -> memoryview:
    if place % alignment or place + length > len(view):
        raise MalformedImage("a table lies outside")
    return view[place : place + length]
