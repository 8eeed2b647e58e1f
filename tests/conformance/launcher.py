"""The snapshot service as a process of its own, with `FakeImages` instead of images: what tests kill and restart.

usage: python -m tests.conformance.launcher ROOT ADDRESS [--only-verified]
"""

import asyncio
import signal
import socket
import sys
from pathlib import Path

from snapshotter import control, log
from snapshotter.config import Limits
from snapshotter.service.server import Server
from snapshotter.snapshots.recovery import open_store
from snapshotter.snapshots.snapshotter import Snapshotter
from tests.conformance.images import FakeImages


async def serve(root: Path, address: Path, only_verified: bool) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    store = open_store(root)
    snapshotter = Snapshotter(root, store, FakeImages(root / "fake", only_verified=only_verified), Limits())
    await snapshotter.start()
    with control.bind(address, socket.SOCK_STREAM) as listener:
        server = Server(snapshotter, root)
        await server.start(listener)
        await stop.wait()
        await server.stop(1)
    await snapshotter.stop()
    await snapshotter.drain()
    store.close()


if __name__ == "__main__":
    log.configure("debug")
    Path(sys.argv[1]).mkdir(exist_ok=True)
    asyncio.run(serve(Path(sys.argv[1]), Path(sys.argv[2]), "--only-verified" in sys.argv))
