"""`check`: every byte of an image, verified the way a node would verify it when it is read."""

import argparse
import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

from snapshotter.build.feed import consume
from snapshotter.build.stream import ByteStream, decompressed
from snapshotter.cli.opened import Opened, key_provider, open_image, resolve
from snapshotter.cli.progress import Progress
from snapshotter.config import Config
from snapshotter.crypto import chunk
from snapshotter.digest import Digest
from snapshotter.errors import DigestMismatch, MalformedImage
from snapshotter.formats import blobmeta
from snapshotter.image.manifest import Descriptor, ResolvedImage
from snapshotter.image.resolver import EncryptedImage, LazyImage, OrdinaryImage
from snapshotter.ondemand.attachment import BlobDevice
from snapshotter.registry.reference import Reference
from snapshotter.registry.transport import ImageSource, open_location, parse_location
from snapshotter.snapshots.wholelayers import WholeLayers


async def run(arguments: argparse.Namespace, config: Config) -> int:
    """0, or the error of the first thing that is wrong."""
    location = parse_location(arguments.image)
    progress = Progress()
    async with open_location(location, config) as source:
        resolved, image = await resolve(source, location.reference, arguments.platform, config)
        progress.note(f"manifest {resolved.manifest_digest} and config: ok")
        if isinstance(image, OrdinaryImage):
            await _check_ordinary(source, location.reference, resolved, progress)
            print(f"ok: ordinary image, {len(resolved.manifest.layers)} layers")
            return 0
        if isinstance(image, EncryptedImage):
            layers = WholeLayers(source, key_provider(arguments.key, config), config.limits)
            await _check_encrypted(source, image, layers, progress)
            print(f"ok: image of {len(image.layers)} layers, encrypted as a whole")
            return 0
        opened = await open_image(source, image, arguments.key, config)
        progress.note(f"bootstrap layer {image.bootstrap.digest}: ok")
        chunks = await _check_blobs(source, image, opened, progress)
        first = len(image.blobs) + 1  # of the ordinary layers on top
        await _check_ordinary(source, location.reference, resolved, progress, first)
        kind = "sealed" if opened.bootstrap.sealed else "plain lazy"
        print(f"ok: {kind} image, {opened.bootstrap.inodes} names, {len(image.blobs)} blobs, {chunks} chunks")
    return 0


async def _check_ordinary(
    source: ImageSource, reference: Reference, resolved: ResolvedImage, progress: Progress, first: int = 0
) -> None:
    layers = list(zip(resolved.manifest.layers, resolved.image_config.diff_ids, strict=True))
    for layer, diff_id in layers[first:]:
        await _check_layer(source, reference, layer, diff_id, progress)


async def _check_layer(
    source: ImageSource, reference: Reference, layer: Descriptor, diff_id: Digest, progress: Progress
) -> None:
    progress.begin(f"layer {layer.digest}", layer.size)
    stream = source.blob_stream(reference, layer.digest, layer.size)
    found = await consume(stream, _diff_id)
    progress.advance(layer.size)
    progress.end()
    if found != diff_id:
        raise DigestMismatch(f"layer {layer.digest}: unpacks to {found}, the config says {diff_id}")


async def _check_encrypted(source: ImageSource, image: EncryptedImage, layers: WholeLayers, progress: Progress) -> None:
    for number, layer in enumerate(image.layers):
        encrypted = image.layer(number)
        if encrypted is None:
            await _check_layer(source, image.source, layer, image.diff_ids[number], progress)
            continue
        progress.begin(f"layer {layer.digest}", layer.size)
        async with layers.opened(encrypted, Path(tempfile.gettempdir())) as plain:
            found = await asyncio.to_thread(_diff_id, plain)
        progress.advance(layer.size)
        progress.end()
        if found != encrypted.diff_id:
            raise DigestMismatch(f"layer {layer.digest}: unpacks to {found}, the config says {encrypted.diff_id}")


def _diff_id(pieces: Iterator[bytes]) -> Digest:
    found = ByteStream(decompressed(pieces)).finish()
    for _ in pieces:
        pass
    return found


async def _check_blobs(source: ImageSource, image: LazyImage, opened: Opened, progress: Progress) -> int:
    """Every layer's digest, every chunk of every blob. Returns the number of chunks."""
    devices = {device.digest: device for device in opened.devices}
    chunks = 0
    for descriptor in image.blobs:
        progress.begin(f"blob {descriptor.digest}", descriptor.size)
        chunks += await _check_blob(source, image, descriptor, devices.get(descriptor.digest))
        progress.advance(descriptor.size)
        progress.end()
    return chunks


async def _check_blob(source: ImageSource, image: LazyImage, descriptor: Descriptor, device: BlobDevice | None) -> int:
    def check(pieces: Iterator[bytes]) -> int:
        stream = ByteStream(pieces)
        checked = _decode_all(stream, device) if device is not None else 0
        stream.finish()  # the source verifies the blob's digest behind its last byte
        return checked

    return await consume(source.blob_stream(image.source, descriptor.digest, descriptor.size), check)


def _decode_all(stream: ByteStream, device: BlobDevice) -> int:
    """Decode all chunks in the order they are stored. Raises IntegrityError for the first that is wrong."""
    table, position = device.chunks, 0
    for index in sorted(range(len(table)), key=lambda i: table[i].compressed_offset):
        info = table[index]
        if info.compressed_offset < position:
            raise MalformedImage(f"blob {device.digest}: chunk {index} overlaps another one")
        stream.skip(info.compressed_offset - position)
        stored = stream.read(info.compressed_size)
        position = info.compressed_offset + info.compressed_size
        secret = device.secrets[32 * index : 32 * index + 32] if device.secrets else None
        compressed = info.flags & blobmeta.FLAG_COMPRESSED
        chunk.decode(
            stored,
            digest=device.digests[32 * index : 32 * index + 32],
            size=info.uncompressed_size,
            codec=device.codec if compressed else chunk.CODEC_NONE,
            digester=device.digester,
            sealed_secret=secret,
        )
    return len(table)
