"""What an operator's commands (`ls`, `gc`, `prune`) ask of snapshotd: listings, and cleaning up now.

Answers come in batches, so that a node with many snapshots neither fills a message nor keeps containerd waiting.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from pathlib import Path
from typing import TypeVar

import structlog

from snapshotter import control
from snapshotter.config import Limits
from snapshotter.errors import InvalidArgument, SnapshotterError
from snapshotter.image import documents
from snapshotter.snapshots.model import Info, Kind
from snapshotter.snapshots.snapshotter import Snapshotter
from snapshotter.snapshots.store import Store

log = structlog.get_logger(__name__)

_BATCH = 20  # keys or rows in a message: a key may have 16 KiB, six times as much in JSON
_WRITTEN_SECONDS = 600  # a file this young may belong to a pull that has no snapshot yet

Stream = AsyncIterator[control.Reply]
T = TypeVar("T")


class Operations:
    """`mounted` says which images are mounted, by attach id."""

    def __init__(
        self,
        snapshotter: Snapshotter,
        store: Store,
        mounted: Callable[[], Collection[int]],
        cache_dir: Path,
        limits: Limits,
    ) -> None:
        self._snapshotter = snapshotter
        self._store = store
        self._mounted = mounted
        self._cache_dir = cache_dir
        self._limits = limits

    async def answer(self, message: control.Message) -> control.Reply | Stream:
        """Raises InvalidArgument for what is none of these."""
        match message.get("op"):
            case "images":
                return self.images()
            case "snapshots":
                return self.snapshots(measured=message.get("measured") is not False)
            case "gc":
                return await self.gc(), ()
            case "prune":
                return await self.prune(), ()
            case other:
                raise InvalidArgument(f"no such request: {str(other)[:40]}")

    async def images(self) -> Stream:
        """Every lazy image: what it is, how many snapshots show it, and the keys of the first of them."""
        mounted, users = self._mounted(), self._store.users()
        for number, plugin, created_ns, record in self._store.placed_images():
            keys = users.get(number, [])
            row = {
                "id": number,
                "plugin": plugin,
                "reference": record.reference,
                "manifest": record.manifest,
                "bootstrap": record.bootstrap,
                "sealed": record.sealed,
                "mounted": number in mounted,
                "created": created_ns // 1_000_000_000,
                "users": len(keys),
                "snapshots": keys[:_BATCH],
            }
            yield {"image": row}, ()
        yield {"end": True}, ()

    async def snapshots(self, *, measured: bool) -> Stream:
        """Every snapshot of every plugin; `measured`: with what it occupies, where that can be told."""
        for plugin in self._store.plugins():
            for numbers in _batches(self._store.ids(plugin)):
                # The ids first: while one is measured, others may be removed.
                found = [(self._store.get(plugin, info.name).id, info) for info in self._store.infos(numbers)]
                yield {"snapshots": [await self._row(plugin, number, info, measured) for number, info in found]}, ()
        yield {"end": True}, ()

    async def _row(self, plugin: str, number: int, info: Info, measured: bool) -> control.Message:
        row: control.Message = {
            "id": number,
            "plugin": plugin,
            "name": info.name,
            "parent": info.parent,
            "kind": Kind(info.kind).name.lower(),
            "created": info.created_ns // 1_000_000_000,
            "updated": info.updated_ns // 1_000_000_000,
            "size": None,
            "inodes": None,
        }
        if measured:
            with contextlib.suppress(SnapshotterError, OSError):  # removed meanwhile, or its directory is lost
                usage = await self._snapshotter.usage(plugin, info.name)
                row |= {"size": usage.size, "inodes": usage.inodes}
        return row

    async def gc(self) -> control.Message:
        """Destroy the directories that belong to no snapshot and unmount the images that no container uses."""
        before = await self._snapshotter.garbage()
        await self._snapshotter.cleanup()
        kept = await self._snapshotter.garbage()
        released, resisting = [], []
        for number in sorted(set(self._mounted()) - self._store.users().keys()):
            record = self._store.images().get(number)
            try:
                await self._snapshotter.release(number)
            except (OSError, SnapshotterError) as error:
                log.info("image stays", attach_id=number, error=str(error))
                resisting.append({"what": record.reference if record else str(number), "why": str(error)})
            else:
                released.append(record.reference if record else str(number))
        resisting += [{"what": f"snapshots/{name}", "why": "cannot be removed yet; the log says why"} for name in kept]
        return {"removed": len(set(before) - set(kept)), "unmounted": released, "kept": resisting}

    async def prune(self) -> control.Message:
        """Drop cached bootstrap layers and documents of images that are not here. What is missing is fetched again."""
        records = self._store.images().values()
        return await asyncio.to_thread(
            self._prune, {record.manifest for record in records}, {record.bootstrap for record in records}
        )

    def _prune(self, manifests: Collection[str], bootstraps: Collection[str]) -> control.Message:
        kept = documents.needed(self._cache_dir / "documents", manifests, self._limits)
        sizes = [
            *_remove_others(self._cache_dir / "documents", kept),
            *_remove_others(self._cache_dir / "bootstraps", {name.removeprefix("sha256:") for name in bootstraps}),
        ]
        return {"entries": len(sizes), "bytes": sum(sizes)}


def _remove_others(directory: Path, kept: Collection[str]) -> Iterator[int]:
    """Delete the files that are neither `kept` nor just written; yields their sizes."""
    for path in directory.glob("*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if path.name not in kept and time.time() - status.st_mtime > _WRITTEN_SECONDS:
                path.unlink()
                yield status.st_size


def _batches(rows: list[T]) -> Iterator[list[T]]:
    for begin in range(0, len(rows), _BATCH):
        yield rows[begin : begin + _BATCH]
