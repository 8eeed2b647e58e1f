"""Where images come from and go to: the protocols of a registry and of a layout directory, and how to open one."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol, TypeAlias

from snapshotter.config import Config
from snapshotter.digest import Digest
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.layout import OciLayout
from snapshotter.registry.reference import (
    LayoutLocation,
    Reference,
    RegistryLocation,
    parse_location,
)

__all__ = ["ImageSource", "ImageStore", "ImageTarget", "Location", "open_location", "parse_location"]

Location: TypeAlias = RegistryLocation | LayoutLocation
BlobContent: TypeAlias = Path | Callable[[], AsyncIterator[bytes]]


class ImageSource(Protocol):
    """Reads. Every byte is checked against the digest it was asked by; every size is bounded."""

    async def manifest(self, reference: Reference) -> tuple[bytes, str, Digest]:
        """Document, media type as the transport states it ("" if it does not), digest of the document."""

    async def blob(self, reference: Reference, digest: Digest, size: int, limit: int) -> bytes:
        """A whole verified blob of at most `limit` bytes."""

    def blob_stream(self, reference: Reference, digest: Digest, size: int) -> AsyncGenerator[bytes, None]:
        """A whole blob in pieces; worth nothing until the iteration has ended without an error."""

    async def read_range(self, reference: Reference, digest: Digest, offset: int, length: int, blob_size: int) -> bytes:
        """Exactly `length` bytes of a blob, which the caller verifies."""


class ImageTarget(Protocol):
    """Writes; a manifest last, when everything it names is there."""

    async def upload_blob(self, reference: Reference, digest: Digest, size: int, source: BlobContent) -> bool:
        """Store a blob; False if it is there. The content is read again from the start if a connection breaks."""

    async def put_manifest(self, reference: Reference, content: bytes, media_type: str) -> Digest: ...


class ImageStore(ImageSource, ImageTarget, Protocol):
    """Both ways."""


@asynccontextmanager
async def open_location(location: Location, config: Config) -> AsyncIterator[ImageStore]:
    """The store behind `location`; call its methods with `location.reference`. Writing creates a layout."""
    if isinstance(location, LayoutLocation):
        yield OciLayout(location.path, config.limits)
        return
    async with RegistryClient(config.registry, config.limits) as client:
        yield client
