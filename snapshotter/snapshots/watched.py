"""Registry and key providers as a pull sees them, with a note in the trail of what each took and how it ended."""

import time
from collections.abc import AsyncGenerator, Mapping

from snapshotter.config import Limits
from snapshotter.crypto.layer import LayerPrivate
from snapshotter.digest import Digest
from snapshotter.keys.provider import KeyProvider
from snapshotter.monitor.trail import Trail, outcome_of
from snapshotter.registry.reference import Reference
from snapshotter.registry.transport import ImageSource


class WatchedSource:
    """An `ImageSource`: every document and layer that is fetched is noted with its size."""

    def __init__(self, source: ImageSource, trail: Trail) -> None:
        self._source = source
        self._trail = trail

    async def manifest(self, reference: Reference) -> tuple[bytes, str, Digest]:
        with self._trail.timed("fetch", what="manifest") as told:
            found = await self._source.manifest(reference)
            told["bytes"] = len(found[0])
            return found

    async def blob(self, reference: Reference, digest: Digest, size: int, limit: int) -> bytes:
        with self._trail.timed("fetch", what="blob", blob=digest.hex[:12], bytes=size):
            return await self._source.blob(reference, digest, size, limit)

    def blob_stream(self, reference: Reference, digest: Digest, size: int) -> AsyncGenerator[bytes, None]:
        return self._source.blob_stream(reference, digest, size)

    async def read_range(self, reference: Reference, digest: Digest, offset: int, length: int, blob_size: int) -> bytes:
        with self._trail.timed("fetch", what="range", blob=digest.hex[:12], offset=offset, bytes=length):
            return await self._source.read_range(reference, digest, offset, length, blob_size)


class WatchedKeys:
    """A `KeyProvider` under the name by which metrics and `explain` call it."""

    def __init__(self, name: str, provider: KeyProvider, trail: Trail) -> None:
        self._name = name
        self._provider = provider
        self._trail = trail

    async def unwrap(self, annotations: Mapping[str, str], limits: Limits) -> LayerPrivate:
        begin, outcome = time.monotonic(), "released"
        try:
            return await self._provider.unwrap(annotations, limits)
        except BaseException as error:
            outcome = outcome_of(error)
            raise
        finally:
            seconds = time.monotonic() - begin
            self._trail.keys.add(self._name, outcome)
            self._trail.phases.observe(seconds, "key")
            self._trail.note("key", by=self._name, seconds=round(seconds, 4), outcome=outcome)
