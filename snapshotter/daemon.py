"""snapshotd: builds the parts of the pull path, serves containerd, and drains.

Its descriptors come from the keeper, its state is on disk, so it can be killed and replaced at any instant; running
containers do not need it. It makes no system call that can reach EROFS or FUSE itself.

    python -m snapshotter.daemon --config FILE --root DIR --cache DIR --address SOCK
"""

import argparse
import asyncio
import contextlib
import importlib
import os
import signal
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import structlog

from snapshotter import __version__, config, control, failpoints, memory
from snapshotter.credentials.remembered import RememberedLogins
from snapshotter.errors import SnapshotterError
from snapshotter.image.initdata import with_initdata
from snapshotter.log import bind_request, configure
from snapshotter.monitor import journal
from snapshotter.monitor.trail import Trail
from snapshotter.mounts.drivers import ErofsMounter
from snapshotter.mounts.mountinfo import read_mounts
from snapshotter.ondemand.client import BlobdClient, Peer
from snapshotter.ondemand.dataplane import DataPlane
from snapshotter.service.server import Server
from snapshotter.snapshots.operations import Operations
from snapshotter.snapshots.overview import Overview
from snapshotter.snapshots.recovery import open_store
from snapshotter.snapshots.remote import ImageRecord, LayerRequest, LayerVerdict, NamedLayer, RemoteImages
from snapshotter.snapshots.snapshotter import Snapshotter

log = structlog.get_logger("snapshotter.daemon")

LOCK_SECONDS = 5.0
GRACE_SECONDS = 4.0  # for calls that run when we are told to stop


class LaterImages:
    """The images of a process that still starts: calls wait until there are any.

    containerd gives up on a connection that is not served within a second, and the parts of the pull path take longer
    than that to import on a busy machine.
    """

    def __init__(self, only_verified: bool) -> None:
        self.only_verified = only_verified
        self.images: asyncio.Future[RemoteImages] = asyncio.get_running_loop().create_future()

    async def resolve(self, request: LayerRequest) -> LayerVerdict:
        return await (await asyncio.shield(self.images)).resolve(request)

    async def recall(self, layer: NamedLayer) -> LayerVerdict:
        return await (await asyncio.shield(self.images)).recall(layer)

    async def stored(self, record: ImageRecord) -> int:
        return await (await asyncio.shield(self.images)).stored(record)

    async def mount(self, attach_id: int, record: ImageRecord, target: Path) -> None:
        await (await asyncio.shield(self.images)).mount(attach_id, record, target)

    async def unmount(self, attach_id: int, target: Path) -> None:
        await (await asyncio.shield(self.images)).unmount(attach_id, target)


class Daemon:
    """The parts, put together. `held` are the keeper's descriptors by name; this object owns them."""

    def __init__(self, settings: config.Config, held: Mapping[str, int]) -> None:
        root = Path(os.path.realpath(settings.root))  # mountinfo knows no links
        self._settings = settings
        self._listener = socket.socket(fileno=held["listen-grpc"])
        self._mounter = ErofsMounter(held["fuse-root"], settings.erofs)
        self._blobd = BlobdClient(root / "blobd.sock")
        self._data_plane = DataPlane(Peer("keeper", root / "keeper.sock"), self._blobd)
        self._trail = Trail()
        self._later = LaterImages(only_verified=settings.mode == "confidential")
        self._store = store = open_store(root)
        self._snapshotter = Snapshotter(root, store, self._later, settings.limits)
        self._operations = Operations(
            self._snapshotter, store, self._mounted, Path(settings.cache_dir), settings.limits
        )
        self._overview = Overview(store, self._mounted)
        self._server = Server(self._snapshotter, root)
        self._remembered = RememberedLogins()
        if "logins" in held:
            self._remembered.take(held["logins"])
        self._control = control.AsyncServer(control.listen(root / "snapshotd.sock"), self._handle)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serves containerd at once, and status when all parts are there; drains at the end."""
        with contextlib.closing(self._store):
            failpoints.hit("snapshotd.opened")
            await self._snapshotter.start()
            await self._server.start(self._listener)
            failpoints.hit("snapshotd.listens")
            async with self._images():
                yield
                failpoints.hit("snapshotd.drains")
                await self._drain()

    @contextlib.asynccontextmanager
    async def _images(self) -> AsyncIterator[None]:
        """Calls that need images wait for this."""
        pullpath = await asyncio.to_thread(importlib.import_module, "snapshotter.snapshots.pullpath")
        async with pullpath.open_images(
            self._settings, self._data_plane, self._mounter, self._trail, self._remembered
        ) as images:
            await self._reconcile()
            self._later.images.set_result(images)
            self._control.start()
            async with self._monitored(), self._image_service():
                yield

    @contextlib.asynccontextmanager
    async def _image_service(self) -> AsyncIterator[None]:
        """The kubelet's way to containerd, if there is to be one."""
        settings = self._settings.registry.image_service
        if not settings.listen:
            yield
            return
        module = await asyncio.to_thread(importlib.import_module, "snapshotter.service.image_service")
        service = module.ImageService(settings, self._settings.limits, self._remembered, self._data_plane)
        await service.start()
        try:
            yield
        finally:
            await service.stop(0)

    @contextlib.asynccontextmanager
    async def _monitored(self) -> AsyncIterator[None]:
        """Answers at the monitor address, if there is one."""
        if not self._settings.monitor.listen:
            yield
            return
        server = await asyncio.to_thread(importlib.import_module, "snapshotter.monitor.server")
        settings, root = self._settings, Path(self._settings.root)
        monitor = server.Monitor(self._overview, self._server.calls, self._trail, root, settings.address, settings.mode)
        await monitor.start(settings.monitor.listen)
        try:
            yield
        finally:
            await monitor.stop()

    async def _drain(self) -> None:
        """Let calls end, then unmount the images that nobody uses."""
        await self._server.stop(GRACE_SECONDS)
        await self._snapshotter.stop()
        await self._snapshotter.drain()

    async def _reconcile(self) -> None:
        """Bring mounts and data plane to agree with what is known, before anybody uses either."""
        attached = {image["id"]: image["open"] for image in (await self._blobd.status())["images"]}
        for attach_id in attached.keys() - self._snapshotter.known():
            log.warning("image is attached that nobody knows", attach_id=attach_id, open=attached[attach_id])
            if not attached[attach_id]:  # else it is mounted, perhaps below a directory that was set aside
                await self._data_plane.detach(attach_id)
        # Mounts whose image blobd does not have belong to a FUSE session that is lost: every read of them fails.
        # Containers that use them cannot be helped; off their path, they do not harm the next ones.
        for attach_id in self._mounted() - attached.keys():
            failpoints.hit("snapshotd.discards")
            point = self._snapshotter.mountpoint(attach_id)
            log.error("image was mounted from a data plane that is gone", attach_id=attach_id, target=str(point))
            await self._mounter.discard(point)

    def _mounted(self) -> set[int]:
        """Attach ids of the images that are mounted."""
        points = {mount.point for mount in read_mounts()}
        return {number for number in self._snapshotter.images() if str(self._snapshotter.mountpoint(number)) in points}

    async def _handle(self, message: control.Message, _: list[int]) -> control.Reply | AsyncIterator[control.Reply]:
        bind_request(message.get("request"))
        if message.get("op") == "ping":
            return {}, ()
        if message.get("op") == "status":
            return self._status(), ()
        if message.get("op") == "explain":
            return self._explain(str(message.get("image", "")), str(message.get("container", ""))), ()
        if message.get("op") == "dump":
            return self._dump()
        return await self._operations.answer(message)

    def _status(self) -> control.Message:
        mounted = self._mounted()
        images = [
            {
                "reference": record.reference,
                "manifest": record.manifest,
                "bootstrap": record.bootstrap,
                "mounted": attach_id in mounted,
            }
            for attach_id, record in self._snapshotter.images().items()
        ]
        return {
            "pid": os.getpid(),
            "version": __version__,
            "mode": self._settings.mode,
            "cache_dir": self._settings.cache_dir,
            "address": self._settings.address,
            "images": images,
            "counters": {},
        }

    def _explain(self, image: str, container: str) -> control.Message:
        """The stories of an image (manifest digest, reference or attach id) or of a container's images; else names."""
        kept = self._snapshotter.images_of(container) if container else self._snapshotter.images()
        stories = self._trail.journal
        known = dict.fromkeys([] if container else stories.images())
        found = []
        for manifest in known | dict.fromkeys(record.manifest for record in kept.values()):
            ids = [number for number, record in kept.items() if record.manifest == manifest]
            names = {kept[number].reference for number in ids} | set(stories.names(manifest))
            if container or not image or image in {manifest, *names, *map(str, ids)}:
                told = stories.tell(manifest) if image or container else {}
                found.append({"manifest": manifest, "ids": ids, "references": sorted(names), **told})
        return {"pid": os.getpid(), "now": journal.now(), "images": found}

    async def _dump(self) -> AsyncIterator[control.Reply]:
        """The listener on which clients reach this process: what a new keeper needs to adopt it."""
        yield {"name": "listen-grpc"}, [self._listener.fileno()]
        yield {"end": True}, ()


async def serve(settings: config.Config) -> int:
    """Serve until SIGTERM; the exit status."""
    keeper = Path(settings.root) / "keeper.sock"
    held, _ = await asyncio.to_thread(control.fetch_all, keeper, {"op": "list"})
    for name in held.keys() - {"listen-grpc", "fuse-root", "logins"}:  # keys are in there: they are blobd's
        os.close(held.pop(name))
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, os._exit, 0)  # everything that matters is on disk
    async with Daemon(settings, held).running():
        log.info("snapshotd serves", pid=os.getpid(), version=__version__, mode=settings.mode, root=settings.root)
        with contextlib.suppress(OSError, EOFError):
            await asyncio.to_thread(control.request, keeper, {"op": "ready", "name": "snapshotd"})
        failpoints.hit("snapshotd.ready")
        await stop.wait()
        log.info("draining")
    return 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="snapshotd", allow_abbrev=False)
    for flag in ("--config", "--root", "--cache", "--address"):
        parser.add_argument(flag)
    flags = parser.parse_args(arguments)
    os.umask(0o077)
    memory.set_undumpable()
    with contextlib.suppress(OSError):  # where that is not allowed; blobd, which keeps keys for long, logs it
        memory.lock()
    try:
        settings = config.load(
            Path(flags.config) if flags.config else None, root=flags.root, cache_dir=flags.cache, address=flags.address
        )
        settings = with_initdata(settings)
        configure(settings.log.level, settings.log.format, process="snapshotd")
        control.take_lock(Path(settings.root) / "snapshotd.lock", LOCK_SECONDS)
        failpoints.hit("snapshotd.started")
        return asyncio.run(serve(settings))
    except (SnapshotterError, OSError, EOFError, sqlite3.Error) as error:
        log.error("snapshotd cannot serve", error=str(error) or type(error).__name__)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
