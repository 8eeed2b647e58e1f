"""The ciphertext cache against a model, while somebody else deletes, cuts and swaps what lies in it."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from snapshotter.blobs.cache import ChunkCache
from snapshotter.blobs.chunks import Counters

QUOTA = 4000
numbers = st.integers(0, 11)


def name(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


class CacheMachine(RuleBasedStateMachine):
    """`written`: every content ever put or planted under a name; the cache may forget, never make something up."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="cache-machine-"))
        self.cache = ChunkCache(self.directory / "chunks", QUOTA, Counters())
        self.written: dict[int, set[bytes]] = {}

    def teardown(self) -> None:
        self.cache.close()
        shutil.rmtree(self.directory)

    def path(self, number: int) -> Path:
        text = name(number).hex()
        return self.directory / "chunks" / text[:2] / text

    @rule(number=numbers, size=st.integers(1, 1500), fill=st.integers(0, 255))
    def put(self, number: int, size: int, fill: int) -> None:
        content = bytes([fill]) * size
        self.written.setdefault(number, set()).add(content)
        assert self.cache.put(name(number), content)
        assert self.cache.get(name(number), size) == content

    @rule(number=numbers, size=st.integers(1, 1500))
    def get(self, number: int, size: int) -> None:
        got = self.cache.get(name(number), size)
        assert got is None or (len(got) == size and got in self.written.get(number, set()))

    @rule(number=numbers)
    def drop(self, number: int) -> None:
        self.cache.drop(name(number))
        assert not self.path(number).exists()

    @rule(number=numbers)
    def delete_behind_its_back(self, number: int) -> None:
        self.path(number).unlink(missing_ok=True)

    @rule(number=numbers)
    def delete_bucket(self, number: int) -> None:
        shutil.rmtree(self.path(number).parent, ignore_errors=True)

    @rule()
    def delete_all(self) -> None:
        shutil.rmtree(self.directory / "chunks", ignore_errors=True)

    @rule(number=numbers, size=st.integers(0, 2000))
    def resize(self, number: int, size: int) -> None:
        if self.path(number).exists():
            os.truncate(self.path(number), size)
            self.written.setdefault(number, set()).add(self.path(number).read_bytes())

    @rule(first=numbers, second=numbers)
    def swap(self, first: int, second: int) -> None:
        if first != second and self.path(first).exists() and self.path(second).exists():
            contents = self.path(first).read_bytes(), self.path(second).read_bytes()
            self.path(first).write_bytes(contents[1])
            self.path(second).write_bytes(contents[0])
            self.written.setdefault(first, set()).add(contents[1])
            self.written.setdefault(second, set()).add(contents[0])

    @rule()
    def restart(self) -> None:
        self.cache.close()
        self.cache = ChunkCache(self.directory / "chunks", QUOTA, Counters())
        self.cache.scan()
        stored = [path for path in (self.directory / "chunks").rglob("*") if path.is_file()]
        assert self.cache.stats() == {"bytes": sum(path.stat().st_size for path in stored), "entries": len(stored)}

    @invariant()
    def nothing_half_written_is_left(self) -> None:
        assert not list(self.directory.rglob(".new-*"))


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=40, stateful_step_count=40)
