"""Processes of a real `serve` are killed while an image is read: no read fails, none returns a wrong byte."""

import asyncio
import errno
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshotter import control
from snapshotter.config import Erofs
from snapshotter.mounts.drivers import ErofsMounter
from tests.dataplane import BlobServer, SyntheticImage, build, compare, content, forget_pages, read_at
from tests.harness.machine import Work, alive, until
from tests.harness.serve import Serve

pytestmark = pytest.mark.root

IMAGE = 7
REPOSITORY = "t/image"


class Node:
    """A running `serve` with one image attached and mounted as snapshotd would do it."""

    def __init__(self, work: Work, registry: BlobServer, image: SyntheticImage | None = None) -> None:
        self.registry = registry
        self.serve = Serve(work, settings={"cache": {"quota": 0}})  # every read that the kernel has not cached misses
        self.image = image or build({"first": content(1, 3 << 20), "directory/second": content(2, 300_000)})
        registry.blobs |= self.image.blobs
        self.target = work.directory("mnt")
        self.attach(IMAGE, self.image)
        self.mount(IMAGE, self.image, self.target)

    def attach(self, number: int, image: SyntheticImage) -> None:
        memfd = image.pack(number, f"{self.registry.host}/{REPOSITORY}")
        control.request(self.serve.root / "keeper.sock", {"op": "put", "name": f"image-{number}"}, [memfd])
        control.request(self.serve.root / "blobd.sock", {"op": "attach", "id": number}, [memfd])
        os.close(memfd)

    def mount(self, number: int, image: SyntheticImage, target: Path) -> None:
        held, _ = control.fetch_all(self.serve.root / "keeper.sock", {"op": "list"})
        try:
            mounter = ErofsMounter(held["fuse-root"], Erofs())
            asyncio.run(mounter.mount(number, len(image.devices) + 1, target))
        finally:
            control.close_all(held.values())

    def unmount(self) -> None:
        asyncio.run(ErofsMounter(-1, Erofs()).unmount(self.target))

    def compare(self) -> None:
        """Read everything through blobd, not from the page cache."""
        for name in self.image.files:
            forget_pages(self.target / name)
        compare(self.target, self.image)

    def blocked_read(self) -> "BlockedRead":
        return BlockedRead(self)


class BlockedRead(threading.Thread):
    """A read that is on its way to a registry that does not answer before `release`."""

    def __init__(self, node: Node) -> None:
        super().__init__(daemon=True)
        self.node, self.got = node, b""
        self.failure: OSError | None = None
        forget_pages(node.target / "first")
        node.registry.frozen.add(REPOSITORY)
        before = len(node.registry.requests)
        self.start()
        node.registry.wait_for_requests(REPOSITORY, before + 1)

    def run(self) -> None:
        try:
            self.got = read_at(self.node.target / "first", 1 << 20, 100_000)
        except OSError as error:
            self.failure = error

    def release(self) -> None:
        """Let the registry answer; the read must have been waiting until now, and must now be right."""
        assert self.is_alive()
        self.node.registry.frozen.clear()
        self.join(30)
        assert not self.is_alive()
        assert self.failure is None
        assert self.got == self.node.image.files["first"][1 << 20 : (1 << 20) + 100_000]


@pytest.fixture
def node(work: Work) -> Iterator[Node]:
    registry = BlobServer()
    work.stack.callback(registry.close)
    running = Node(work, registry)
    yield running
    registry.frozen.clear()
    asyncio.run(ErofsMounter(-1, Erofs()).discard(running.target))


@pytest.mark.parametrize("worker", ["blobd", "snapshotd"])
def test_worker_killed_while_a_read_is_on_its_way(node: Node, worker: str) -> None:
    read = node.blocked_read()
    node.serve.wait_replaced(worker, node.serve.kill(worker))
    read.release()
    node.compare()


def test_both_workers_killed_while_a_read_is_on_its_way(node: Node) -> None:
    read = node.blocked_read()
    pids = node.serve.pids()
    for name in ("snapshotd", "blobd"):
        os.kill(pids[name], signal.SIGKILL)
    for name in ("snapshotd", "blobd"):
        node.serve.wait_replaced(name, pids[name])
    read.release()
    node.compare()


def test_blobd_killed_again_and_again(node: Node) -> None:
    read = node.blocked_read()
    for _ in range(3):
        node.serve.wait_replaced("blobd", node.serve.kill("blobd"))
    read.release()
    node.compare()


def test_keeper_killed_then_blobd(node: Node) -> None:
    """The new keeper has nothing but what blobd gave back, and the next blobd has nothing but that."""
    read = node.blocked_read()
    old = node.serve.pids()
    node.serve.kill("keeper")
    node.serve.start()
    assert node.serve.pids()["blobd"] == old["blobd"]
    assert node.serve.pids()["snapshotd"] == old["snapshotd"]
    node.serve.wait_replaced("blobd", node.serve.kill("blobd"))
    read.release()
    node.compare()


def test_keeper_and_snapshotd_killed(node: Node) -> None:
    read = node.blocked_read()
    old = node.serve.pids()
    for name in ("keeper", "snapshotd"):
        os.kill(old[name], signal.SIGKILL)
        until(lambda pid=old[name]: not alive(pid), name, 10)  # type: ignore[misc]
    node.serve.start()
    assert node.serve.pids()["blobd"] == old["blobd"]
    read.release()
    node.compare()


def test_reload_while_a_read_is_on_its_way(node: Node) -> None:
    read = node.blocked_read()
    old = node.serve.pids()
    os.kill(old["keeper"], signal.SIGHUP)
    new = node.serve.wait_replaced("blobd", old["blobd"])
    assert new != old["blobd"]
    assert node.serve.pids()["keeper"] == old["keeper"]
    read.release()
    node.compare()


def test_stop_with_an_image_in_use_serves_it_until_the_next_start(node: Node) -> None:
    old = node.serve.pids()
    assert node.serve.terminate() == 0
    assert alive(old["blobd"])
    with socket.socket(socket.AF_UNIX) as client:
        assert client.connect_ex(str(node.serve.address)) in (errno.ENOENT, errno.ECONNREFUSED)
    node.compare()
    node.serve.start()
    assert node.serve.pids()["blobd"] == old["blobd"]
    node.compare()
    node.unmount()
    assert node.serve.terminate() == 0
    assert not alive(old["blobd"])


def test_keeper_and_blobd_killed_costs_reads_but_no_wrong_byte_and_the_next_image_works(node: Node) -> None:
    """The one loss: nobody holds the FUSE session any more."""
    read = node.blocked_read()
    pids = node.serve.pids()
    for name in ("keeper", "blobd"):
        os.kill(pids[name], signal.SIGKILL)
    # snapshotd holds the directory of the session, not the connection: reads end as soon as both are gone.
    read.join(20)
    assert not read.is_alive()
    assert read.failure is not None
    assert read.failure.errno == errno.EIO
    node.registry.frozen.clear()
    node.serve.start()
    assert node.serve.pids()["snapshotd"] != pids["snapshotd"]
    with pytest.raises(OSError, match="Input/output error"):
        node.compare()
    node.unmount()
    node.attach(IMAGE + 1, node.image)
    node.mount(IMAGE + 1, node.image, node.target)
    node.compare()
    node.unmount()
