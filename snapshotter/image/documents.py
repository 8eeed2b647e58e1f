"""Manifests, indexes and configs of admitted images, kept so that a node restarts without its registry.

They lie in `cache_dir`, which anybody may change: a document is what it should be if it has its digest, and comes from
the registry otherwise. Nothing is written before an image was admitted.
"""

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncGenerator, Collection, Iterable
from pathlib import Path
from typing import Any

import structlog

from snapshotter.config import Limits
from snapshotter.digest import Digest
from snapshotter.files import read_regular, write_atomic
from snapshotter.registry.reference import Reference
from snapshotter.registry.transport import ImageSource

log = structlog.get_logger(__name__)

RECENT = 32  # documents fetched last, which `keep` may be asked to keep


class DocumentCache:
    """An `ImageSource` that answers for documents it has and asks `source` for everything else."""

    def __init__(self, source: ImageSource, directory: Path, limits: Limits) -> None:
        self._source = source
        self._directory = directory
        self._limits = limits
        self._recent: OrderedDict[Digest, bytes] = OrderedDict()

    async def manifest(self, reference: Reference) -> tuple[bytes, str, Digest]:
        if reference.digest is not None:
            kept = await self._kept(reference.digest, self._limits.manifest_bytes)
            if kept is not None:
                return kept, "", reference.digest
        raw, media_type, digest = await self._source.manifest(reference)
        self._remember(digest, raw)
        return raw, media_type, digest

    async def blob(self, reference: Reference, digest: Digest, size: int, limit: int) -> bytes:
        kept = await self._kept(digest, min(size, limit))
        if kept is not None and len(kept) == size:
            return kept
        raw = await self._source.blob(reference, digest, size, limit)
        self._remember(digest, raw)
        return raw

    def blob_stream(self, reference: Reference, digest: Digest, size: int) -> AsyncGenerator[bytes, None]:
        return self._source.blob_stream(reference, digest, size)

    async def read_range(self, reference: Reference, digest: Digest, offset: int, length: int, blob_size: int) -> bytes:
        return await self._source.read_range(reference, digest, offset, length, blob_size)

    async def keep(self, digests: Iterable[Digest]) -> None:
        """Write these documents, as far as they were fetched lately. A full or read-only cache is not an error."""
        for digest in digests:
            raw = self._recent.pop(digest, None)
            if raw is not None:
                try:
                    await asyncio.to_thread(write_atomic, self._directory / digest.hex, raw)
                except OSError as error:
                    log.info("document not cached", digest=digest, error=error.strerror)

    async def _kept(self, digest: Digest, limit: int) -> bytes | None:
        found = await asyncio.to_thread(read_regular, self._directory / digest.hex, limit)
        return found if found is not None and Digest.of(found) == digest else None

    def _remember(self, digest: Digest, raw: bytes) -> None:
        self._recent[digest] = raw
        while len(self._recent) > RECENT:
            self._recent.popitem(last=False)


def needed(directory: Path, manifests: Collection[str], limits: Limits) -> set[str]:
    """Names of the files in `directory` that restarting these images needs: their manifests, the configs these name,
    the indexes that list them, and signatures. What cannot be read as such is not needed.
    """
    found: set[str] = set()
    for path in directory.glob("*"):
        raw = read_regular(path, limits.manifest_bytes)
        if raw is None:
            continue
        document = _object(raw)
        if f"sha256:{path.name}" in manifests:
            found |= {path.name, str(_object(document.get("config")).get("digest")).removeprefix("sha256:")}
            continue
        entries = document.get("manifests")
        if isinstance(entries, list) and any(str(_object(entry).get("digest")) in manifests for entry in entries):
            found.add(path.name)
    return found | {f"{name.removeprefix('sha256:')}.signatures" for name in found | set(manifests)}


def _object(found: Any) -> dict[str, Any]:
    """The JSON object in some bytes, or what was found inside of one; {} if it is none."""
    try:
        value = json.loads(found) if isinstance(found, bytes) else found
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
