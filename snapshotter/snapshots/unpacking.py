"""Layers that are being unpacked here, because containerd cannot: each by one task, however many wait for it.

A client that gives up does not stop its layer: it comes back for it. What was begun when the process ends is garbage.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import structlog

from snapshotter import failpoints
from snapshotter.snapshots import directories
from snapshotter.snapshots.directories import Directories, RootAttributes
from snapshotter.snapshots.model import Usage
from snapshotter.snapshots.remote import Unpack

log = structlog.get_logger(__name__)

Key = tuple[str, str, int | None]  # plugin, chain id, id of the parent


class Unpacking:
    def __init__(self, found: Directories) -> None:
        self._directories = found
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._busy: set[str] = set()
        self._stopping = False

    def owns(self, name: str) -> bool:
        """Whether something is being unpacked into this directory; otherwise it is garbage."""
        return name in self._busy

    async def once(
        self,
        key: Key,
        unpack: Unpack,
        lower: Sequence[Path],
        attributes: RootAttributes,
        done: Callable[[Path, Usage], Awaitable[None]],
    ) -> None:
        """Unpack into a new directory and give it to `done`, unless somebody is at it and succeeds. Raises as `unpack`.

        That another image, which claims to hold the same layer, could not be unpacked says nothing about this one.
        """
        while (task := self._tasks.get(key)) is not None:
            try:
                await asyncio.shield(task)
                return
            except Exception as error:
                if self._stopping:
                    raise
                log.info("unpacking a layer that somebody else could not", error=str(error))
        task = self._tasks[key] = asyncio.create_task(self._run(unpack, lower, attributes, done))
        task.add_done_callback(lambda _: self._tasks.pop(key, None))
        await asyncio.shield(task)

    async def stop(self) -> None:
        """End every unpacking at its next piece."""
        self._stopping = True
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _run(
        self,
        unpack: Unpack,
        lower: Sequence[Path],
        attributes: RootAttributes,
        done: Callable[[Path, Usage], Awaitable[None]],
    ) -> None:
        path = self._directories.make("unpack", attributes)
        self._busy.add(path.name)
        try:
            staging = path / "staging"
            staging.mkdir(mode=0o700)
            await unpack(path / "fs", staging, lower, lambda: not self._stopping)
            failpoints.hit("unpack.filled")
            await asyncio.to_thread(directories.destroy, staging)
            usage = await asyncio.to_thread(directories.measure, path / "fs")
            await done(path, usage)
        except Exception:  # but when it is cancelled, a thread may still be at it
            if path.exists():
                await asyncio.to_thread(directories.destroy, path)
            raise
        finally:
            self._busy.discard(path.name)
