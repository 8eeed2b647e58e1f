import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

from snapshotter.build.feed import consume
from snapshotter.errors import DigestMismatch


async def numbers(count: int) -> AsyncIterator[bytes]:
    for number in range(count):
        yield b"%d," % number


async def test_a_thread_gets_all_pieces_in_order() -> None:
    assert await consume(numbers(50), b"".join) == b"".join(b"%d," % n for n in range(50))


async def test_an_error_of_the_source_reaches_the_caller() -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"x"
        raise DigestMismatch("wrong")

    with pytest.raises(DigestMismatch):
        await consume(broken(), b"".join)


async def test_an_error_of_the_consumer_ends_the_download() -> None:
    closed = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x"
        finally:
            closed.set()

    def refuse(pieces: Iterator[bytes]) -> None:
        next(pieces)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await consume(endless(), refuse)
    assert closed.is_set()


@pytest.mark.parametrize("stalled", [True, False])
async def test_cancellation_ends_the_thread(stalled: bool) -> None:
    ended, started = threading.Event(), asyncio.Event()

    async def source() -> AsyncIterator[bytes]:
        yield b"x"
        started.set()
        while True:
            await asyncio.sleep(3600 if stalled else 0)
            yield b"x"

    def work(pieces: Iterator[bytes]) -> None:
        try:
            for _ in pieces:
                pass
        finally:
            ended.set()

    task = asyncio.create_task(consume(source(), work))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
