"""An image opened for a look or a check: the same steps a node takes, without a node."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from snapshotter.bootstrap import tables
from snapshotter.bootstrap.loader import open_layer
from snapshotter.config import Config
from snapshotter.digest import Digest
from snapshotter.errors import LimitExceeded
from snapshotter.formats.rafs6 import Bootstrap
from snapshotter.image.manifest import ResolvedImage, fetch_image
from snapshotter.image.policy import Admission
from snapshotter.image.resolver import Image, LazyImage, plan
from snapshotter.keys import configured, ocicrypt
from snapshotter.keys.provider import FileKeys, KeyProvider
from snapshotter.ondemand.attachment import BlobDevice
from snapshotter.registry.reference import Reference
from snapshotter.registry.transport import ImageSource


@dataclass(frozen=True, slots=True)
class Opened:
    """The verified metadata of a lazy image. Holds chunk keys."""

    bootstrap: Bootstrap
    files: Mapping[str, bytes]
    devices: Sequence[BlobDevice]


async def resolve(
    source: ImageSource, reference: Reference, platform: str, config: Config
) -> tuple[ResolvedImage, Image]:
    """Manifest and config, verified, and what kind of image they make."""
    resolved = await fetch_image(source, reference, platform, config.limits)
    pinned = reference.pinned(resolved.manifest_digest)
    digest = resolved.manifest_digest
    image = plan(reference, pinned, resolved.manifest, digest, resolved.config, Admission(False, "open"))
    return resolved, image


async def open_image(source: ImageSource, image: LazyImage, keys: Sequence[Path | str], config: Config) -> Opened:
    """Fetch, decrypt, parse and cross-check the bootstrap layer, as the loader of a node does; nothing is cached.

    Raises KeyDenied, DecryptError, IntegrityError, MalformedImage, LimitExceeded and the registry's errors.
    """
    limits = config.limits
    descriptor = image.bootstrap
    if descriptor.size > limits.bootstrap_bytes:
        raise LimitExceeded(f"bootstrap layer {descriptor.digest}: larger than limits.bootstrap_bytes")
    layer: bytes | bytearray = await source.blob(
        image.source, descriptor.digest, descriptor.size, limits.bootstrap_bytes
    )
    if image.encrypted:
        provider = key_provider(keys, config)
        layer = await ocicrypt.decrypt_layer(layer, descriptor.annotations, provider, limits)
    opened = open_layer(image, layer, limits)
    image.check_claims(opened.diff_id)
    sizes = {blob.digest.hex: blob.size for blob in image.blobs}
    if opened.bootstrap.sealed:
        devices = tables.sealed_devices(opened.bootstrap, opened.files, sizes, limits)
    else:

        async def read(digest: Digest, size: int, offset: int, length: int) -> bytes:
            return await source.read_range(image.source, digest, offset, length, size)

        devices = await tables.stock_devices(opened.bootstrap, opened.files, sizes, limits, read)
    opened.bootstrap.validate(tables.chunk_tables(devices))
    return Opened(opened.bootstrap, opened.files, devices)


def key_provider(keys: Sequence[Path | str], config: Config) -> KeyProvider:
    """The key files given, else what is configured. Raises ConfigError."""
    return FileKeys(keys) if keys else configured.provider(config.keys)
