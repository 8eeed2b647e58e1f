"""The ciphertext cache, on a disk that belongs to somebody else."""

import errno
import hashlib
import os
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshotter.blobs.cache import ChunkCache
from snapshotter.blobs.chunks import Counters


def name(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


def path_of(directory: Path, number: int) -> Path:
    text = name(number).hex()
    return directory / text[:2] / text


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "chunks"


@pytest.fixture
def cache(directory: Path) -> Iterator[ChunkCache]:
    made = ChunkCache(directory, 1 << 20, Counters())
    yield made
    made.close()


def test_what_was_put_is_found_again(cache: ChunkCache, directory: Path) -> None:
    assert cache.get(name(1), 5) is None
    assert cache.put(name(1), b"hello")
    assert cache.get(name(1), 5) == b"hello"
    assert cache.has(name(1), 5)
    assert path_of(directory, 1).read_bytes() == b"hello"
    assert stat.S_IMODE(path_of(directory, 1).stat().st_mode) == 0o600
    assert cache.stats() == {"bytes": 5, "entries": 1}
    assert cache.put(name(1), b"world!")
    assert cache.stats() == {"bytes": 6, "entries": 1}
    cache.drop(name(1))
    assert cache.get(name(1), 6) is None
    assert cache.stats() == {"bytes": 0, "entries": 0}


def test_another_size_is_a_miss(cache: ChunkCache) -> None:
    cache.put(name(1), b"hello")
    assert cache.get(name(1), 4) is None
    assert not cache.has(name(1), 6)


def test_a_new_cache_counts_what_is_there(cache: ChunkCache, directory: Path) -> None:
    for number in range(10):
        cache.put(name(number), bytes(100))
    old = directory / name(1).hex()[:2] / ".new-1-1"
    old.write_bytes(b"left by a write that was killed")
    os.utime(old, (0, 0))
    again = ChunkCache(directory, 1 << 20, Counters())
    again.scan()
    assert again.stats() == {"bytes": 1000, "entries": 10}
    assert not old.exists()
    again.close()


def replace_by_link(path: Path) -> None:
    secret = path.parent.parent / "elsewhere"
    secret.write_bytes(b"hello")
    path.unlink()
    path.symlink_to(secret)


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inhabited").touch()


def remove_bucket(path: Path) -> None:
    path.unlink()
    path.parent.rmdir()


def remove_everything(path: Path) -> None:
    subprocess.run(["rm", "-rf", path.parent.parent], check=True)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.unlink(), id="deleted"),
        pytest.param(lambda path: os.truncate(path, 3), id="cut"),
        pytest.param(lambda path: os.truncate(path, 0), id="emptied"),
        replace_by_link,
        replace_by_fifo,
        replace_by_directory,
        remove_bucket,
        remove_everything,
    ],
)
def test_damage_is_a_miss_and_is_repaired(cache: ChunkCache, directory: Path, damage: Callable[[Path], None]) -> None:
    cache.put(name(1), b"hello")
    damage(path_of(directory, 1))
    assert cache.get(name(1), 5) is None
    assert not cache.has(name(1), 5)
    assert cache.put(name(1), b"hello")
    assert cache.get(name(1), 5) == b"hello"


@pytest.mark.parametrize("damage", [replace_by_directory, replace_by_fifo, replace_by_link, remove_everything])
def test_dropping_what_others_replaced_makes_room(
    cache: ChunkCache, directory: Path, damage: Callable[[Path], None]
) -> None:
    cache.put(name(1), b"hello")
    damage(path_of(directory, 1))
    cache.drop(name(1))
    assert not path_of(directory, 1).exists()


def test_links_planted_as_directories_lead_nowhere(directory: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    directory.mkdir(parents=True)
    (directory / name(1).hex()[:2]).symlink_to(outside)
    cache = ChunkCache(directory, 1 << 20, Counters())
    assert cache.get(name(1), 5) is None
    assert cache.put(name(1), b"hello")
    assert cache.get(name(1), 5) == b"hello"
    assert list(outside.iterdir()) == []
    cache.close()


@pytest.mark.allow_warnings
def test_a_link_in_place_of_the_whole_cache_is_not_followed(directory: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    directory.parent.mkdir(parents=True)
    directory.symlink_to(outside)
    counters = Counters()
    cache = ChunkCache(directory, 1 << 20, counters)
    assert not cache.put(name(1), b"hello")
    assert cache.get(name(1), 5) is None
    assert list(outside.iterdir()) == []
    assert counters.snapshot()["cache_errors"] == 1


def test_the_quota_is_kept_and_the_oldest_go_first(directory: Path) -> None:
    counters = Counters()
    cache = ChunkCache(directory, 100_000, counters)
    for number in range(90):
        cache.put(name(number), bytes(1000))
        used = time.time() - 10 * 86400 + number * 3600
        os.utime(path_of(directory, number), (used, used))
    assert cache.get(name(0), 1000) is not None  # used just now
    for number in range(90, 120):
        assert cache.put(name(number), bytes(1000))
    stored = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    assert stored <= 100_000
    assert cache.stats()["bytes"] == stored
    assert cache.get(name(0), 1000) is not None
    assert cache.get(name(1), 1000) is None
    assert cache.get(name(119), 1000) is not None
    assert counters.snapshot()["evictions"] >= 20
    cache.close()


def test_what_others_deleted_is_noticed_when_room_is_needed(directory: Path) -> None:
    counters = Counters()
    cache = ChunkCache(directory, 10_000, counters)
    for number in range(10):
        cache.put(name(number), bytes(1000))
    for number in range(9):
        path_of(directory, number).unlink()
    assert cache.put(name(11), bytes(1000))
    assert cache.get(name(9), 1000) is not None
    assert cache.stats() == {"bytes": 2000, "entries": 2}
    cache.close()


def test_a_quota_of_zero_keeps_nothing(directory: Path) -> None:
    cache = ChunkCache(directory, 0, Counters())
    assert not cache.keeps
    assert not cache.put(name(1), b"hello")
    assert not directory.exists()


def test_one_entry_larger_than_the_quota_is_not_kept(directory: Path) -> None:
    cache = ChunkCache(directory, 10, Counters())
    assert not cache.put(name(1), bytes(11))
    assert cache.keeps
    cache.close()


@pytest.mark.allow_warnings
def test_a_failing_disk_is_left_alone_for_a_while(
    cache: ChunkCache, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache.put(name(1), b"hello")
    monkeypatch.setattr(os, "write", full)
    assert not cache.put(name(2), b"world")
    assert not cache.keeps
    assert cache.get(name(1), 5) == b"hello"
    assert list(directory.rglob(".new-*")) == []


def test_threads_that_put_and_get_the_same_entries_see_whole_ones(cache: ChunkCache) -> None:
    wrong = []

    def work(seed: int) -> None:
        for turn in range(100):
            number = (seed * 7 + turn) % 5
            content = bytes([number]) * 5000
            cache.put(name(number), content)
            if (got := cache.get(name(number), 5000)) not in (None, content):
                wrong.append(got)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.stats()["entries"] >= 5


def used(directory: Path, number: int, seconds_ago: float) -> None:
    os.utime(path_of(directory, number), (0, time.time() - seconds_ago))


def test_an_operator_shrinks_it_to_a_size(cache: ChunkCache, directory: Path) -> None:
    for number in range(10):
        cache.put(name(number), bytes(100))
        used(directory, number, 100_000 - 5_000 * number)
    assert cache.shrink(350, None) == (700, 7)
    assert [number for number in range(10) if cache.has(name(number), 100)] == [7, 8, 9]
    assert cache.stats() == {"bytes": 300, "entries": 3}
    assert cache.shrink(350, None) == (0, 0)
    assert cache.shrink(0, None) == (300, 3)
    assert cache.put(name(1), b"goes on")


def test_an_operator_drops_what_nobody_used_lately(cache: ChunkCache, directory: Path) -> None:
    for number in range(10):
        cache.put(name(number), bytes(100))
        used(directory, number, 100 if number < 4 else 10_000)
    assert cache.shrink(None, time.time() - 3_600) == (600, 6)
    assert [number for number in range(10) if cache.has(name(number), 100)] == [0, 1, 2, 3]
