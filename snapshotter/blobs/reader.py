"""From (blob, offset, length) to exactly those bytes, verified; or an error. Never short, never zeros in their place.

`cached` answers what is on this machine, from any thread, and is the hot path. `read` runs on the event loop, fetches
what is missing, and is the only one that can fail. A chunk that fails its checks is dropped from the cache, fetched
again from each host that may have it, and only then an error, which nothing remembers.
"""

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from functools import partial
from typing import TypeAlias

import structlog

from snapshotter.blobs.cache import ChunkCache
from snapshotter.blobs.chunks import Chunk, ChunkTable, Counters
from snapshotter.blobs.fetcher import Fetcher
from snapshotter.crypto import chunk as codec
from snapshotter.errors import IntegrityError

log = structlog.get_logger(__name__)

Buffer: TypeAlias = bytes | memoryview
Key: TypeAlias = tuple[int, int]

_ZEROS = memoryview(bytes(1 << 20))
_LARGE = 128 << 10  # a read of a reader that reads on
_AHEAD_READS = 2  # decoded ahead of such a reader


class DecodedChunks:
    """The chunks decoded last, at most `limit` bytes; a chunk that several threads want is decoded once.

    A chunk read to its end is let go: the kernel has it now, and its memory is still in the CPU's cache for the next.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: OrderedDict[Key, bytes] = OrderedDict()
        self._bytes = 0
        self._busy: dict[Key, threading.Lock] = {}  # locked while somebody decodes
        self._lock = threading.Lock()

    def get(self, key: Key, decode: Callable[[], bytes | None], finished: bool = False) -> bytes | None:
        """The chunk, by `decode` if nobody has it. What `decode` raises or None is given to its own caller only.

        `finished`: it will probably not be wanted again.
        """
        while True:
            with self._lock:
                found = self._kept.get(key)
                if found is not None:
                    if finished:
                        del self._kept[key]
                        self._bytes -= len(found)
                    else:
                        self._kept.move_to_end(key)
                    return found
                busy = self._busy.get(key)
                if busy is None:
                    mine = self._busy[key] = threading.Lock()
                    mine.acquire()
                    break
            with busy:
                pass
        plain = None
        try:
            plain = decode()
            return plain
        finally:
            with self._lock:
                if plain is not None and not finished:
                    self._keep(key, plain)
                del self._busy[key]
            mine.release()

    def forget(self, node: int) -> None:
        """Drop every chunk of a blob."""
        with self._lock:
            for key in [key for key in self._kept if key[0] == node]:
                self._bytes -= len(self._kept.pop(key))

    def _keep(self, key: Key, plain: bytes) -> None:
        self._kept[key] = plain
        self._bytes += len(plain)
        while self._bytes > self.limit:
            self._bytes -= len(self._kept.popitem(last=False)[1])


class ChunkReader:
    """Reads blobs of all images."""

    def __init__(self, cache: ChunkCache, decoded: DecodedChunks, counters: Counters, executor: Executor) -> None:
        self._cache = cache
        self._decoded = decoded
        self._counters = counters
        self._executor = executor

    def cached(self, table: ChunkTable, offset: int, length: int) -> list[Buffer] | None:
        """The bytes, in pieces, if every chunk is on this machine and good. Cut at the end of the device."""
        pieces = assemble(table, offset, length, lambda chunk, finished: self._local(table, chunk, finished))
        if length >= _LARGE and pieces is not None:
            self._continue(table, offset, length)
        return pieces

    def _continue(self, table: ChunkTable, offset: int, length: int) -> None:
        """Decode ahead of a sequential reader: the kernel asks for the next window only when it has this one."""
        end = offset + length
        if offset == table.expected:
            following = span(table, end, min(_AHEAD_READS * length, self._decoded.limit // 2))
            for index in range(max(following.start, table.decoded_to), following.stop):
                self._executor.submit(self._decode_ahead, table, table.chunk(index))
            table.decoded_to = max(table.decoded_to, following.stop)
        else:
            table.decoded_to = 0
        table.expected = end

    def _decode_ahead(self, table: ChunkTable, chunk: Chunk) -> None:
        if chunk.offset >= table.expected:  # else its reader was faster
            self._local(table, chunk, False)

    async def read(self, table: ChunkTable, fetcher: Fetcher, offset: int, length: int) -> list[Buffer]:
        """The bytes, in pieces. Raises IntegrityError, or what the registry raises."""
        plain, missing = dict[int, bytes](), list[int]()
        for index in span(table, offset, length):
            decoded = self._decoded.get((table.node, index), lambda: None)
            if decoded is None:
                missing.append(index)
            else:
                plain[index] = decoded
        stored = await fetcher.fetch(table, missing)
        contents = await asyncio.gather(
            *(
                self._verified(table, fetcher, table.chunk(index), data)
                for index, data in zip(missing, stored, strict=True)
            )
        )
        plain.update(zip(missing, contents, strict=True))
        pieces = assemble(table, offset, length, lambda chunk, _: plain[chunk.number])
        assert pieces is not None
        return pieces

    def _local(self, table: ChunkTable, chunk: Chunk, finished: bool) -> bytes | None:
        def decode() -> bytes | None:
            name = chunk.name
            stored = self._cache.get(name, chunk.stored_size)
            if stored is None:
                return None
            try:
                return self._open(table, chunk, stored)
            except IntegrityError as error:
                self._failed(table, chunk, error)
                return None

        return self._decoded.get((table.node, chunk.number), decode, finished)

    async def _verified(self, table: ChunkTable, fetcher: Fetcher, chunk: Chunk, stored: Buffer) -> bytes:
        """The content of a chunk, from `stored` or fetched once more, from each host in turn."""
        try:
            return await self._decode(table, chunk, stored)
        except IntegrityError as error:
            self._failed(table, chunk, error)
        last: IntegrityError | None = None
        async with aclosing(fetcher.refetch(table, chunk.number)) as copies:
            async for copy in copies:
                self._cache.drop(chunk.name)  # again: the first fetch may have stored the bad copy only now
                try:
                    plain = await self._decode(table, chunk, copy)
                except IntegrityError as error:
                    self._failed(table, chunk, error)
                    last = error
                else:
                    await self._run(partial(self._cache.put, chunk.name, copy))
                    return plain
        assert last is not None
        raise last

    async def _decode(self, table: ChunkTable, chunk: Chunk, stored: Buffer) -> bytes:
        plain = await self._run(
            lambda: self._decoded.get((table.node, chunk.number), lambda: self._open(table, chunk, stored))
        )
        assert plain is not None
        return plain

    async def _run(self, call: Callable[[], bytes | bool | None]) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)  # type: ignore[arg-type]

    def _open(self, table: ChunkTable, chunk: Chunk, stored: Buffer) -> bytes:
        begin = time.perf_counter()
        plain = codec.decode(
            stored, digest=chunk.digest, size=chunk.size, codec=chunk.codec, sealed_secret=chunk.secret,
            digester=table.digester,
        )  # fmt: skip
        self._counters.decodes.observe(time.perf_counter() - begin)
        return plain

    def _failed(self, table: ChunkTable, chunk: Chunk, error: IntegrityError) -> None:
        self._cache.drop(chunk.name)
        self._counters.verify_failed(
            table.node, blob=table.digest.hex[:12], offset=chunk.stored_offset, check=error.reason
        )
        log.warning("chunk failed verification", blob=table.digest, chunk=chunk.name.hex(), check=error.reason)


def span(table: ChunkTable, offset: int, length: int) -> range:
    """Indices of the chunks that the range touches."""
    end = min(offset + length, table.device_bytes)
    first, last = table.find(offset), table.find(end - 1)
    if first < 0:
        first = 0
    elif first <= last:
        chunk = table.chunk(first)
        if chunk.offset + chunk.size <= offset:
            first += 1
    return range(first, last + 1)


def assemble(
    table: ChunkTable, offset: int, length: int, content: Callable[[Chunk, bool], bytes | None]
) -> list[Buffer] | None:
    """The pieces of a range of the device; None as soon as `content` has none. Between chunks there are zeros.

    `content(chunk, finished)`: the decoded chunk; `finished` if the range goes up to its end.
    """
    end = min(offset + length, table.device_bytes)
    pieces: list[Buffer] = []
    index = table.find(offset)
    position = offset
    while position < end:
        stop = end
        if index >= 0:
            chunk = table.chunk(index)
            stop = min(chunk.offset + chunk.size, end)
            if position < stop:
                plain = content(chunk, stop == chunk.offset + chunk.size)
                if plain is None:
                    return None
                whole = position == chunk.offset and stop - position == chunk.size
                pieces.append(plain if whole else memoryview(plain)[position - chunk.offset : stop - chunk.offset])
                position = stop
        index += 1
        if position < end:
            stop = min(table.chunk(index).offset, end) if index < table.count else end
            if stop > position:
                pieces += _zeros(stop - position)
                position = stop
    return pieces


def _zeros(length: int) -> Sequence[Buffer]:
    return [_ZEROS[:length]] if length <= len(_ZEROS) else [bytes(length)]
