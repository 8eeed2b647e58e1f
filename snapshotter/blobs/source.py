"""Where ciphertext comes from: ranges of blobs as they arrive, so that the first chunk of one is not kept waiting."""

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from snapshotter.digest import Digest
from snapshotter.monitor.tally import Count
from snapshotter.registry.endpoint import Endpoint
from snapshotter.registry.reference import Reference


class RangeSource(Protocol):
    """Ranges of blobs that nobody has verified (`registry.client`)."""

    def stream_range(
        self,
        reference: Reference,
        digest: Digest,
        offset: int,
        length: int,
        blob_size: int,
        host: Endpoint | None = None,
    ) -> AsyncGenerator[bytes, None]:
        """Exactly `length` bytes of a blob from `offset`, in pieces of any size. `host`: only from there."""

    def host_failures(self) -> list[Count]:
        """How often a host did not serve what it was asked for, by host and reason."""

    def hosts(self, reference: Reference, digest: Digest) -> Sequence[Endpoint]:
        """Who can be asked for a blob, at least one, in the order in which they should be."""

    def distrust(self, reference: Reference, digest: Digest, host: Endpoint) -> None:
        """What came from `host` for this blob is wrong."""
