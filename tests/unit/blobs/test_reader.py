"""Reads of a sealed blob: exact bytes from cache and registry, each chunk fetched once, nothing bad ever remembered."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from yarl import URL

from snapshotter.blobs.cache import ChunkCache
from snapshotter.blobs.chunks import Counters
from snapshotter.blobs.fetcher import FIRST_WINDOW, Fetcher
from snapshotter.blobs.reader import ChunkReader, DecodedChunks, assemble, span
from snapshotter.config import Fetch, Size
from snapshotter.digest import Digest
from snapshotter.errors import IntegrityError, RegistryUnavailable
from snapshotter.ondemand.attachment import Attachment, BlobTable
from snapshotter.registry.endpoint import Endpoint
from snapshotter.registry.reference import Reference
from tests.dataplane import CHUNK, SyntheticImage, build, content

REPOSITORY = Reference.parse("registry.example/app")


class Source:
    """A registry in memory. `gate` holds answers back, `flip` changes what is sent."""

    def __init__(self, blobs: dict[str, bytes]) -> None:
        self.blobs = blobs
        self.ranges: list[tuple[int, int]] = []
        self.active = self.most = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.flip: Callable[[bytes], bytes] = bytes
        self.error: Exception | None = None
        self.names = ["one"]
        self.distrusted: list[str] = []

    def hosts(self, reference: Reference, digest: Digest) -> list[Endpoint]:
        assert reference == REPOSITORY
        return [Endpoint(name, URL("http://" + name)) for name in self.names]

    def distrust(self, reference: Reference, digest: Digest, host: Endpoint) -> None:
        self.distrusted.append(host.host)

    async def until_active(self, count: int) -> None:
        while self.active < count:  # noqa: ASYNC110 - a few turns of the loop
            await asyncio.sleep(0)

    async def stream_range(
        self,
        reference: Reference,
        digest: Digest,
        offset: int,
        length: int,
        blob_size: int,
        host: Endpoint | None = None,
    ) -> AsyncGenerator[bytes, None]:
        assert reference == REPOSITORY
        assert 0 <= offset < offset + length <= blob_size == len(self.blobs[digest])
        self.ranges.append((offset, offset + length))
        self.active += 1
        self.most = max(self.most, self.active)
        try:
            await self.gate.wait()
            if self.error:
                raise self.error
            data = self.flip(self.blobs[digest][offset : offset + length])
            for start in range(0, len(data), 16 << 10):
                yield data[start : start + (16 << 10)]
        finally:
            self.active -= 1


class Rig:
    """A reader with all that it needs."""

    def __init__(self, image: SyntheticImage, directory: Path, quota: int = 1 << 30, **fetch: int) -> None:
        self.image = image
        self.attachment = Attachment(image.pack(1, str(REPOSITORY)))
        self.table: BlobTable = self.attachment.blobs[0]
        self.counters = Counters()
        self.cache = ChunkCache(directory / "chunks", quota, self.counters)
        self.executor = ThreadPoolExecutor(2)
        self.decoded = DecodedChunks(fetch.pop("decoded", 0))
        self.source = Source(image.blobs)
        counters = self.counters.of_image(1, str(self.attachment.manifest))
        settings = Fetch(window=Size(fetch.pop("window", 1 << 20)), **fetch)
        self.fetcher = Fetcher(self.source, REPOSITORY, self.cache, settings, counters, self.executor)
        self.reader = ChunkReader(self.cache, self.decoded, self.counters, self.executor)
        self.stored = image.blobs[self.table.digest]
        self.plain = self.device()

    def device(self) -> bytes:
        """What the device holds, from the image's files."""
        out = bytearray(self.table.device_bytes)
        contents = b"".join(self.image.files.values())
        position = 0
        for number in range(self.table.count):
            chunk = self.table.chunk(number)
            out[chunk.offset : chunk.offset + chunk.size] = contents[position : position + chunk.size]
            position += chunk.size
        return bytes(out)

    async def read(self, offset: int, length: int) -> bytes:
        return b"".join(await self.reader.read(self.table, self.fetcher, offset, length))

    def cached(self, offset: int, length: int) -> bytes | None:
        pieces = self.reader.cached(self.table, offset, length)
        return None if pieces is None else b"".join(pieces)

    def counts(self) -> dict[str, int]:
        return self.counters.snapshot()

    async def settle(self) -> None:
        """Until what came is also cached."""
        while self.fetcher._tasks:
            await asyncio.gather(*self.fetcher._tasks)

    async def close(self) -> None:
        await self.fetcher.close()
        self.executor.shutdown()
        self.cache.close()
        self.attachment.close()


FILES = {"a": content(1, 10 * CHUNK + 777), "b": content(2, 5000), "c": content(3, 1), "d": content(4, 30 * CHUNK)}
SEALED = build(FILES)
PLAIN = build(FILES, sealed=False)


@pytest.fixture(params=[SEALED, PLAIN], ids=["sealed", "plain"])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    made = Rig(request.param, tmp_path)
    yield made
    await made.close()


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Rig]:
    def rig(**settings: int) -> Rig:
        return Rig(SEALED, tmp_path, **settings)

    return rig


async def test_every_range_is_exact_cold_and_cached(rig: Rig) -> None:
    size = rig.table.device_bytes
    edges = sorted({0, 1, size - 1, size, *(rig.table.chunk(n).offset + d for n in range(14) for d in (-1, 0, 1))})
    for start in edges:
        for stop in edges[::3]:
            if 0 <= start < stop:
                assert await rig.read(start, stop - start) == rig.plain[start:stop]
    await rig.settle()
    assert await rig.read(0, size) == rig.plain
    await rig.settle()
    fetched = len(rig.source.ranges)
    for start in edges:
        assert rig.cached(max(start, 0), 9000) == rig.plain[max(start, 0) :][:9000]
    assert rig.cached(0, size) == rig.plain
    assert len(rig.source.ranges) == fetched
    assert rig.counts()["verify_failures"] == 0


async def test_reads_behind_the_end_are_cut_there(rig: Rig) -> None:
    size = rig.table.device_bytes
    assert await rig.read(size - 10, 100) == rig.plain[-10:]
    assert rig.cached(size, 100) == b""
    assert list(span(rig.table, size + 4096, 10)) == []


async def test_a_device_without_chunks_is_zeros(tmp_path: Path) -> None:
    class Empty:
        device_bytes, count = 8192, 0

        def find(self, offset: int) -> int:
            return -1

    table: BlobTable = Empty()  # type: ignore[assignment]
    assert b"".join(assemble(table, 100, 5000, lambda *_: b"") or ()) == bytes(5000)
    assert list(span(table, 100, 5000)) == []


async def test_nothing_is_fetched_twice_by_many_readers(rig: Rig) -> None:
    rig.source.gate.clear()
    reads = [asyncio.create_task(rig.read(offset, 4096)) for offset in range(0, 4 * CHUNK, 4096) for _ in range(3)]
    await asyncio.sleep(0)
    rig.source.gate.set()
    for offset, read in zip([o for o in range(0, 4 * CHUNK, 4096) for _ in range(3)], reads, strict=True):
        assert await read == rig.plain[offset : offset + 4096]
    ranges = sorted(rig.source.ranges)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(ranges)), ranges


async def test_a_miss_brings_its_neighbours(rig: Rig) -> None:
    await rig.read(0, 4096)
    await rig.settle()
    [(start, stop)] = rig.source.ranges
    assert start == 0
    assert rig.table.chunk(0).stored_size < stop <= FIRST_WINDOW
    assert rig.cached(CHUNK, 4096) == rig.plain[CHUNK : CHUNK + 4096]


async def test_ranges_grow_along_a_stream_and_are_fetched_ahead(make: Callable[..., Rig]) -> None:
    rig = make(window=512 << 10)
    try:
        for offset in range(0, rig.table.device_bytes, CHUNK):
            if rig.table.trigger >= 0 and rig.table.find(offset) == rig.table.trigger:
                rig.fetcher.advance(rig.table, rig.table.trigger)
            if rig.cached(offset, CHUNK) is None:
                await rig.read(offset, CHUNK)
            await rig.settle()
        sizes = [stop - start for start, stop in rig.source.ranges]
        assert sizes[0] <= FIRST_WINDOW
        assert max(sizes) > 300 << 10
        assert all(size <= 512 << 10 for size in sizes)
        assert len(sizes) <= 7
        assert sum(sizes) == len(rig.stored)
    finally:
        await rig.close()


async def test_scattered_reads_stay_small(make: Callable[..., Rig]) -> None:
    rig = make()
    try:
        for number in (40, 0, 30, 20):
            await rig.read(rig.table.chunk(number).offset, 4096)
            await rig.settle()
        assert all(stop - start <= FIRST_WINDOW for start, stop in rig.source.ranges)
    finally:
        await rig.close()


async def test_fetches_of_an_image_are_bounded_and_waiters_only_wait(make: Callable[..., Rig]) -> None:
    rig = make(parallel=3, window=1)
    try:
        rig.source.gate.clear()
        reads = [asyncio.create_task(rig.read(rig.table.chunk(n).offset, 10)) for n in range(30)]
        await rig.source.until_active(3)
        rig.source.gate.set()
        assert [len(data) for data in await asyncio.gather(*reads)] == [10] * 30
        assert rig.source.most == 3
    finally:
        await rig.close()


async def test_a_fetch_that_nobody_waits_for_any_more_is_not_made(make: Callable[..., Rig]) -> None:
    rig = make(parallel=1, window=1)
    try:
        rig.source.gate.clear()
        first, second = (asyncio.create_task(rig.read(n * CHUNK, 10)) for n in (0, 3))
        await rig.source.until_active(1)
        second.cancel()
        await asyncio.wait([second])
        rig.source.gate.set()
        await first
        await rig.settle()
        assert len(rig.source.ranges) == 1
        assert await rig.read(3 * CHUNK, 10) == rig.plain[3 * CHUNK :][:10]
    finally:
        await rig.close()


@pytest.mark.allow_warnings
async def test_flipped_bytes_of_the_registry_are_an_error_that_heals(rig: Rig) -> None:
    rig.source.flip = lambda data: bytes([data[0] ^ 1]) + data[1:]
    for _ in range(2):
        with pytest.raises(IntegrityError):
            await rig.read(0, 4096)
        await rig.settle()
    assert rig.cached(0, 4096) is None
    rig.source.flip = bytes
    assert await rig.read(0, 4096) == rig.plain[:4096]
    await rig.settle()
    assert rig.cached(0, 4096) == rig.plain[:4096]
    assert rig.counts()["verify_failures"] >= 4


@pytest.mark.allow_warnings
async def test_one_flipped_answer_is_made_good_by_asking_again(rig: Rig) -> None:
    answers = iter([lambda data: data[:-1] + bytes([data[-1] ^ 0x80])])
    rig.source.flip = lambda data: next(answers, bytes)(data)
    last = rig.table.chunk(rig.table.count - 1)
    assert await rig.read(last.offset, 10) == rig.plain[last.offset :][:10]
    await rig.settle()
    assert rig.cached(last.offset, 10) == rig.plain[last.offset :][:10]
    assert rig.counts()["retries"] == 1


@pytest.mark.allow_warnings
async def test_each_host_is_asked_before_a_chunk_is_an_error(rig: Rig) -> None:
    rig.source.names = ["one", "two", "three"]
    answers = iter([lambda data: data[:-1] + bytes([data[-1] ^ 0x80])] * 2)
    rig.source.flip = lambda data: next(answers, bytes)(data)
    last = rig.table.chunk(rig.table.count - 1)
    assert await rig.read(last.offset, 10) == rig.plain[last.offset :][:10]
    assert (rig.counts()["retries"], rig.source.distrusted) == (2, ["one"])


@pytest.mark.allow_warnings
async def test_a_host_that_does_not_answer_does_not_end_the_search(rig: Rig) -> None:
    rig.source.names = ["one", "two"]
    answers = iter([lambda data: bytes(len(data)), refuse])
    rig.source.flip = lambda data: next(answers, bytes)(data)
    assert await rig.read(0, 10) == rig.plain[:10]


def refuse(_data: bytes) -> bytes:
    raise RegistryUnavailable("gone")


@pytest.mark.allow_warnings
@pytest.mark.parametrize("damage", ["flip", "zero", "swap"])
async def test_damaged_cache_entries_are_fetched_again(rig: Rig, tmp_path: Path, damage: str) -> None:
    await rig.read(0, 2 * CHUNK)
    await rig.settle()
    paths = [tmp_path / "chunks" / rig.table.chunk(n).name.hex()[:2] / rig.table.chunk(n).name.hex() for n in range(2)]
    contents = [path.read_bytes() for path in paths]
    if damage == "swap":
        for path, other in zip(paths, contents[::-1], strict=True):
            path.write_bytes(other)
    else:
        paths[0].write_bytes(bytes(len(contents[0])) if damage == "zero" else b"\xff" + contents[0][1:])
    assert rig.cached(0, 10) is None
    assert await rig.read(0, 2 * CHUNK) == rig.plain[: 2 * CHUNK]
    await rig.settle()
    assert rig.cached(0, 2 * CHUNK) == rig.plain[: 2 * CHUNK]


async def test_errors_of_the_registry_reach_every_reader_and_are_not_remembered(rig: Rig) -> None:
    rig.source.error = RegistryUnavailable("no answer")
    reads = [asyncio.create_task(rig.read(offset, 100)) for offset in (0, 0, CHUNK)]
    for result in await asyncio.gather(*reads, return_exceptions=True):
        assert isinstance(result, RegistryUnavailable)
    rig.source.error = None
    assert await rig.read(0, 100) == rig.plain[:100]


async def test_a_short_answer_is_never_served(rig: Rig) -> None:
    for flip in (lambda data: data[:100], lambda data: data + b"x"):
        rig.source.flip = flip
        with pytest.raises(IntegrityError):
            await rig.read(0, rig.table.device_bytes)
    rig.source.flip = lambda data: data[:40_000]
    assert await rig.read(0, 100) == rig.plain[:100], "the first chunk arrived"


async def test_without_a_cache_neighbours_wait_in_memory(make: Callable[..., Rig]) -> None:
    rig = make(quota=0, window=256 << 10, decoded=2 * CHUNK)
    try:
        for offset in range(0, rig.table.device_bytes, CHUNK):
            assert await rig.read(offset, CHUNK) == rig.plain[offset : offset + CHUNK]
            await rig.settle()
        assert len(rig.source.ranges) < rig.table.count / 2
        assert sum(map(len, rig.fetcher._ahead.values())) <= 512 << 10
        assert sum(stop - start for start, stop in rig.source.ranges) == len(rig.stored)
    finally:
        await rig.close()


async def test_decoded_chunks_are_bounded_and_decoded_once(make: Callable[..., Rig]) -> None:
    rig = make(decoded=3 * CHUNK)
    try:
        assert await rig.read(0, 8 * CHUNK) == rig.plain[: 8 * CHUNK]
        await rig.settle()
        assert rig.decoded._bytes <= 3 * CHUNK
        for number in range(8):
            rig.cache.drop(rig.table.chunk(number).name)
        kept = [n for n in range(8) if rig.cached(n * CHUNK, CHUNK) is not None]
        assert len(kept) == 3
        rig.decoded.forget(rig.table.node)
        assert rig.decoded._bytes == 0
    finally:
        await rig.close()


async def test_a_sequential_reader_finds_the_next_chunks_decoded(make: Callable[..., Rig]) -> None:
    rig = make(decoded=16 * CHUNK)
    try:
        await rig.read(0, rig.table.device_bytes)
        await rig.settle()
        rig.decoded.forget(rig.table.node)
        for offset in range(0, 8 * CHUNK, 2 * CHUNK):
            assert rig.cached(offset, 2 * CHUNK) == rig.plain[offset : offset + 2 * CHUNK]
        rig.executor.shutdown()
        assert {8, 9, 10} <= {index for _, index in rig.decoded._kept}
    finally:
        await rig.close()


def test_two_threads_that_want_one_chunk_decode_it_once() -> None:
    decoded = DecodedChunks(100)
    calls = []

    def decode() -> bytes:
        calls.append(1)
        while len(waiting) < 1:
            pass
        return b"plain"

    waiting: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(decoded.get, (1, 1), decode)
        while not calls:
            pass
        second = pool.submit(decoded.get, (1, 1), decode)
        waiting.append(1)
        assert first.result() == second.result() == b"plain"
    assert len(calls) == 1


def test_a_failed_decode_is_tried_again_by_the_next_thread() -> None:
    decoded = DecodedChunks(100)

    def bad() -> bytes:
        raise IntegrityError("no")

    with pytest.raises(IntegrityError):
        decoded.get((1, 1), bad)
    assert decoded.get((1, 1), lambda: None) is None
    assert decoded.get((1, 1), lambda: b"good") == b"good"
