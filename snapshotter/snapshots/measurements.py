"""What active snapshots take on disk, measured off the event loop, few at a time, and remembered if that takes long.

containerd's CRI asks for every snapshot every ten seconds, and each answer is a walk through all that a container has
written. A few files are counted at once. Where all longer walks together take less than half a second, each answer is
new. Where they take more, an answer is given again for twenty times as long as exceeds that, for a minute at most: so
about a tenth of one CPU is spent on it.
"""

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple

from snapshotter.snapshots.model import Usage

_AT_ONCE = 2  # walks
_CHEAP = 0.5  # seconds that all walks may take before their answers are given again
_SHARE = 20  # for this many times what they take longer
_LONGEST = 60.0  # and so many seconds at most


class _Answer(NamedTuple):
    usage: Usage
    at: float  # monotonic, when the walk began
    took: float  # seconds


class Measurements:
    """`measure` walks the files of a snapshot, in a thread; `glance` does if they are few, and is None otherwise."""

    def __init__(self, measure: Callable[[int], Usage], glance: Callable[[int], Usage | None]) -> None:
        self._measure, self._glance = measure, glance
        self._answers: dict[int, _Answer] = {}
        self._walks: dict[int, asyncio.Task[Usage]] = {}
        self._free = asyncio.Semaphore(_AT_ONCE)
        self._took = 0.0  # by the walks of all remembered answers

    async def usage(self, number: int) -> Usage:
        """Of an active snapshot, as old as the rule above allows. Raises what `measure` raises."""
        known = self._answers.get(number)
        if known is not None and time.monotonic() - known.at < min(_SHARE * (self._took - _CHEAP), _LONGEST):
            return known.usage
        if (few := self._glance(number)) is not None:
            return few
        walk = self._walks.get(number)
        if walk is None:
            walk = self._walks[number] = asyncio.create_task(self._walk(number))
            walk.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # whoever asked may be gone
        return await asyncio.shield(walk)

    async def anew(self, number: int) -> Usage:
        """As it is now, whatever was found before."""
        few = self._glance(number)
        return await asyncio.to_thread(self._measure, number) if few is None else few

    def forget(self, number: int) -> None:
        """It is not active any more."""
        self._walks.pop(number, None)
        known = self._answers.pop(number, None)
        self._took -= known.took if known else 0

    async def _walk(self, number: int) -> Usage:
        mine = asyncio.current_task()
        try:
            async with self._free:
                begin = time.monotonic()
                usage = await asyncio.to_thread(self._measure, number)
                took = time.monotonic() - begin
        except BaseException:
            if self._walks.get(number) is mine:
                self.forget(number)
            raise
        if self._walks.get(number) is mine:  # else it was forgotten meanwhile
            self.forget(number)
            self._answers[number] = _Answer(usage, begin, took)
            self._took += took
        return usage
