"""Everything an image will consist of, from its merged tree and its chunks; nothing is written here.

A source layer gets a data blob of its own, in manifest order, if it brings at least one chunk that no lower layer has.
A layer that brings only metadata lives in the bootstrap alone: RAFS has no device without blocks, and registries store
an empty blob badly. With a trace the start blob comes first, and its chunks are taken out of the layers' blobs.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from snapshotter.build import archive, blob, documents
from snapshotter.build.blob import Blob
from snapshotter.build.chunker import ChunkStore
from snapshotter.build.layers import every_node
from snapshotter.build.options import Options
from snapshotter.config import Limits
from snapshotter.crypto.chunk import CODEC_LZ4, CODEC_NONE, CODEC_ZSTD
from snapshotter.digest import Digest
from snapshotter.errors import LimitExceeded
from snapshotter.formats import rafs6, sealed
from snapshotter.formats.rafs6 import Bootstrap
from snapshotter.formats.rafs6_write import Node, write_bootstrap
from snapshotter.image.manifest import ResolvedImage
from snapshotter.keys import ocicrypt

MAX_BLOBS = 254  # RAFS v6: 8-bit device ids

_COMPRESSION_FLAGS = {
    CODEC_NONE: rafs6.FLAG_COMPRESSION_NONE,
    CODEC_LZ4: rafs6.FLAG_COMPRESSION_LZ4,
    CODEC_ZSTD: rafs6.FLAG_COMPRESSION_ZSTD,
}


@dataclass(frozen=True, slots=True)
class Parts:
    """Data blobs in manifest order, the bootstrap layer as stored with the annotations of its encryption, diff_ids."""

    blobs: tuple[Blob, ...]
    layer: bytes
    encryption: Mapping[str, str]
    diff_ids: tuple[Digest, ...]


def with_start_blob(orders: "Sequence[array[int]]", start: "array[int]", chunks: int) -> "list[array[int]]":
    """Chunk numbers of each blob: the start blob's, then the layers' without those; none is empty."""
    started = bytearray(chunks)
    for number in start:
        started[number] = 1
    rest = [array("Q", (number for number in order if not started[number])) for order in orders]
    return [order for order in (start, *rest) if order]


def parts(
    store: ChunkStore,
    root: Node,
    orders: "Sequence[array[int]]",
    prefetch: Sequence[Node],
    image: ResolvedImage,
    options: Options,
    limits: Limits,
) -> Parts:
    """Raises LimitExceeded for an image that no reader would take."""
    if len(orders) > min(MAX_BLOBS, limits.layers - 1):
        raise LimitExceeded(f"image: {len(orders)} data blobs are more than limits.layers allows")
    blobs = tuple(blob.make(store, numbers, index, options, limits) for index, numbers in enumerate(orders))
    _place(root, orders, len(store))
    bootstrap = write_bootstrap(
        root,
        [item.table for item in blobs],
        chunk_size=options.chunk_size,
        flags=_flags(root, options),
        prefetch=prefetch,
    )
    # What this writes, every reader must take: better to fail here than on a node.
    Bootstrap.parse(bootstrap, limits).validate([item.table.chunks for item in blobs])
    layer, diff_id, unpacked = archive.write(_members(bootstrap, blobs, image, options))
    encryption: dict[str, str] = {}
    if not options.plain:
        layer, encryption = ocicrypt.encrypt_layer(layer, options.recipients)
        diff_id = Digest.of(layer)  # a digest of the plaintext would let anybody confirm a guess
    if len(layer) > limits.bootstrap_bytes or unpacked > limits.bootstrap_unpacked_bytes:
        raise LimitExceeded("image: its metadata is larger than limits.bootstrap_bytes or …_unpacked_bytes")
    return Parts(blobs, layer, encryption, (*(item.digest for item in blobs), diff_id))


def _place(root: Node, orders: "Sequence[array[int]]", chunks: int) -> None:
    """Replace chunk numbers in the tree by blob index << 32 | chunk index."""
    places = array("Q", bytes(8 * chunks))
    for blob_index, order in enumerate(orders):
        for chunk_index, number in enumerate(order):
            places[number] = blob_index << 32 | chunk_index
    for node in every_node(root):
        if node.chunks:
            node.chunks = array("Q", (places[number] for number in node.chunks))


def _flags(root: Node, options: Options) -> int:
    flags = rafs6.FLAG_HASH_BLAKE3 | rafs6.FLAG_EXPLICIT_UID_GID | _COMPRESSION_FLAGS[options.codec.algorithm]
    flags |= rafs6.FLAG_ENCRYPTION_NONE if options.plain else rafs6.FLAG_SEALED
    if any(node.xattrs for node in every_node(root)):
        flags |= rafs6.FLAG_HAS_XATTR
    return flags


def _members(bootstrap: bytes, blobs: Sequence[Blob], image: ResolvedImage, options: Options) -> dict[str, bytes]:
    """Files of the bootstrap layer by name, in the order they are stored."""
    members = {"image/image.boot": bootstrap}
    for item in blobs:
        members[f"image/{item.digest.hex}.blob.meta"] = item.meta_file
        if not options.plain:
            members[f"image/{item.digest.hex}.keys"] = item.keys_file
    if not options.plain:
        members["image/identity.json"] = _identity(blobs, image, options)
        members["image/config.json"] = image.raw_config
    return members


def _identity(blobs: Sequence[Blob], image: ResolvedImage, options: Options) -> bytes:
    public = documents.config(image.config, [], options)
    return sealed.Identity(
        version=1,
        blobs=tuple(sealed.IdentityBlob(digest=str(item.digest), size=item.size) for item in blobs),
        source=str(image.manifest_digest),
        config_sha256=sealed.config_sha256(public),
        domain=options.domain,
        epoch="",
        created=datetime.fromtimestamp(options.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        repository=options.repository or None,
    ).pack()
