"""Missing chunks of one image, fetched from its registry: each once, in as few and as large ranges as is worth while.

A miss asks for the chunks it needs and, since chunks lie in directory order, for absent neighbours behind them. How far
depends on what was asked for before: a single read gets a small window, a sequential stream one that doubles up to
`fetch.window` and, from then on, is fetched ahead of its reader. Bytes are kept as they come; whoever uses them
verifies them. All methods run on the event loop unless they say otherwise.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Protocol

import structlog

from snapshotter.blobs.cache import ChunkCache
from snapshotter.blobs.chunks import Chunk, ChunkTable, Counters
from snapshotter.config import Fetch
from snapshotter.digest import Digest
from snapshotter.errors import IntegrityError, RegistryUnavailable
from snapshotter.registry.reference import Reference

log = structlog.get_logger(__name__)

FIRST_WINDOW = 128 << 10  # stored bytes of a read that continues nothing
_NEAR = 2  # a miss at most this many windows behind a stream's end continues the stream
_STREAMS = 16  # remembered per blob
_AHEAD_WINDOWS = 2  # kept in memory when the cache keeps nothing


class RangeSource(Protocol):
    """Where ciphertext comes from."""

    async def read_range(
        self, reference: Reference, digest: Digest, offset: int, length: int, blob_size: int
    ) -> bytes: ...


class _Flight:
    """One range on its way: the chunks `first`…`last` of one blob."""

    __slots__ = ("ahead", "asked", "done", "first", "last", "table", "waiters")

    def __init__(self, table: ChunkTable, first: int, last: int, ahead: bool) -> None:
        self.table, self.first, self.last, self.ahead = table, first, last, ahead
        self.waiters = 0  # now
        self.asked: set[int] = set()  # chunks that somebody has waited for
        self.done: asyncio.Future[Sequence[memoryview]] = asyncio.get_running_loop().create_future()


class _Stream:
    """A sequence of misses: which chunk is expected next, and how much to fetch then."""

    __slots__ = ("continued", "end", "following", "window")

    def __init__(self, following: int, window: int) -> None:
        self.continued = False  # more than one read
        self.following = following  # chunk behind the last one fetched
        self.end = 0  # stored offset behind the last one fetched
        self.window = window  # stored bytes


class Fetcher:
    """The fetches of one image. `reference` names its repository."""

    def __init__(
        self,
        source: RangeSource,
        reference: Reference,
        cache: ChunkCache,
        config: Fetch,
        counters: Counters,
        executor: Executor,
    ) -> None:
        self._source = source
        self._reference = reference
        self._cache = cache
        self._config = config
        self._counters = counters
        self._executor = executor
        self._parallel = asyncio.Semaphore(config.parallel)
        self._flights: dict[tuple[int, int], _Flight] = {}
        self._streams: dict[int, list[_Stream]] = {}
        self._ahead: OrderedDict[tuple[int, int], memoryview] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Give up everything on its way."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def fetch(self, table: ChunkTable, indices: Sequence[int]) -> list[bytes | memoryview]:
        """Stored bytes of these chunks, in order, unverified. Raises what the registry raises."""
        found: dict[int, bytes | memoryview] = {}
        waits: dict[int, _Flight] = {}
        for index in indices:
            if (table.node, index) not in self._flights and (data := self._here(table, index)) is not None:
                found[index] = data
            else:
                waits[index] = self._flights.get((table.node, index)) or self._start(table, index, indices[-1])
                waits[index].asked.add(index)
        flights = set(waits.values())
        for flight in flights:
            flight.waiters += 1
        try:
            for flight in flights:
                await asyncio.shield(flight.done)
        finally:
            for flight in flights:
                flight.waiters -= 1
        found.update((index, flight.done.result()[index - flight.first]) for index, flight in waits.items())
        return [found[index] for index in indices]

    async def refetch(self, table: ChunkTable, index: int) -> bytes:
        """This one chunk from the registry, whatever is cached or on its way. Not cached: it may be bad again."""
        flight = self._flights.get((table.node, index))
        if flight is not None:
            await asyncio.wait([flight.done])
        chunk = table.chunk(index)
        self._counters.add("retries")
        async with self._parallel:
            return await self._read(table, chunk.stored_offset, chunk.stored_size)

    def advance(self, table: ChunkTable, index: int) -> None:
        """A reader came to `table.trigger`: fetch the next window of its stream."""
        table.trigger = -1
        for stream in self._streams.get(table.node, ()):
            if index < stream.following and stream.end - table.chunk(index).stored_offset <= 2 * stream.window:
                self._fetch_ahead(table, stream)
                return

    def _here(self, table: ChunkTable, index: int) -> bytes | memoryview | None:
        ahead = self._ahead.pop((table.node, index), None)
        if ahead is not None:
            self._wanted(table, index)
            return ahead
        chunk = table.chunk(index)
        return self._cache.get(chunk.name, chunk.stored_size)

    def _wanted(self, table: ChunkTable, index: int) -> None:
        if index == table.trigger:
            self.advance(table, index)

    def _start(self, table: ChunkTable, first: int, last: int) -> _Flight:
        """Begin to fetch `first`, what is missing of the chunks up to `last`, and neighbours in the window."""
        stream = self._stream(table, first)
        flight = self._launch(table, first, last, stream, ahead=False)
        if stream.continued and stream.window >= self._config.window:
            self._fetch_ahead(table, stream)
        return flight

    def _stream(self, table: ChunkTable, first: int) -> _Stream:
        """The stream that a miss of `first` continues, with its window doubled; or a new one."""
        streams = self._streams.setdefault(table.node, [])
        offset = table.chunk(first).stored_offset
        for stream in streams:
            if stream.following <= first and offset - stream.end <= _NEAR * stream.window:
                streams.remove(stream)
                stream.window, stream.continued = min(2 * stream.window, self._config.window), True
                break
        else:
            stream = _Stream(first, min(FIRST_WINDOW, self._config.window))
            del streams[: len(streams) - _STREAMS + 1]
        streams.append(stream)
        return stream

    def _fetch_ahead(self, table: ChunkTable, stream: _Stream) -> None:
        """Launch the window behind the stream's end unless the image's share of fetches is used up."""
        index = stream.following
        if self._parallel.locked() or index >= table.count or (table.node, index) in self._flights:
            return
        if not self._present(table, index):
            table.trigger = index
            self._launch(table, index, index, stream, ahead=True)

    def _launch(self, table: ChunkTable, first: int, last: int, stream: _Stream, *, ahead: bool) -> _Flight:
        flight = _Flight(table, first, self._extend(table, first, last, stream.window), ahead)
        end = table.chunk(flight.last)
        stream.following, stream.end = flight.last + 1, end.stored_offset + end.stored_size
        for index in range(flight.first, flight.last + 1):
            self._flights[table.node, index] = flight
        task = asyncio.get_running_loop().create_task(self._fly(flight))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return flight

    def _extend(self, table: ChunkTable, first: int, last: int, window: int) -> int:
        """Last chunk of a range from `first`: at least the missing ones up to `last`, and absent ones in the window."""
        chunk = table.chunk(first)
        start, end, index = chunk.stored_offset, chunk.stored_offset + chunk.stored_size, first
        while index + 1 < table.count:
            chunk = table.chunk(index + 1)
            beyond = index + 1 > last and chunk.stored_offset + chunk.stored_size - start > window
            if chunk.stored_offset != end or beyond or (table.node, index + 1) in self._flights:
                break
            if self._present(table, index + 1, chunk):
                break
            index, end = index + 1, end + chunk.stored_size
        return index

    def _present(self, table: ChunkTable, index: int, chunk: Chunk | None = None) -> bool:
        chunk = chunk or table.chunk(index)
        return (table.node, index) in self._ahead or self._cache.has(chunk.name, chunk.stored_size)

    async def _fly(self, flight: _Flight) -> None:
        table = flight.table
        try:
            async with self._parallel:
                if not flight.waiters and not flight.ahead:
                    raise RegistryUnavailable(f"blob {table.digest}: nobody waits for this any more")
                chunks = [table.chunk(index) for index in range(flight.first, flight.last + 1)]
                start = chunks[0].stored_offset
                data = memoryview(
                    await self._read(table, start, chunks[-1].stored_offset + chunks[-1].stored_size - start)
                )
            pieces = [data[c.stored_offset - start : c.stored_offset - start + c.stored_size] for c in chunks]
            flight.done.set_result(pieces)
            await self._keep(flight, chunks, pieces)
        except asyncio.CancelledError:
            flight.done.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - handed to whoever waits
            if flight.ahead and not flight.waiters:
                log.info("fetching ahead failed", blob=table.digest, error=str(error))
            flight.done.set_exception(error)
            flight.done.exception()  # nobody may be waiting
        finally:
            for index in range(flight.first, flight.last + 1):
                del self._flights[table.node, index]

    async def _keep(self, flight: _Flight, chunks: Sequence[Chunk], pieces: Sequence[memoryview]) -> None:
        """Cache what came. What the cache does not take stays in memory for a moment if nobody asked for it yet."""
        kept = [False] * len(chunks)
        if self._cache.keeps:
            store: Callable[[], list[bool]] = lambda: [  # noqa: E731
                self._cache.put(chunk.name, piece) for chunk, piece in zip(chunks, pieces, strict=True)
            ]
            kept = await asyncio.get_running_loop().run_in_executor(self._executor, store)
        for chunk, piece, stored in zip(chunks, pieces, kept, strict=True):
            if not stored and chunk.number not in flight.asked:
                self._ahead[flight.table.node, chunk.number] = piece
        total = sum(map(len, self._ahead.values()))
        while total > _AHEAD_WINDOWS * self._config.window:
            total -= len(self._ahead.popitem(last=False)[1])

    async def _read(self, table: ChunkTable, offset: int, length: int) -> bytes:
        self._counters.add("requests")
        data = await self._source.read_range(self._reference, table.digest, offset, length, table.size)
        if len(data) != length:
            raise IntegrityError(f"blob {table.digest}: {len(data)} bytes instead of {length}")
        self._counters.add("fetched_bytes", length)
        return data
