"""What blobd tells about itself: numbers for metrics, and for `explain` the story of an image."""

import os
from collections.abc import Iterable
from typing import Any

from snapshotter.blobs.cache import ChunkCache
from snapshotter.blobs.chunks import Counters, ImageCounters
from snapshotter.blobs.source import RangeSource
from snapshotter.monitor import journal
from snapshotter.ondemand.inflight import SessionMemory
from snapshotter.ondemand.session import Session


class Reports:
    """Looks at the parts of blobd; on its loop."""

    def __init__(
        self,
        counters: Counters,
        session: Session,
        memory: SessionMemory,
        cache: ChunkCache,
        source: RangeSource,
        quota: int,
    ) -> None:
        self._counters = counters
        self._session = session
        self._memory = memory
        self._cache = cache
        self._source = source
        self._quota = quota

    def metrics(self) -> dict[str, Any]:
        """Everything that `monitor.dataplane` shows; docs/monitoring.md says what the numbers mean."""
        counters = self._counters
        return {
            "counters": counters.snapshot(),
            "causes": counters.causes.snapshot(),
            "failures": counters.failures.snapshot(),
            "fetches": counters.fetches.snapshot(),
            "waits": counters.waits.snapshot(),
            "hosts": self._source.host_failures(),
            "decodes": counters.decodes.snapshot(),
            "images": [
                {"id": number, "manifest": image.manifest, "counters": image.snapshot()}
                for number, image in counters.images().items()
            ],
            "in_flight": self._memory.in_flight(),
            "parked": self._session.parked,
            "oldest_seconds": self._session.oldest_seconds(),
            "open_files": self._memory.open_files().total(),
            "cache": self._cache.stats() | {"quota": self._quota},
        }

    def explain(self, image: str) -> dict[str, Any]:
        """The stories of the images with this manifest digest or id; of all images only their names if it is ""."""
        attached = self._counters.images()
        chosen = {
            manifest: _ids(attached, manifest)
            for manifest in dict.fromkeys([*self._counters.journal.images(), *(i.manifest for i in attached.values())])
        }
        if not image:
            found: list[dict[str, Any]] = [{"manifest": manifest, "ids": ids} for manifest, ids in chosen.items()]
        else:
            found = [
                {
                    "manifest": manifest,
                    "ids": ids,
                    "counters": {str(number): attached[number].snapshot() for number in ids},
                    "longest_waits": _longest(attached[number] for number in ids),
                    **self._counters.journal.tell(manifest),
                }
                for manifest, ids in chosen.items()
                if image == manifest or image in map(str, ids)
            ]
        return {"pid": os.getpid(), "now": journal.now(), "images": found}


def _ids(attached: dict[int, ImageCounters], manifest: str) -> list[int]:
    return [number for number, image in attached.items() if image.manifest == manifest]


def _longest(images: Iterable[ImageCounters]) -> list[dict[str, float]]:
    names = ("seconds", "wall", "device", "offset", "length")
    return [dict(zip(names, wait, strict=True)) for image in images for wait in sorted(image.longest, reverse=True)]
