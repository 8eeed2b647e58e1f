"""The memory that a worker leaves to its successor."""

import os
import struct
from collections.abc import Iterator

import pytest

from snapshotter.errors import MalformedImage
from snapshotter.ondemand.inflight import OPENS, SIZE, SLOTS, SessionMemory


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("session")
    yield fd
    os.close(fd)


def record(memory: SessionMemory, unique: int) -> int:
    slot = memory.take()
    assert slot is not None
    memory.buffer(slot)[:24] = struct.pack("<IIQQ", 80, 15, unique, 257)
    return slot


def uniques(memory: SessionMemory) -> list[int]:
    return sorted(int.from_bytes(raw[8:16], "little") for _, raw in memory.left_over())


def test_successor_finds_what_was_taken_and_not_answered(memfd: int) -> None:
    first = SessionMemory(memfd)
    answered, waiting = record(first, 10), record(first, 12)
    first.clear(answered)
    first.set_initialised(0x1234)
    second = SessionMemory(memfd)
    assert uniques(second) == [12]
    assert second.initialised
    assert second.flags == 0x1234
    assert waiting not in {second.take() for _ in range(SLOTS - 1)}
    assert second.take() is None
    second.forget_left_over()
    assert uniques(second) == []
    assert second.take() == waiting


def test_a_full_table_says_so_and_recovers(memfd: int) -> None:
    memory = SessionMemory(memfd)
    slots = [memory.take() for _ in range(SLOTS)]
    assert None not in slots
    assert memory.take() is None
    memory.give_back(5)
    assert memory.take() == 5


def test_opening_and_releasing_twice_changes_nothing(memfd: int) -> None:
    memory = SessionMemory(memfd)
    assert memory.opened(2, 257)
    assert memory.opened(2, 257)
    assert memory.opened(4, 257)
    successor = SessionMemory(memfd)
    assert successor.opened(4, 257)
    assert successor.open_files() == {257: 2}
    successor.released(2)
    successor.released(2)
    assert SessionMemory(memfd).open_files() == {257: 1}


def test_open_files_are_bounded(memfd: int) -> None:
    memory = SessionMemory(memfd)
    assert all(memory.opened(handle, 256) for handle in range(1, OPENS + 1))
    assert not memory.opened(OPENS + 1, 256)


def test_other_memory_is_refused() -> None:
    for content in (b"x", bytes(10_000_000)):
        fd = os.memfd_create("other")
        os.write(fd, content)
        with pytest.raises(MalformedImage):
            SessionMemory(fd)
        os.close(fd)


@pytest.mark.parametrize("written", [1, 4096, SIZE - 4096, SIZE])
def test_a_layout_that_a_kill_interrupted_is_made_anew(memfd: int, written: int) -> None:
    """The header comes last; until it is there, nobody has used the memory."""
    os.pwrite(memfd, bytes(written), min(4096, SIZE - written))
    memory = SessionMemory(memfd)
    assert memory.take() is not None
    assert os.fstat(memfd).st_size == SIZE
