"""An asynchronous download as a blocking iterator for a worker thread, a few pieces ahead of it."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import TypeVar

_AHEAD = 4  # pieces
_T = TypeVar("_T")


class _Stopped(Exception):
    """Nobody waits for the consumer's result any more."""


async def consume(source: AsyncIterator[bytes], work: Callable[[Iterator[bytes]], _T]) -> _T:
    """Run `work(pieces)` in a thread while `source` is read here. Errors of the source are raised by the iterator.

    `work` must exhaust the iterator, for the source tells at its end whether its bytes were right. On cancellation
    the thread ends at its next piece, before this returns.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue(_AHEAD)
    stopped = False

    async def pump() -> None:
        try:
            async for piece in source:
                await queue.put(piece)
            await queue.put(None)
        except Exception as error:  # noqa: BLE001 - raised again where the bytes are used
            await queue.put(error)
        finally:
            if isinstance(source, AsyncGenerator):
                await source.aclose()

    async def take() -> bytes | BaseException | None:
        return _Stopped() if stopped else await queue.get()

    def pieces() -> Iterator[bytes]:
        while (item := asyncio.run_coroutine_threadsafe(take(), loop).result()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    pumping = asyncio.create_task(pump())
    working = asyncio.create_task(asyncio.to_thread(work, pieces()))
    try:
        return await asyncio.shield(working)
    finally:
        stopped = True
        pumping.cancel()
        if queue.empty():
            queue.put_nowait(_Stopped())  # for a consumer that already waits
        await asyncio.gather(pumping, working, return_exceptions=True)
