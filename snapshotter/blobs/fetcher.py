"""Missing chunks of one image, fetched from its registry: each once, in as few and as large ranges as is worth while.

A miss asks for the chunks it needs and, since chunks lie in directory order, for absent neighbours behind them. How far
depends on what was asked for before: a single read gets a small window, a sequential stream one that doubles up to
`fetch.window` and, from then on, is fetched ahead of its reader. Bytes are kept as they come; whoever uses them
verifies them. All methods run on the event loop unless they say otherwise.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Executor
from contextlib import aclosing

import structlog

from snapshotter.blobs.cache import ChunkCache
from snapshotter.blobs.chunks import Chunk, ChunkTable, ImageCounters
from snapshotter.blobs.source import RangeSource
from snapshotter.config import Fetch
from snapshotter.errors import IntegrityError, RegistryUnavailable, SnapshotterError
from snapshotter.registry.endpoint import Endpoint
from snapshotter.registry.reference import Reference

log = structlog.get_logger(__name__)

FIRST_WINDOW = 256 << 10  # stored bytes of a read that continues nothing
_STREAMS = 16  # remembered per blob
_AHEAD_WINDOWS = 2  # kept in memory when the cache keeps nothing


class _Flight:
    """One range on its way: the chunks `first`…`last` of one blob, which land one after the other."""

    __slots__ = (
        "_expected", "ahead", "asked", "ended", "first", "keeping", "landed", "last", "reads", "table", "waiters",
    )  # fmt: skip

    def __init__(self, table: ChunkTable, first: int, last: int, ahead: bool) -> None:
        self.table, self.first, self.last, self.ahead = table, first, last, ahead
        self.waiters = 0  # now
        self.reads = 0  # that have waited for it
        self.keeping = False  # everything has landed and is being cached
        self.ended = asyncio.Event()
        self.asked: set[int] = set()  # chunks that somebody has waited for
        self.landed: dict[int, memoryview] = {}
        self._expected: dict[int, asyncio.Future[memoryview]] = {}

    def expect(self, index: int) -> asyncio.Future[memoryview]:
        """The stored bytes of a chunk, or what ended the flight. Shared: await it shielded."""
        self.asked.add(index)
        if index not in self._expected:
            self._expected[index] = asyncio.get_running_loop().create_future()
            if index in self.landed:
                self._expected[index].set_result(self.landed[index])
        return self._expected[index]

    def land(self, index: int, stored: memoryview) -> None:
        self.landed[index] = stored
        if index in self._expected:
            self._expected[index].set_result(stored)

    def fail(self, error: Exception | None) -> None:
        """What has not landed by now never will. None: cancelled."""
        for expected in self._expected.values():
            if not expected.done() and error is None:
                expected.cancel()
            elif not expected.done() and error is not None:
                expected.set_exception(error)
                expected.exception()  # whoever waited may be gone


class _Stream:
    """A sequence of misses: which chunk is expected next, and how much to fetch then."""

    __slots__ = ("continued", "following", "last", "window")

    def __init__(self, window: int) -> None:
        self.continued = False  # more than one read
        self.last = 0  # first chunk of the last range
        self.following = 0  # chunk behind it
        self.window = window  # stored bytes


class Fetcher:
    """The fetches of one image. `reference` names its repository."""

    def __init__(
        self,
        source: RangeSource,
        reference: Reference,
        cache: ChunkCache,
        config: Fetch,
        counters: ImageCounters,
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
        self._ahead: OrderedDict[tuple[int, int], bytes] = OrderedDict()
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
        expected = [flight.expect(index) for index, flight in waits.items()]
        flights = set(waits.values())
        for flight in flights:
            flight.waiters += 1
            flight.reads += 1
        try:
            for index, future in zip(waits, expected, strict=True):
                found[index] = await asyncio.shield(future)
        finally:
            for flight in flights:
                flight.waiters -= 1
        return [found[index] for index in indices]

    async def refetch(self, table: ChunkTable, index: int) -> AsyncGenerator[bytes, None]:
        """This one chunk from each host in turn, because what came before was bad. Not cached: this may be, too.

        Whoever asks for another copy says by this that the last one was bad as well. Raises what the last host raises.
        """
        flight = self._flights.get((table.node, index))
        if flight is not None:
            if index in flight.asked:  # and has been answered; whoever asks for the first time still gets it
                flight.landed.pop(index, None)  # or it would be cached now
            if flight.keeping:
                await flight.ended.wait()
        hosts = self._source.hosts(self._reference, table.digest)
        for host in hosts:
            try:
                yield await self._refetch(table, table.chunk(index), host)
                if len(hosts) > 1:
                    self._source.distrust(self._reference, table.digest, host)
            except SnapshotterError:
                if host is hosts[-1]:
                    raise

    async def _refetch(self, table: ChunkTable, chunk: Chunk, host: Endpoint) -> bytes:
        self._counters.add("retries")
        async with self._parallel, aclosing(self._stream_chunks(table, [chunk], host=host)) as chunks:
            async for _, stored in chunks:
                return bytes(stored)
        raise AssertionError("a stream without its chunk ends in an error")

    def warm_up(self, table: ChunkTable) -> None:
        """Fetch a blob's first chunk: names are resolved and tokens granted before somebody waits for it."""
        if table.count and (table.node, 0) not in self._flights and not self._present(table, 0):
            self._launch(table, 0, 0, _Stream(0), ahead=True)

    def advance(self, table: ChunkTable, index: int) -> None:
        """A reader came to `table.trigger`: fetch the next window of its stream."""
        table.trigger = -1
        for stream in self._streams.get(table.node, ()):
            if stream.last <= index < stream.following:
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
        for stream in streams:
            if stream.following == first:
                streams.remove(stream)
                stream.window, stream.continued = min(2 * stream.window, self._config.window), True
                break
        else:
            stream = _Stream(min(FIRST_WINDOW, self._config.window))
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
        stream.last, stream.following = flight.first, flight.last + 1
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
        chunks = [table.chunk(index) for index in range(flight.first, flight.last + 1)]
        error: Exception | None = None
        try:
            async with self._parallel:
                if not flight.waiters and not flight.ahead:
                    raise RegistryUnavailable(f"blob {table.digest}: nobody waits for this any more")
                async with aclosing(self._stream_chunks(table, chunks, flight)) as stream:
                    async for number, stored in stream:
                        flight.land(number, stored)
            flight.keeping = True
            await self._keep(flight, chunks)
        except Exception as caught:  # noqa: BLE001 - handed to whoever waits
            error = caught
            if flight.ahead and not flight.waiters:
                log.info("fetching ahead failed", blob=table.digest, error=str(error))
        finally:
            flight.fail(error)
            flight.ended.set()
            for index in range(flight.first, flight.last + 1):
                del self._flights[table.node, index]

    async def _keep(self, flight: _Flight, chunks: Sequence[Chunk]) -> None:
        """Cache what came. What the cache does not take stays in memory for a moment if nobody asked for it yet."""
        landed = [(chunk, flight.landed[chunk.number]) for chunk in chunks if chunk.number in flight.landed]
        kept = [False] * len(landed)
        if self._cache.keeps:
            kept = await asyncio.get_running_loop().run_in_executor(
                self._executor, lambda: [self._cache.put(chunk.name, stored) for chunk, stored in landed]
            )
        for (chunk, stored), is_kept in zip(landed, kept, strict=True):
            if not is_kept and chunk.number not in flight.asked:
                self._ahead[flight.table.node, chunk.number] = bytes(stored)  # a copy lets the range go
        total = sum(map(len, self._ahead.values()))
        while total > _AHEAD_WINDOWS * self._config.window:
            total -= len(self._ahead.popitem(last=False)[1])

    async def _stream_chunks(
        self, table: ChunkTable, chunks: Sequence[Chunk], flight: _Flight | None = None, host: Endpoint | None = None
    ) -> AsyncGenerator[tuple[int, memoryview], None]:
        """Adjacent chunks as they arrive. Raises IntegrityError for an answer of another length."""
        begin, outcome = time.monotonic(), "cancelled"
        try:
            async with aclosing(self._pieces_of(table, chunks, host)) as stream:
                async for number, stored in stream:
                    outcome = "ok" if number == chunks[-1].number else outcome
                    yield number, stored
        except SnapshotterError as error:
            outcome = error.reason
            raise
        finally:
            self._tell(table, chunks, time.monotonic() - begin, outcome, flight)

    def _tell(
        self, table: ChunkTable, chunks: Sequence[Chunk], seconds: float, outcome: str, flight: _Flight | None
    ) -> None:
        self._counters.total.fetches.observe(seconds, outcome)
        start = chunks[0].stored_offset
        self._counters.note(
            "range",
            blob=table.digest.hex[:12],
            offset=start,
            length=chunks[-1].stored_offset + chunks[-1].stored_size - start,
            seconds=round(seconds, 4),
            outcome=outcome,
            reads=flight.reads if flight else 1,
            purpose="again" if flight is None else "ahead" if flight.ahead else "read",
        )

    async def _pieces_of(
        self, table: ChunkTable, chunks: Sequence[Chunk], host: Endpoint | None
    ) -> AsyncGenerator[tuple[int, memoryview], None]:
        self._counters.add("requests")
        start = chunks[0].stored_offset
        length = chunks[-1].stored_offset + chunks[-1].stored_size - start
        data, position, landed = memoryview(bytearray(length)), 0, 0
        pieces = self._source.stream_range(self._reference, table.digest, start, length, table.size, host)
        async with aclosing(pieces):
            async for piece in pieces:
                if position + len(piece) > length:
                    raise IntegrityError(f"blob {table.digest}: more than the {length} bytes asked for")
                data[position : position + len(piece)] = piece
                position += len(piece)
                self._counters.add("fetched_bytes", len(piece))
                while landed < len(chunks):
                    chunk = chunks[landed]
                    begin, end = chunk.stored_offset - start, chunk.stored_offset - start + chunk.stored_size
                    if end > position:
                        break
                    landed += 1
                    yield chunk.number, data[begin:end]
        if position != length:
            raise IntegrityError(f"blob {table.digest}: {position} bytes instead of {length}")
