"""Measuring active snapshots: anew where it is cheap, bounded where it is not."""

import asyncio
import threading
import time

import pytest

from snapshotter.errors import NotFound
from snapshotter.snapshots import measurements
from snapshotter.snapshots.measurements import Measurements
from snapshotter.snapshots.model import Usage


class Disk:
    """Walks take as long as a test says and find one byte more each time."""

    def __init__(self, seconds: float = 0) -> None:
        self.seconds = seconds
        self.walks: list[int] = []
        self.at_once = self.most = 0
        self._lock = threading.Lock()
        self.measurements = Measurements(self.measure, lambda _: None)

    def measure(self, number: int) -> Usage:
        with self._lock:
            self.walks.append(number)
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        time.sleep(self.seconds)
        with self._lock:
            self.at_once -= 1
            return Usage(self.walks.count(number), 1)

    async def sizes(self, *numbers: int) -> list[int]:
        return [usage.size for usage in await asyncio.gather(*map(self.measurements.usage, numbers))]


async def test_cheap_answers_are_always_new() -> None:
    disk = Disk()
    assert [await disk.sizes(1, 2) for _ in range(3)] == [[1, 1], [2, 2], [3, 3]]


async def test_few_files_are_counted_at_once() -> None:
    disk = Disk()
    few = Measurements(disk.measure, lambda number: Usage(0, 1) if number == 1 else None)
    assert [await few.usage(1), await few.anew(1)] == [Usage(0, 1)] * 2
    assert disk.walks == []
    assert [(await few.usage(2)).size, (await few.anew(2)).size] == [1, 2]


async def test_answers_that_take_long_are_given_again_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "_CHEAP", 0.01)
    disk = Disk(0.02)
    assert await disk.sizes(1, 2) == [1, 1]
    assert await disk.sizes(1, 2) == [1, 1]
    monkeypatch.setattr(measurements, "_LONGEST", 0)
    assert await disk.sizes(1) == [2], "an answer has an age that it does not exceed"


async def test_the_time_of_those_that_are_forgotten_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "_CHEAP", 0.05)
    disk = Disk(0.02)
    assert await disk.sizes(*range(10)) == [1] * 10
    assert await disk.sizes(0) == [1]
    for number in range(1, 10):
        disk.measurements.forget(number)
    assert await disk.sizes(0) == [2]


async def test_walks_are_few_at_a_time_and_shared() -> None:
    disk = Disk(0.01)
    assert await disk.sizes(*range(10), *range(10), *range(10)) == [1] * 30
    assert sorted(disk.walks) == list(range(10))
    assert disk.most == 2


async def test_one_that_goes_while_it_is_measured_leaves_nothing() -> None:
    disk = Disk(0.02)
    asked = asyncio.create_task(disk.measurements.usage(1))
    while not disk.walks:  # noqa: ASYNC110 - set by a thread
        await asyncio.sleep(0)
    disk.measurements.forget(1)
    assert (await asked).size == 1
    assert vars(disk.measurements)["_answers"] == {}
    assert vars(disk.measurements)["_took"] == 0


async def test_a_failure_is_told_and_not_remembered() -> None:
    found: list[object] = [NotFound("gone"), Usage(5, 1)]

    def measure(_: int) -> Usage:
        answer = found.pop(0)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Usage)
        return answer

    disk = Measurements(measure, lambda _: None)
    with pytest.raises(NotFound, match="gone"):
        await disk.usage(1)
    assert await disk.usage(1) == Usage(5, 1)


async def test_a_client_that_goes_away_costs_others_nothing() -> None:
    disk = Disk(0.05)
    first, second = (asyncio.create_task(disk.measurements.usage(1)) for _ in range(2))
    while not disk.walks:  # noqa: ASYNC110 - set by a thread
        await asyncio.sleep(0)
    first.cancel()
    assert (await second).size == 1
    assert disk.walks == [1]
