"""One task a layer, however many wait for it; and what one image fails of is not the other's failure."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from snapshotter.errors import BadLayer
from snapshotter.snapshots.directories import Directories, RootAttributes
from snapshotter.snapshots.model import Usage
from snapshotter.snapshots.unpacking import Unpacking

pytestmark = pytest.mark.root
KEY = ("coco", "sha256:" + "a" * 64, None)


class Layer:
    """Waits for `ready`, then writes its one file, or fails."""

    def __init__(self, unpacking: Unpacking, failure: Exception | None = None) -> None:
        self.unpacking, self.failure = unpacking, failure
        self.ready, self.begun = asyncio.Event(), asyncio.Event()
        self.done: list[bytes] = []

    async def _unpack(self, target: Path, staging: Path, lower: Sequence[Path], going: Callable[[], bool]) -> None:
        self.begun.set()
        await self.ready.wait()
        if self.failure is not None:
            raise self.failure
        (target / "file").write_bytes(b"content")

    async def _done(self, path: Path, usage: Usage) -> None:
        self.done.append((path / "fs" / "file").read_bytes())

    def once(self) -> asyncio.Task[None]:
        return asyncio.create_task(self.unpacking.once(KEY, self._unpack, [], RootAttributes(), self._done))


@pytest.fixture
def unpacking(tmp_path: Path) -> Unpacking:
    return Unpacking(Directories(tmp_path))


async def test_two_that_want_a_layer_get_it_unpacked_once(unpacking: Unpacking) -> None:
    one, other = Layer(unpacking), Layer(unpacking)
    first = one.once()
    await one.begun.wait()
    second = other.once()
    one.ready.set()
    await asyncio.gather(first, second)
    assert (one.done, other.done) == ([b"content"], [])
    assert not other.begun.is_set()


async def test_an_image_that_only_claims_to_hold_the_layer_does_not_fail_the_one_that_does(
    unpacking: Unpacking, tmp_path: Path
) -> None:
    forged, genuine = Layer(unpacking, BadLayer("layer: no archive")), Layer(unpacking)
    first = forged.once()
    await forged.begun.wait()
    second = genuine.once()
    forged.ready.set()
    genuine.ready.set()
    with pytest.raises(BadLayer):
        await first
    await second
    assert genuine.done == [b"content"]


async def test_the_end_of_the_process_begins_nothing_anew(unpacking: Unpacking, tmp_path: Path) -> None:
    one, other = Layer(unpacking), Layer(unpacking)
    first = one.once()
    await one.begun.wait()
    second = other.once()
    await asyncio.sleep(0)
    await unpacking.stop()
    found = await asyncio.gather(first, second, return_exceptions=True)
    assert [type(error) for error in found] == [asyncio.CancelledError] * 2
    assert not other.begun.is_set()
