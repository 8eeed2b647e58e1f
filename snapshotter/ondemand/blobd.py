"""blobd, the data plane: serves the blob devices of all attached images and nothing else.

Everything it needs it gets from the keeper as descriptors, so it can be killed and replaced at any instant. It never
mounts, opens or stats anything its own session serves: such a call would wait for itself.

    python -m snapshotter.ondemand.blobd --config FILE --root DIR --cache DIR --address SOCK
"""

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import msgspec
import structlog

from snapshotter import __version__, config, control, failpoints, memory, oom
from snapshotter.blobs.cache import ChunkCache
from snapshotter.blobs.chunks import Counters, ImageCounters
from snapshotter.blobs.fetcher import Fetcher
from snapshotter.blobs.reader import ChunkReader, DecodedChunks
from snapshotter.blobs.source import RangeSource
from snapshotter.credentials.remembered import RememberedLogins
from snapshotter.errors import FailedPrecondition, InvalidArgument, SnapshotterError
from snapshotter.log import bind_request, configure
from snapshotter.ondemand.attachment import Attachment
from snapshotter.ondemand.devices import Devices
from snapshotter.ondemand.inflight import SessionMemory
from snapshotter.ondemand.inventory import inventory
from snapshotter.ondemand.reports import Reports
from snapshotter.ondemand.session import Session
from snapshotter.registry.client import RegistryClient
from snapshotter.registry.reference import Reference

log = structlog.get_logger(__name__)

_SESSION = ("fuse", "fuse-root", "session", "listen-blobd")
_LOGINS = "logins"
_LOCK_SECONDS = 5.0
_RELIEVE_SECONDS = 5.0  # what others can write before the cache gives way; they have `min_free` until then
_DETACH_SECONDS = 5.0  # the kernel closes an image's files a moment after its last unmount
_SWITCH_SECONDS = 0.0005  # a thread with a reply must not wait 5 ms for another one's bytecode


class Blobd:
    """The process, apart from its signals. Create and use on the running loop."""

    def __init__(
        self, settings: config.Config, source: RangeSource, remembered: RememberedLogins, fds: dict[str, int]
    ) -> None:
        loop = asyncio.get_running_loop()
        self.ended = asyncio.Event()
        self.keepers = 0  # that have come after the one we were started by
        self._fds = fds
        self._remembered = remembered
        self._counters = Counters()
        cpus = len(os.sched_getaffinity(0))
        executor = ThreadPoolExecutor(cpus, thread_name_prefix="decode")
        self._cache = ChunkCache(
            Path(settings.cache_dir) / "chunks", settings.cache.quota, self._counters, settings.cache.min_free
        )
        decoded = DecodedChunks(settings.fetch.decoded)

        def make_fetcher(repository: str, counters: ImageCounters) -> Fetcher:
            reference = Reference.parse(repository)
            return Fetcher(source, reference, self._cache, settings.fetch, counters, executor)

        self._devices = Devices(
            ChunkReader(self._cache, decoded, self._counters, executor),
            make_fetcher,
            decoded.forget,
            self._counters,
            loop,
            settings.registry.total_timeout_seconds,
        )
        self._memory = SessionMemory(fds["session"])
        self._session = Session(
            fds["fuse"], self._memory, self._devices, self._counters, loop,
            threads=max(2, cpus), ended=self.ended.set,
        )  # fmt: skip
        self._reports = Reports(self._counters, self._session, self._memory, self._cache, source, settings.cache.quota)
        self._server = control.AsyncServer(socket.socket(fileno=os.dup(fds["listen-blobd"])), self._handle)

    def start(self) -> None:
        """Attach what the keeper holds, take over from the worker before, serve."""
        if _LOGINS in self._fds:
            self._remembered.take(os.dup(self._fds[_LOGINS]))
        for name, fd in list(self._fds.items()):
            if name.startswith("image-"):
                try:
                    self._devices.attach(Attachment(fd))
                except SnapshotterError as error:
                    log.error("image cannot be attached", image=name, error=str(error))
        failpoints.hit("blobd.attached-all")
        self._session.start()
        failpoints.hit("blobd.took-over")
        self._server.start()
        self._tending = asyncio.create_task(self._tend_cache())

    async def _tend_cache(self) -> None:
        """Count what the cache holds, then keep an eye on its disk."""
        await asyncio.to_thread(self._cache.scan)
        while True:
            await asyncio.to_thread(self._cache.relieve)
            await asyncio.sleep(_RELIEVE_SECONDS)

    @property
    def open_files(self) -> int:
        return self._memory.open_files().total()

    async def _handle(self, message: control.Message, fds: list[int]) -> control.Reply | AsyncIterator[control.Reply]:
        op = message.get("op")
        bind_request(message.get("request"))
        if op == "ping":
            return {}, ()
        if op == "status":
            return self._status(), ()
        if op == "metrics":
            return self._reports.metrics(), ()
        if op == "explain":
            return self._reports.explain(str(message.get("image", ""))), ()
        if op == "dump":
            return self._dump()
        if op == "cached":
            return self._cached()
        if op == "prune":
            return await self._prune(message), ()
        if op == "logins" and len(fds) == 1:
            self._remembered.load(fds[0])
            control.close_all([self._fds.pop(_LOGINS)] if _LOGINS in self._fds else [])
            self._fds[_LOGINS] = fds.pop()
            return {}, ()
        image_id = message.get("id")
        if type(image_id) is not int or op not in ("attach", "detach"):
            raise InvalidArgument(f"no such request: {str(op)[:40]}")
        if op == "attach":
            if len(fds) != 1:
                raise InvalidArgument("attach: needs one descriptor")
            self._attach(image_id, fds)
        else:
            await self._detach(image_id)
        return {}, ()

    def _attach(self, image_id: int, fds: list[int]) -> None:
        attachment = Attachment(fds[0])
        fds.pop()  # belongs to the attachment now
        if attachment.image_id != image_id:
            attachment.close()
            raise InvalidArgument(f"attach: this is image {attachment.image_id}, not {image_id}")
        failpoints.hit("blobd.attaches")
        try:
            self._devices.attach(attachment)
        except SnapshotterError:
            attachment.close()
            raise
        self._devices.warm_up(image_id)
        failpoints.hit("blobd.attached")
        log.info("image attached", image=image_id, bootstrap=attachment.bootstrap_digest)

    async def _detach(self, image_id: int) -> None:
        """Raises FailedPrecondition while the kernel has files of the image open."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DETACH_SECONDS):
                while self._open_files_of(image_id):  # noqa: ASYNC110 - set by other threads
                    await asyncio.sleep(0.01)
        if self._open_files_of(image_id):
            raise FailedPrecondition(f"image {image_id} is in use")
        failpoints.hit("blobd.detaches")
        await self._devices.detach(image_id)
        failpoints.hit("blobd.detached")
        log.info("image detached", image=image_id)

    def _open_files_of(self, image_id: int) -> int:
        return sum(count for node, count in self._memory.open_files().items() if node >> 8 == image_id)

    def _status(self) -> control.Message:
        open_files = self._memory.open_files()
        images = [
            {
                "id": image.attachment.image_id,
                "bootstrap": image.attachment.bootstrap_digest,
                "manifest": image.attachment.manifest,
                "devices": len(image.devices),
                "open": sum(open_files[device.node] for device in image.devices),
            }
            for image in self._devices.images()
        ]
        return {
            "pid": os.getpid(),
            "version": __version__,
            "images": images,
            "parked": self._session.parked,
            "cache": self._cache.stats(),
            "counters": self._counters.snapshot(),
        }

    async def _cached(self) -> AsyncIterator[control.Reply]:
        """How much of each attached image is in the cache; null for one with very many chunks."""
        for image in self._devices.images():
            found = await inventory(image.attachment, self._cache)
            yield {"id": image.attachment.image_id, "cached": found and found._asdict()}, ()
        yield {"end": True}, ()

    async def _prune(self, message: control.Message) -> control.Message:
        """Shrink the cache to `target` bytes, and to what was used in the last `older` seconds."""
        target, older = message.get("target"), message.get("older")
        for number in (target, older):
            if number is not None and (type(number) is not int or number < 0):
                raise InvalidArgument("prune: target and older are numbers")
        since = None if older is None else time.time() - older
        size, entries = await asyncio.to_thread(self._cache.shrink, target, since)
        log.info("cache pruned", bytes=size, entries=entries)
        return {"bytes": size, "entries": entries}

    async def _dump(self) -> AsyncIterator[control.Reply]:
        held = {name: self._fds[name] for name in _SESSION}
        held |= {_LOGINS: self._fds[_LOGINS]} if _LOGINS in self._fds else {}
        held |= {f"image-{image.attachment.image_id}": image.attachment.fd for image in self._devices.images()}
        for name, fd in held.items():
            failpoints.hit("blobd.dumps")
            yield {"name": name}, [fd]
        self.keepers += 1
        yield {"end": True}, ()


async def serve(settings: config.Config, held: dict[str, int]) -> int:
    """Serve until told to stop; the exit status. `held` is what `take_over` returned."""
    root = Path(settings.root)
    fds = await asyncio.to_thread(_latest, root / "keeper.sock", held)
    failpoints.hit("blobd.fetched")
    # Each image bounds its own connections (fetch.parallel); a bound on all of them would let one frozen repository
    # of a host use up those of the others.
    registry = msgspec.structs.replace(settings.registry, connections=0)
    remembered = RememberedLogins()
    source = await RegistryClient(registry, settings.limits, remembered=remembered).__aenter__()
    blobd = Blobd(settings, source, remembered, fds)
    stop = _Stop(blobd)
    blobd.start()
    log.info("blobd serves", pid=os.getpid(), version=__version__)
    await asyncio.to_thread(_tell, root / "keeper.sock", "ready")
    failpoints.hit("blobd.ready")
    return await stop.wait()


class _Stop:
    """SIGTERM leaves unless images are in use; the second one, and SIGINT, leave at once with everything in place.

    A keeper that took over meanwhile begins anew: its first SIGTERM is the first.
    """

    def __init__(self, blobd: Blobd) -> None:
        self._blobd = blobd
        self._told_under = -1
        self._left = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._terminate)
        loop.add_signal_handler(signal.SIGINT, self._left.set)

    def _terminate(self) -> None:
        if self._told_under == self._blobd.keepers or not self._blobd.open_files:
            self._left.set()
        else:
            log.warning("images are in use: serving them until told again", open=self._blobd.open_files)
        self._told_under = self._blobd.keepers

    async def wait(self) -> int:
        waits = [asyncio.create_task(self._left.wait()), asyncio.create_task(self._blobd.ended.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        return 0 if self._left.is_set() else 1


def take_over(root: Path) -> dict[str, int]:
    """Take the lock. If another blobd has it, hold what the keeper holds until that one ends, and return it.

    So while workers are replaced, no single death loses the session: either that blobd or we have it, too.
    """
    try:
        control.take_lock(root / "blobd.lock")
    except BlockingIOError:
        held = _from_keeper(root / "keeper.sock", _LOCK_SECONDS)
        _tell(root / "keeper.sock", "holds")
        failpoints.hit("blobd.holds")
        control.take_lock(root / "blobd.lock", _LOCK_SECONDS)
        return held
    return {}


def _latest(path: Path, held: dict[str, int]) -> dict[str, int]:
    """What the keeper holds now; what it held before if it is gone."""
    try:
        found = _from_keeper(path, 0 if held else _LOCK_SECONDS)
    except (OSError, EOFError):
        if not held:
            raise
        return held
    control.close_all(held.values())
    return found


def _from_keeper(path: Path, patience: float) -> dict[str, int]:
    """Everything the keeper holds that is ours. Raises OSError when it does not answer for `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        try:
            found, _ = control.fetch_all(path, {"op": "list"})
            break
        except (OSError, EOFError):
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.05)
    for name in [name for name in found if name not in (*_SESSION, _LOGINS) and not name.startswith("image-")]:
        os.close(found.pop(name))
    if missing := set(_SESSION) - found.keys():
        raise OSError(f"the keeper does not hold {', '.join(sorted(missing))}")
    return found


def _tell(path: Path, what: Literal["holds", "ready"]) -> None:
    with contextlib.suppress(OSError, EOFError):
        control.request(path, {"op": what, "name": "blobd"})


def harden() -> None:
    """Keep keys in this process's memory: no core dump, no swap. And be the last to be killed for lack of memory."""
    memory.set_undumpable()
    try:
        memory.lock()
    except OSError as error:
        log.info("memory cannot be locked", error=str(error))
    oom.protect()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="blobd", allow_abbrev=False)
    for flag in ("--config", "--root", "--cache", "--address"):
        parser.add_argument(flag)
    flags = parser.parse_args(arguments)
    try:
        settings = config.load(
            Path(flags.config) if flags.config else None, root=flags.root, cache_dir=flags.cache, address=flags.address
        )
        configure(settings.log.level, settings.log.format, process="blobd")
        harden()
        sys.setswitchinterval(_SWITCH_SECONDS)
        held = take_over(Path(settings.root))
        failpoints.hit("blobd.started")
        loop = asyncio.new_event_loop()
        status = loop.run_until_complete(serve(settings, held))
    except (SnapshotterError, OSError, EOFError) as error:
        print(f"blobd: error: {error}", file=sys.stderr)  # noqa: T201 - logging may not be set up
        status = 1
    # Not through the interpreter's end, which would cancel parked reads and wait for threads: successors answer them.
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
