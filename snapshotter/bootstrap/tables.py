"""Which bytes of which blob belong where: one checked table per blob, from a sealed or a stock bootstrap.

The bootstrap's own chunk table, the chunk information and (sealed) the keys file say the same things; each is compared
with the others before one of them is used (docs/formats.md).
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence

from snapshotter.config import Limits
from snapshotter.digest import Digest
from snapshotter.errors import MalformedImage
from snapshotter.formats import blobmeta, sealed
from snapshotter.formats.blobmeta import ChunkTable
from snapshotter.formats.blobtable import BlobEntry
from snapshotter.formats.rafs6 import Bootstrap
from snapshotter.ondemand.attachment import BlobDevice

TAG_BYTES = 28  # nonce and tag of a sealed chunk

ReadBlob = Callable[[Digest, int, int, int], Awaitable[bytes]]
"""digest, blob size, offset, length → bytes of a data blob that nobody has verified."""


def sealed_devices(
    bootstrap: Bootstrap, files: Mapping[str, bytes], blob_sizes: Mapping[str, int], limits: Limits
) -> list[BlobDevice]:
    """Tables of a sealed image. `files` are the archive's members, `blob_sizes` layer sizes by hex digest."""
    devices = []
    for index, entry in enumerate(bootstrap.blobs):
        size = _layer_size(entry, blob_sizes)
        chunks = blobmeta.parse_file(_member(files, entry, "blob.meta"), entry, limits)
        digests, secrets = sealed.KeysFile.parse(
            _member(files, entry, "keys"), entry.blob_id, entry.chunk_count, limits
        )
        if digests != bootstrap.digests(index, entry.chunk_count):
            raise MalformedImage(f"blob {entry.blob_id}: keys file and chunk table disagree about digests")
        _check_back_to_back(entry, chunks, size)
        devices.append(_device(entry, size, chunks, digests, secrets))
    return devices


async def stock_devices(
    bootstrap: Bootstrap, files: Mapping[str, bytes], blob_sizes: Mapping[str, int], limits: Limits, read: ReadBlob
) -> list[BlobDevice]:
    """Tables of a stock Nydus image, whose chunk information may have to be read from the blob itself.

    That part of the blob is not authenticated, and need not be: digests come from the bootstrap, and a chunk whose
    bytes do not have its digest is never served.
    """
    devices = []
    for index, entry in enumerate(bootstrap.blobs):
        size = _layer_size(entry, blob_sizes)
        meta = files.get(f"image/{entry.blob_id}.blob.meta")
        if meta is not None:
            chunks = blobmeta.parse_file(meta, entry, limits)
        else:
            blobmeta.check_location(entry, size, limits)
            length = entry.ci_compressed_size + blobmeta.HEADER_SIZE
            raw = await read(Digest(f"sha256:{entry.blob_id}"), size, entry.ci_offset, length)
            chunks = blobmeta.decode_ci(raw[: -blobmeta.HEADER_SIZE], raw[-blobmeta.HEADER_SIZE :], entry, limits)
        _check_inside(entry, chunks, size)
        devices.append(_device(entry, size, chunks, bootstrap.digests(index, entry.chunk_count), b""))
    return devices


def chunk_tables(devices: Sequence[BlobDevice]) -> list[ChunkTable]:
    return [device.chunks for device in devices]


def _device(entry: BlobEntry, size: int, chunks: ChunkTable, digests: bytes, secrets: bytes) -> BlobDevice:
    return BlobDevice(
        digest=Digest(f"sha256:{entry.blob_id}"),
        size=size,
        device_bytes=entry.uncompressed_size,
        codec=entry.compression_algo,
        digester=entry.digest_algo,
        chunks=chunks,
        digests=digests,
        secrets=secrets,
    )


def _layer_size(entry: BlobEntry, blob_sizes: Mapping[str, int]) -> int:
    try:
        return blob_sizes[entry.blob_id]
    except KeyError:
        raise MalformedImage(f"bootstrap names blob {entry.blob_id[:64]!r}, which is not a layer") from None


def _member(files: Mapping[str, bytes], entry: BlobEntry, suffix: str) -> bytes:
    name = f"image/{entry.blob_id}.{suffix}"
    try:
        return files[name]
    except KeyError:
        raise MalformedImage(f"bootstrap layer: {name} is missing") from None


def _check_back_to_back(entry: BlobEntry, chunks: ChunkTable, size: int) -> None:
    """Sealed chunks fill their blob exactly, in index order (sealed-format §3)."""
    position = 0
    for chunk in chunks:
        if chunk.compressed_offset != position or chunk.compressed_size <= TAG_BYTES:
            raise MalformedImage(f"blob {entry.blob_id}: chunk at {chunk.compressed_offset} breaks the order")
        position += chunk.compressed_size
    if position != size or entry.compressed_size != size:
        raise MalformedImage(f"blob {entry.blob_id}: chunks add up to {position} bytes, layer has {size}")


def _check_inside(entry: BlobEntry, chunks: ChunkTable, size: int) -> None:
    for chunk in chunks:
        if chunk.compressed_offset + chunk.compressed_size > size:
            raise MalformedImage(f"blob {entry.blob_id}: chunk at {chunk.compressed_offset} ends behind the blob")
