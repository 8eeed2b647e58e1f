"""Listing and cleaning up on an operator's word: nothing that somebody uses goes, and long lists come in batches."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from snapshotter.config import Limits
from snapshotter.errors import FailedPrecondition, InvalidArgument
from snapshotter.snapshots import recovery
from snapshotter.snapshots.model import Usage
from snapshotter.snapshots.operations import Operations
from snapshotter.snapshots.remote import ImageRecord, LayerRequest, LayerVerdict
from snapshotter.snapshots.snapshotter import Snapshotter

pytestmark = pytest.mark.root
REF = "containerd.io/snapshot.ref"


class Images:
    """Every layer is a whole image. `busy` ones cannot be unmounted."""

    only_verified = False

    def __init__(self) -> None:
        self.mounted: set[int] = set()
        self.busy: set[int] = set()
        self.slow = asyncio.Event()
        self.slow.set()

    async def resolve(self, request: LayerRequest) -> LayerVerdict:
        return LayerVerdict("image", ImageRecord(request.chain_id, "m", "b", request.chain_id, True))

    async def mount(self, attach_id: int, record: ImageRecord, target: Path) -> None:
        self.mounted.add(attach_id)

    async def unmount(self, attach_id: int, target: Path) -> None:
        await self.slow.wait()
        if attach_id in self.busy:
            raise FailedPrecondition("in use", reason="busy")
        self.mounted.discard(attach_id)


class Node:
    def __init__(self, root: Path) -> None:
        self.images = Images()
        self.root = root
        store = recovery.open_store(root)
        self.snapshots = Snapshotter(root, store, self.images, Limits())
        self.operations = Operations(self.snapshots, store, lambda: self.images.mounted, root / "cache", Limits())
        self.store = store

    async def pull(self, chain: str) -> int:
        with pytest.raises(Exception, match="nothing to unpack"):
            await self.snapshots.prepare("p", f"extract-{chain}", "", {REF: chain})
        return max(self.store.images())

    def name(self, number: int) -> str:
        return self.store.chain(number)[0].name


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    made = Node(tmp_path)
    yield made
    made.store.close()


async def streamed(node: Node, op: str) -> list[dict[str, Any]]:
    answer = await node.operations.answer({"op": op})
    assert not isinstance(answer, tuple)
    messages = [message async for message, _ in answer]
    assert messages.pop() == {"end": True}
    return messages


async def test_an_image_and_its_users(node: Node) -> None:
    used, idle = await node.pull("one"), await node.pull("two")
    await node.snapshots.prepare("p", "container", node.name(used), {})
    await node.snapshots.view("p", "look", node.name(used), {})
    rows = {message["image"]["id"]: message["image"] for message in await streamed(node, "images")}
    assert (rows[used]["snapshots"], rows[used]["users"]) == (["container", "look"], 2)
    assert (rows[idle]["snapshots"], rows[idle]["users"], rows[idle]["mounted"]) == ([], 0, False)
    assert rows[used]["reference"] == "one"


async def test_snapshots_come_in_batches(node: Node) -> None:
    for number in range(45):
        await node.snapshots.prepare("p", f"key-{number}", "", {})
    await node.snapshots.prepare("q", "of another plugin", "", {})
    batches = [message["snapshots"] for message in await streamed(node, "snapshots")]
    assert [len(batch) for batch in batches] == [20, 20, 5, 1]
    assert {row["name"] for batch in batches for row in batch if row["plugin"] == "q"} == {"of another plugin"}
    assert all(row["size"] > 0 and row["inodes"] == 1 for batch in batches for row in batch)


async def test_a_snapshot_may_vanish_while_others_are_measured(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        await node.snapshots.prepare("p", name, "", {})
    measure = node.snapshots.usage

    async def usage(plugin: str, name: str) -> Usage:
        if name == "one":
            node.snapshots.remove("p", "two")
        return await measure(plugin, name)

    monkeypatch.setattr(node.snapshots, "usage", usage)
    [message] = await streamed(node, "snapshots")
    assert [(row["name"], row["inodes"]) for row in message["snapshots"]] == [("one", 1), ("two", None)]


async def test_gc_removes_unmounts_and_says_what_resists(node: Node) -> None:
    used, idle, busy = [await node.pull(name) for name in ("used", "idle", "busy")]
    for number in (used, idle, busy):
        await node.snapshots.prepare("p", f"c{number}", node.name(number), {})
    for number in (idle, busy):
        node.snapshots.remove("p", f"c{number}")
    await node.snapshots.cleanup()
    (node.root / "snapshots" / "old-9-left").mkdir()
    (node.root / "snapshots" / "lost-9-kept").mkdir()
    node.images.busy = {busy}
    done = await node.operations.gc()
    assert (done["removed"], done["unmounted"]) == (1, ["idle"])
    assert done["kept"] == [{"what": "busy", "why": "in use"}]
    assert node.images.mounted == {used, busy}
    assert (node.root / "snapshots" / "lost-9-kept").exists()


async def test_a_container_that_comes_while_its_image_is_unmounted_mounts_it_anew(node: Node) -> None:
    image = await node.pull("one")
    await node.snapshots.prepare("p", "first", node.name(image), {})
    node.snapshots.remove("p", "first")
    node.images.slow.clear()
    collecting = asyncio.create_task(node.operations.gc())
    while not node.snapshots._lock(image).locked():  # noqa: ASYNC110 - tasks of this loop
        await asyncio.sleep(0)
    coming = asyncio.create_task(node.snapshots.prepare("p", "second", node.name(image), {}))
    await asyncio.sleep(0)
    node.images.slow.set()
    await coming
    await collecting
    assert node.images.mounted == {image}
    await node.operations.gc()
    assert node.images.mounted == {image}, "somebody shows it"


async def test_unknown_requests_are_refused(node: Node) -> None:
    with pytest.raises(InvalidArgument):
        await node.operations.answer({"op": ["gc"]})


async def test_what_resists_is_tried_again_without_being_asked(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapshotter.snapshots.snapshotter._AGAIN", 0.001)
    number = await node.pull("busy")
    await node.snapshots.prepare("p", "container", node.name(number), {})
    await node.snapshots.start()
    node.images.busy = {number}
    for name in ("container", node.name(number)):
        node.snapshots.remove("p", name)
    await node.snapshots.cleanup()
    assert node.images.mounted == {number}
    node.images.busy = set()
    async with asyncio.timeout(20):
        while node.images.mounted or await node.snapshots.garbage():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)
    await node.snapshots.stop()
