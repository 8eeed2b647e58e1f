"""The ciphertext cache on a real disk that is nearly full, full, or read-only."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from snapshotter.blobs.cache import ChunkCache
from snapshotter.blobs.chunks import Counters
from snapshotter.config import MiB, Reserve, load
from tests.harness.machine import unmount, until
from tests.unit.blobs.test_cache import name

pytestmark = pytest.mark.root

CHUNK = 64 << 10
MakeDisk = Callable[[str], "Disk"]
SAYS = "chunks are not cached"


class Disk:
    """A tmpfs of 16 MiB with a cache on it."""

    def __init__(self, path: Path, reserve: str) -> None:
        self.path = path
        self.counters = Counters()
        self.cache = ChunkCache(path / "chunks", 1 << 30, self.counters, Reserve(reserve))

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True)

    @property
    def free(self) -> int:
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize

    def put(self, numbers: range) -> list[int]:
        """Those that were kept."""
        return [number for number in numbers if self.cache.put(name(number), number.to_bytes(4, "big") * (CHUNK // 4))]

    def fill(self, leaving: int) -> None:
        """Somebody else writes."""
        with (self.path / "filler").open("ab", buffering=0) as file, suppress(OSError):  # full is full
            while self.free > leaving:
                file.write(bytes(min(MiB, self.free - leaving)))


@pytest.fixture(autouse=True)
def _hear(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Disk]]:
    """Makes a disk with the given reserve. Others on this machine may look into it when it is to go."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", tmp_path], check=True)
    made: list[Disk] = []

    def make(reserve: str) -> Disk:
        made.append(Disk(tmp_path, reserve))
        return made[-1]

    yield make
    for each in made:
        each.cache.close()
    until(lambda: unmount(str(tmp_path)), "the disk is unmounted", 10)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "cached" in record.getMessage()]


@pytest.mark.allow_warnings
@pytest.mark.parametrize("reserve", ["4MiB", "25%"])
def test_the_cache_grows_no_further_than_the_reserve(
    disk: MakeDisk, reserve: str, caplog: pytest.LogCaptureFixture
) -> None:
    tmpfs = disk(reserve)
    kept = tmpfs.put(range(400))
    assert 4 * MiB <= tmpfs.free < 5 * MiB
    assert 150 < len(kept) < 200
    assert not tmpfs.cache.keeps
    tmpfs.cache.relieve()
    assert 5 * MiB <= tmpfs.free < 6 * MiB
    tmpfs.cache.relieve()
    assert tmpfs.cache.keeps
    assert tmpfs.put(range(500, 502)) == [500, 501]
    assert said(caplog) == [], "this is how it always is on a small disk"
    assert 0 < tmpfs.counters.snapshot()["evictions"] < 30


@pytest.mark.allow_warnings
def test_the_cache_gives_way_to_what_others_write_and_comes_back(
    disk: MakeDisk, caplog: pytest.LogCaptureFixture
) -> None:
    tmpfs = disk("4MiB")
    kept = tmpfs.put(range(100))
    tmpfs.fill(leaving=3 * MiB)
    tmpfs.cache.relieve()
    assert 5 * MiB <= tmpfs.free < 6 * MiB
    left = tmpfs.cache.stats()
    assert 0 < left["entries"] < len(kept)
    tmpfs.fill(leaving=0)
    tmpfs.cache.relieve()
    assert tmpfs.cache.stats() == {"bytes": 0, "entries": 0}
    assert said(caplog) == []
    tmpfs.fill(leaving=0)
    for _ in range(3):
        tmpfs.cache.relieve()
        assert tmpfs.put(range(10)) == []
    assert said(caplog) == [SAYS]
    (tmpfs.path / "filler").unlink()
    tmpfs.cache.relieve()
    assert tmpfs.put(range(10)) == list(range(10))
    assert said(caplog) == [SAYS, "chunks are cached again"]


def _full(disk: Disk) -> Callable[[], object]:
    disk.fill(leaving=0)
    return (disk.path / "filler").unlink


def _read_only(disk: Disk) -> Callable[[], object]:
    disk.remount("ro")
    return lambda: disk.remount("rw")


def _no_inodes(disk: Disk) -> Callable[[], object]:
    disk.remount(f"nr_inodes={sum(1 for _ in disk.path.rglob('*')) + 1}")
    return lambda: disk.remount("nr_inodes=10000")


@pytest.mark.allow_warnings
@pytest.mark.parametrize("trouble", [_full, _read_only, _no_inodes])
def test_a_disk_that_takes_nothing_is_said_once_and_costs_no_entry_that_is_there(
    disk: MakeDisk,
    trouble: Callable[[Disk], Callable[[], object]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("snapshotter.blobs.cache._PAUSE_SECONDS", 0)
    tmpfs = disk("0")
    kept = tmpfs.put(range(20))
    assert kept == list(range(20))
    repair = trouble(tmpfs)
    assert tmpfs.put(range(100, 200)) == []
    assert all(tmpfs.cache.get(name(number), CHUNK) for number in kept)
    assert said(caplog) == [SAYS]
    repair()
    tmpfs.cache.relieve()
    assert tmpfs.put(range(100, 102)) == [100, 101]
    assert said(caplog) == [SAYS, "chunks are cached again"]
    assert not list(tmpfs.path.rglob(".new-*"))


@pytest.mark.allow_warnings
def test_a_disk_without_inodes_gets_some_back(disk: MakeDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has free space, so the reserve does not help."""
    monkeypatch.setattr("snapshotter.blobs.cache._PAUSE_SECONDS", 0)
    tmpfs = disk("4MiB")
    tmpfs.put(range(100))
    _no_inodes(tmpfs)
    assert tmpfs.put(range(100, 110)) == []
    tmpfs.cache.relieve()
    assert len(tmpfs.put(range(200, 205))) == 5


@pytest.mark.allow_warnings
def test_an_input_output_error_is_no_more_than_a_miss(
    disk: MakeDisk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    tmpfs = disk("0")
    tmpfs.put(range(3))
    for call in ("write", "read"):
        monkeypatch.setattr(os, call, fail)
    assert tmpfs.put(range(10, 20)) == []
    assert tmpfs.cache.get(name(1), CHUNK) is None
    assert said(caplog) == [SAYS]


def test_reserves() -> None:
    assert [Reserve.parse(text).of(1000 * MiB) for text in ("5%", "0", "10MiB", "7")] == [50 * MiB, 0, 10 * MiB, 7]
    for text in ("100%", "-1%", "5 %", "lots"):
        with pytest.raises(ValueError, match="not a size"):
            Reserve.parse(text)


def test_the_default_reserve_is_known(tmp_path: Path) -> None:
    from snapshotter import config

    (tmp_path / "config.toml").write_text("[cache]\nmin_free = '2GiB'\n")
    assert config.load(tmp_path / "config.toml").cache.min_free.of(1) == 2 << 30
    assert config.Config().cache.min_free.of(1000) == 50


def test_a_reserve_may_be_written_as_bytes(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[cache]\nmin_free = 1073741824\n")
    assert load(tmp_path / "config.toml").cache.min_free.of(0) == 1 << 30
