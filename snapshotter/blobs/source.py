"""Where ciphertext comes from: ranges of blobs as they arrive, so that the first chunk of one is not kept waiting."""

from collections.abc import AsyncGenerator
from typing import Protocol

from snapshotter.digest import Digest
from snapshotter.monitor.tally import Count
from snapshotter.registry import ranges
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.reference import Reference


class RangeSource(Protocol):
    """Ranges of blobs that nobody has verified."""

    def stream_range(
        self, reference: Reference, digest: Digest, offset: int, length: int, blob_size: int
    ) -> AsyncGenerator[bytes, None]:
        """Exactly `length` bytes of a blob from `offset`, in pieces of any size."""

    def host_failures(self) -> list[Count]:
        """How often a host did not serve what it was asked for, by host and reason."""

    def distrust(self, reference: Reference, digest: Digest) -> int:
        """What came for this blob is wrong: whoever else has it is asked first now. How many can be asked in all."""


class RegistryRanges(RegistryClient):
    """A registry client that hands out ranges in pieces; `read_range` collects the same pieces first."""

    async def stream_range(
        self, reference: Reference, digest: Digest, offset: int, length: int, blob_size: int
    ) -> AsyncGenerator[bytes, None]:
        """Like `read_range`; raises the same errors, possibly after some pieces."""
        span = self._span(digest, offset, offset + length, blob_size)
        async for piece in self._pieces(reference, digest, span, self._attempts(), ranges.MAX_DISCARD_BYTES):
            yield piece
