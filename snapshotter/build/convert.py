"""`convert`: an OCI image in, a sealed (or plain Nydus) image out.

Layers are streamed one after the other; their chunks go to an unlinked temporary file, and nothing else is written
until every layer turned out to be what its digests say. Then blobs, config and bootstrap layer are uploaded, and the
manifest last (the tag for hints just before), so a failed conversion leaves no half image and no temporary file.
"""

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from snapshotter import labels
from snapshotter.build import assemble, documents, trace
from snapshotter.build.chunker import Chunker, ChunkStore, PlainPacker, SealingPacker
from snapshotter.build.feed import consume
from snapshotter.build.layers import LayerStack
from snapshotter.build.options import Options
from snapshotter.config import Limits
from snapshotter.digest import Digest
from snapshotter.errors import InvalidArgument
from snapshotter.image.claim import hint_tag
from snapshotter.image.manifest import Descriptor, ResolvedImage, encode, fetch_image
from snapshotter.registry.reference import Reference
from snapshotter.registry.transport import BlobContent, ImageSource, ImageStore

log = structlog.get_logger(__name__)

_PIECE = 1 << 20


class Progress(Protocol):
    """Told how far a conversion is; called from the event loop only."""

    def begin(self, what: str, total: int) -> None: ...

    def advance(self, count: int) -> None: ...

    def end(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a conversion did. Sizes in bytes."""

    manifest: Digest
    entries: int  # of all layers' archives
    content_bytes: int  # of all files of all layers, holes included
    chunks: int
    chunk_bytes: int  # of distinct chunks, decoded
    stored_bytes: int  # of all data blobs
    bootstrap_bytes: int  # of the bootstrap layer as stored
    uploaded: int  # blobs, config and bootstrap layer
    present: int  # those the target had already
    seconds: float


class Converter:
    """One conversion. Source and target may be the same store."""

    def __init__(
        self,
        source: ImageSource,
        source_reference: Reference,
        target: ImageStore,
        target_reference: Reference,
        options: Options,
        limits: Limits,
        progress: Progress,
    ) -> None:
        self._source = source
        self._from = source_reference
        self._target = target
        self._to = target_reference
        self._options = options
        self._limits = limits
        self._progress = progress
        self._entries = self._uploaded = self._present = 0

    async def run(self) -> Summary:
        """Raises BadLayer, DigestMismatch, LimitExceeded, InvalidArgument and the errors of both stores."""
        began = time.monotonic()
        options = self._options
        if self._to.digest is not None:
            raise InvalidArgument(f"target {self._to}: give a tag, the digest is known afterwards")
        image = await fetch_image(self._source, self._from, options.platform, self._limits)
        _check_convertible(image, self._from)
        directory = os.environ.get("TMPDIR", "/var/tmp")  # noqa: S108 - the file has no name
        with tempfile.TemporaryFile(dir=directory) as spool:
            store = ChunkStore(spool)
            packer = PlainPacker(options.codec) if options.plain else SealingPacker(options.codec, options.secret)
            with Chunker(store, packer, options.chunk_size, self._limits) as chunker:
                stack = LayerStack(store, chunker, options.directory_mtime_ns, self._limits)
                await self._read_layers(image, stack)
            parts = await asyncio.to_thread(self._assemble, image, store, stack)
            manifest = await self._publish(image, parts)
        return Summary(
            manifest=manifest,
            entries=self._entries,
            content_bytes=chunker.read_bytes,
            chunks=len(store),
            chunk_bytes=sum(store.sizes),
            stored_bytes=sum(blob.size for blob in parts.blobs),
            bootstrap_bytes=len(parts.layer),
            uploaded=self._uploaded,
            present=self._present,
            seconds=time.monotonic() - began,
        )

    async def _read_layers(self, image: ResolvedImage, stack: LayerStack) -> None:
        layers = list(zip(image.manifest.layers, image.image_config.diff_ids, strict=True))
        for number, (layer, diff_id) in enumerate(layers, 1):

            def take(pieces: Iterator[bytes], diff_id: Digest = diff_id) -> int:
                return stack.take(pieces, diff_id)

            self._progress.begin(f"layer {number}/{len(layers)}", layer.size)
            stream = self._source.blob_stream(self._from, layer.digest, layer.size)
            self._entries += await consume(self._counted(stream), take)
            self._progress.end()

    async def _counted(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            async for piece in pieces:
                self._progress.advance(len(piece))
                yield piece
        finally:
            if isinstance(pieces, AsyncGenerator):
                await pieces.aclose()

    def _assemble(self, image: ResolvedImage, store: ChunkStore, stack: LayerStack) -> assemble.Parts:
        traced = trace.traced_files(stack.root, self._options.trace)
        orders = assemble.with_start_blob(stack.orders, trace.start_chunks(traced), len(store))
        return assemble.parts(store, stack.root, orders, traced, image, self._options, self._limits)

    async def _publish(self, image: ResolvedImage, parts: assemble.Parts) -> Digest:
        """Upload everything, the manifest last."""
        config = documents.encode_config(documents.config(image.config, parts.diff_ids, self._options))
        manifest = documents.manifest(config, self._layers(parts), self._limits)
        for number, blob in enumerate(parts.blobs, 1):
            await self._upload(f"blob {number}/{len(parts.blobs)}", blob.digest, blob.size, blob.content)
        await self._upload("metadata", Digest.of(parts.layer), len(parts.layer), _in_pieces(parts.layer))
        await self._upload("config", manifest.config.digest, len(config), _in_pieces(config))
        content = encode(manifest)
        if self._to.host:  # for clients that hand on only what the layers' annotations say
            hinted = replace(self._to, tag=hint_tag(manifest.layers[-1].digest))
            await self._target.put_manifest(hinted, content, labels.MEDIA_OCI_MANIFEST)
        return await self._target.put_manifest(self._to, content, labels.MEDIA_OCI_MANIFEST)

    def _layers(self, parts: assemble.Parts) -> list[Descriptor]:
        own = Digest.of(parts.layer)
        repository = self._options.repository
        if not repository and self._to.host:
            repository = f"{self._to.host}/{self._to.repository}"
        blob_kind = {labels.NYDUS_BLOB: "true"}
        layers = [
            Descriptor(
                media_type=labels.MEDIA_NYDUS_BLOB,
                digest=blob.digest,
                size=blob.size,
                annotations=documents.layer_annotations(blob_kind, repository, blob.digest, own),
            )
            for blob in parts.blobs
        ]
        kind = {labels.NYDUS_BOOTSTRAP: "true", labels.NYDUS_FS_VERSION: "6", **parts.encryption}
        annotations = documents.layer_annotations(kind, repository, own, own)
        media_type = labels.MEDIA_LAYER_GZIP_ENCRYPTED if parts.encryption else labels.MEDIA_LAYER_GZIP
        layers.append(Descriptor(media_type=media_type, digest=own, size=len(parts.layer), annotations=annotations))
        return layers

    async def _upload(self, what: str, digest: Digest, size: int, content: BlobContent) -> None:
        self._progress.begin(what, size)
        assert not isinstance(content, os.PathLike)
        stored = await self._target.upload_blob(self._to, digest, size, lambda: self._counted(content()))
        self._progress.end()
        self._uploaded += stored
        self._present += not stored


def _check_convertible(image: ResolvedImage, reference: Reference) -> None:
    for layer in image.manifest.layers:
        if layer.media_type.endswith(labels.ENCRYPTED_SUFFIX) or labels.NYDUS_BOOTSTRAP in layer.annotations:
            raise InvalidArgument(f"image {reference}: is encrypted or lazy already; convert its OCI source")
        if layer.media_type == labels.MEDIA_NYDUS_BLOB:
            raise InvalidArgument(f"image {reference}: is lazy already; convert its OCI source")


def _in_pieces(content: bytes) -> BlobContent:
    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(content), _PIECE):
            yield content[at : at + _PIECE]

    return pieces
