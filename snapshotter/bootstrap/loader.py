"""From a bootstrap layer to tables the kernel and blobd may use: steps 4–8 of the order of trust.

Each step runs only on the verified output of the one before: layer digest → key release → HMAC over the whole layer →
parse with limits → identity equals the manifest it came with → the chain the caller claims. Nothing is parsed before
it is authenticated, and a refused step leaves nothing behind.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from snapshotter import labels
from snapshotter.bootstrap import archive, tables
from snapshotter.config import Limits
from snapshotter.digest import Digest
from snapshotter.errors import IntegrityError, LimitExceeded, MalformedImage
from snapshotter.files import read_regular, write_atomic
from snapshotter.formats import sealed
from snapshotter.formats.rafs6 import Bootstrap
from snapshotter.formats.rafs6_tree import Inode, read_inode
from snapshotter.image.manifest import Descriptor
from snapshotter.image.policy import ImagePolicy
from snapshotter.image.resolver import LazyImage
from snapshotter.keys import ocicrypt
from snapshotter.keys.provider import KeyProvider
from snapshotter.ondemand.attachment import BlobDevice
from snapshotter.registry.reference import Reference

log = structlog.get_logger(__name__)


class BlobSource(Protocol):
    """The two reads of a registry that a bootstrap needs."""

    async def blob(self, reference: Reference, digest: Digest, size: int, limit: int) -> bytes: ...

    async def read_range(
        self, reference: Reference, digest: Digest, offset: int, length: int, blob_size: int
    ) -> bytes: ...


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """A verified image, ready to be attached. Holds plaintext metadata and chunk keys: keep it short."""

    image: LazyImage
    bootstrap: bytes
    devices: tuple[BlobDevice, ...]
    chain: tuple[str, ...]  # of the data blobs and the bootstrap, bottom first
    sealed: bool
    root: Inode  # of the image's root directory


class Loader:
    """Loads images; keeps bootstrap layers, encrypted as fetched, in `cache_dir`/bootstraps."""

    def __init__(
        self, source: BlobSource, provider: KeyProvider, cache_dir: Path, limits: Limits, policy: ImagePolicy
    ) -> None:
        self._source = source
        self._provider = provider
        self._directory = cache_dir / "bootstraps"
        self._limits = limits
        self._policy = policy

    async def load(self, image: LazyImage) -> LoadedImage:
        """Raises IntegrityError (and below it DigestMismatch, …), KeyDenied, LimitExceeded, PolicyDenied."""
        image.check_claims()
        layer, from_cache = await self._layer(image.source, image.bootstrap)
        if image.encrypted:
            annotations = image.admission.usable(image.bootstrap.annotations, self._limits)
            plain: bytes | bytearray = await ocicrypt.decrypt_layer(layer, annotations, self._provider, self._limits)
        else:
            plain = layer
        try:
            opened = await asyncio.to_thread(open_layer, image, plain, self._limits)
        finally:
            if isinstance(plain, bytearray):
                plain[:] = bytes(len(plain))  # it holds all keys of the image
        image.check_claims(opened.diff_id)
        if opened.bootstrap.sealed:
            devices = await asyncio.to_thread(
                tables.sealed_devices, opened.bootstrap, opened.files, _blob_sizes(image), self._limits
            )
        else:
            self._policy.require_sealed(image.reference, False, "its chunks are not sealed")
            devices = await self._stock(image, opened)
        await asyncio.to_thread(opened.bootstrap.validate, tables.chunk_tables(devices))
        if not from_cache:
            await self._keep(image.bootstrap.digest, layer)
        log.info("bootstrap verified", image=str(image.reference), bootstrap=image.bootstrap.digest, blobs=len(devices))
        return LoadedImage(
            image,
            opened.files["image/image.boot"],
            tuple(devices),
            tuple(image.chain(opened.diff_id)),
            sealed=opened.bootstrap.sealed,
            root=read_inode(opened.bootstrap, opened.bootstrap.root_nid),
        )

    async def _layer(self, source: Reference, descriptor: Descriptor) -> tuple[bytes, bool]:
        """The bootstrap layer as stored: from the cache (True) if it still is what it was, else from the registry."""
        if descriptor.size > self._limits.bootstrap_bytes:
            raise LimitExceeded(f"bootstrap layer {descriptor.digest}: larger than limits.bootstrap_bytes")
        path = self._directory / descriptor.digest.hex
        cached = await asyncio.to_thread(read_regular, path, descriptor.size)
        if cached is not None and await asyncio.to_thread(Digest.of, cached) == descriptor.digest:
            return cached, True
        return await self._source.blob(source, descriptor.digest, descriptor.size, self._limits.bootstrap_bytes), False

    async def _keep(self, digest: Digest, layer: bytes) -> None:
        """Cache the layer of an image that passed every step. A full or read-only cache is not an error."""
        try:
            await asyncio.to_thread(write_atomic, self._directory / digest.hex, layer)
        except OSError as error:
            log.info("bootstrap layer not cached", bootstrap=digest, error=error.strerror)

    async def stored(self, digest: Digest) -> int:
        """Bytes on disk of a bootstrap layer in the cache, 0 if it is not there."""
        try:
            status = await asyncio.to_thread((self._directory / digest.hex).lstat)
        except OSError:
            return 0
        return status.st_blocks * 512

    async def _stock(self, image: LazyImage, opened: "OpenedLayer") -> list[BlobDevice]:
        async def read(digest: Digest, size: int, offset: int, length: int) -> bytes:
            return await self._source.read_range(image.source, digest, offset, length, size)

        return await tables.stock_devices(opened.bootstrap, opened.files, _blob_sizes(image), self._limits, read)


@dataclass(frozen=True, slots=True)
class OpenedLayer:
    """The authenticated content of a bootstrap layer."""

    bootstrap: Bootstrap
    files: Mapping[str, bytes]
    diff_id: Digest


def open_layer(image: LazyImage, plain: bytes | bytearray, limits: Limits) -> OpenedLayer:
    """Unpack and parse a bootstrap layer whose bytes are authentic, and compare it with the image it came with."""
    compressed = not image.bootstrap.media_type.removesuffix(labels.ENCRYPTED_SUFFIX).endswith(".tar")
    tar = archive.gunzip(plain, limits) if compressed else bytes(plain)
    files = archive.members(tar, limits, sealed_names=False)
    bootstrap = Bootstrap.parse(files["image/image.boot"], limits)
    if not bootstrap.sealed:
        return OpenedLayer(bootstrap, files, Digest.of(tar))
    if not image.encrypted:
        raise MalformedImage(f"image {image.reference}: sealed bootstrap in a layer that is not encrypted")
    files = archive.members(tar, limits, sealed_names=True)
    check_identity(image, files, limits)
    # What a sealed layer is called in the config is the digest of the layer as stored (sealed-format §2).
    return OpenedLayer(bootstrap, files, image.bootstrap.digest)


def check_identity(image: LazyImage, files: Mapping[str, bytes], limits: Limits) -> None:
    """Step 8: the bootstrap was made for this manifest and this public config."""
    for name in ("image/identity.json", "image/config.json"):
        if name not in files:
            raise MalformedImage(f"image {image.reference}: {name} is missing from its bootstrap layer")
    identity = sealed.Identity.parse(files["image/identity.json"], limits)
    stated = [(blob.digest, blob.size) for blob in identity.blobs]
    served = [(blob.digest, blob.size) for blob in image.blobs]
    if stated != served:
        raise IntegrityError(
            f"image {image.reference}: its bootstrap was made for other data blobs than its manifest lists",
            reason="identity-mismatch",
        )
    if identity.config_sha256 != sealed.config_sha256(image.config):
        raise IntegrityError(
            f"image {image.reference}: its config is not the one its bootstrap was made for", reason="config-mismatch"
        )


def _blob_sizes(image: LazyImage) -> dict[str, int]:
    return {blob.digest.hex: blob.size for blob in image.blobs}
