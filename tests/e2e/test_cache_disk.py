"""The disk of the cache is full or read-only: containers do not notice, and the log says it once."""

import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e.conftest import Images, Node, NodeMaker
from tests.e2e.test_images import READ_ALL, expected
from tests.harness.machine import Work, until

pytestmark = [pytest.mark.root, pytest.mark.real]


class Disk:
    def __init__(self, work: Work) -> None:
        self.path = work.directory("cache-disk")
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", self.path], check=True)
        work.stack.callback(subprocess.run, ["umount", str(self.path)], check=True)
        self.filler = self.path / "filler"

    def fill(self) -> None:
        with self.filler.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 16))

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True)


@pytest.fixture
def disk(work: Work) -> Disk:
    return Disk(work)


def on_disk(node: NodeMaker, path: Path) -> Node:
    return node(cache_dir=str(path / "cache"), cache={"min_free": "2MiB"})


def complaints(guest: Node) -> int:
    return sum(event.get("event") == "chunks are not cached" for event in guest.daemon.events())


def test_a_disk_that_others_fill(node: NodeMaker, images: Images, disk: Disk) -> None:
    """The cache gives way to them, and images run without one."""
    guest = on_disk(node, disk.path)
    assert guest.shell(guest.pull(images.sealed()), READ_ALL) == expected()
    assert guest.daemon.status()["cache"]["bytes"] > 3 << 20
    disk.fill()
    until(lambda: guest.daemon.status()["cache"]["bytes"] < 3 << 20, "the cache gives way", 20, every=0.5)
    disk.fill()
    reference = guest.pull(images.plain())  # whose bootstrap finds no room either
    assert guest.shell(reference, READ_ALL) == expected()
    counters = guest.daemon.status()["counters"]
    assert counters["evictions"] > 0
    assert counters["eio"] == 0
    until(lambda: complaints(guest) == 1, "the log says so", 20, every=0.2)


def test_a_read_only_cache_disk(node: NodeMaker, images: Images, disk: Disk) -> None:
    disk.remount("ro")
    guest = on_disk(node, disk.path)
    assert guest.shell(guest.pull(images.sealed()), READ_ALL) == expected()
    assert guest.daemon.status()["counters"]["eio"] == 0
    assert complaints(guest) == 1
