"""How much of an attached image is in the cache: counted chunk by chunk, between the reads that matter more."""

import asyncio
from typing import NamedTuple

from snapshotter.blobs.cache import ChunkCache
from snapshotter.ondemand.attachment import Attachment

_MOST = 1 << 16  # chunks that are counted: each costs a hash and a stat
_SLICE = 64


class Cached(NamedTuple):
    """Stored bytes of the image's chunks that are here, and of all its chunks."""

    bytes: int
    of: int


async def inventory(attachment: Attachment, cache: ChunkCache) -> Cached | None:
    """None if the image has too many chunks. On the loop; the image may be detached meanwhile."""
    if sum(table.count for table in attachment.blobs) > _MOST:
        return None
    here = total = 0
    for table in attachment.blobs:
        for begin in range(0, table.count, _SLICE):
            for index in range(begin, min(begin + _SLICE, table.count)):
                chunk = table.chunk(index)
                total += chunk.stored_size
                here += chunk.stored_size if cache.has(chunk.name, chunk.stored_size) else 0
            await asyncio.sleep(0)
    return Cached(here, total)
