"""A root that is full, or read-only: calls are refused with words that help, nothing is left, and room can be made."""

import os
import subprocess
from collections.abc import Callable
from contextlib import suppress

import grpc
import pytest

from tests.conformance.client import Client
from tests.conformance.daemon import Daemon
from tests.harness.machine import Work

pytestmark = pytest.mark.root


class Disk:
    """A service whose root is a small file system of its own."""

    def __init__(self, work: Work, kind: str, start: Callable[..., Daemon]) -> None:
        self.root = work.directory("r")
        if kind == "ext4":
            image = work.path / "disk.img"
            image.touch()
            os.truncate(image, 8 << 20)
            subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
            subprocess.run(["mount", "-o", "loop", image, self.root], check=True)
        else:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", self.root], check=True)
        work.stack.callback(subprocess.run, ["umount", str(self.root)], check=True)
        self.root.chmod(0o700)
        self.daemon = start()
        self.client: Client = self.daemon.client()
        self.filler = self.root / "filler"

    def fill(self) -> None:
        with self.filler.open("ab", buffering=0) as file:
            for size in (1 << 20, 4096, 1):
                with suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def directories(self) -> set[str]:
        return self.daemon.names()


@pytest.fixture(params=["tmpfs", "ext4"])
def disk(request: pytest.FixtureRequest, work: Work, daemon: Callable[..., Daemon]) -> Disk:
    return Disk(work, request.param, daemon)


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()  # type: ignore[attr-defined]


def test_a_full_root_refuses_and_keeps_nothing(disk: Disk) -> None:
    sn = disk.client
    sn.prepare("old")
    sn.commit("base", "old")
    for number in range(3):
        sn.prepare(f"key-{number}", "base")
    before = sn.names()
    disk.fill()
    refused = None
    for number in range(3, 3000):  # what is allocated already may serve some
        try:
            sn.prepare(f"key-{number}", "base")
        except grpc.RpcError:
            refused = number
            break
    assert refused is not None
    directories, names = disk.directories(), sn.names()
    for call in (lambda: sn.prepare("one-more", "base"), lambda: sn.view("a-view", "base")):
        code, text = refusal(call)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "no space left" in text.lower() or "disk is full" in text
        assert "make room" in text
    assert sn.names() == names
    sn.cleanup()
    assert disk.directories() == directories
    # What only looks goes on, and what makes room does, too.
    assert sn.stat("key-0").parent == "base"
    assert sn.mounts("key-0")
    assert sn.usage("key-0")[1] > 0
    for name in names - before:
        sn.remove(name)
    sn.remove("key-1")
    sn.cleanup()
    disk.filler.unlink()
    sn.prepare("one-more", "base")
    sn.commit("committed", "key-0")
    assert sn.names() == before - {"key-0", "key-1"} | {"one-more", "committed"}


def test_a_commit_that_finds_no_room_leaves_the_snapshot_active(disk: Disk) -> None:
    sn = disk.client
    sn.prepare("key")
    labels = {f"label-{number}": "x" * 4000 for number in range(60)}
    disk.fill()
    code, text = refusal(lambda: sn.commit("name", "key", labels))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "make room" in text
    assert sn.names() == {"key"}
    disk.filler.unlink()
    sn.commit("name", "key", labels)
    assert sn.stat("name").labels == labels


@pytest.mark.parametrize("disk", ["ext4"], indirect=True)
def test_a_root_that_becomes_read_only_refuses_and_serves_what_it_has(disk: Disk) -> None:
    """As a disk does after an error."""
    sn = disk.client
    sn.prepare("key")
    directories = disk.directories()
    subprocess.run(["mount", "-o", "remount,abort", disk.root], check=True)
    for call in (lambda: sn.prepare("other"), lambda: sn.commit("name", "key"), lambda: sn.remove("key")):
        code, text = refusal(call)
        assert code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INTERNAL)
        assert "must be writable" in text or "disk I/O error" in text  # SQLite does not say more
    assert sn.names() == {"key"}
    assert sn.mounts("key")
    assert disk.directories() == directories
