"""Ciphertext changed on the registry, on the wire and in the cache, seen through a real mount: right bytes or EIO."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dataplane import CHUNK, Plane, SyntheticImage, build, compare, content, forget_pages, read_at, wait_until

pytestmark = [pytest.mark.root, pytest.mark.allow_warnings]

FILES = {"big": content(1, 30 * CHUNK), "d/small": content(2, 3000)}
IMAGES = pytest.mark.parametrize("image", [build(FILES), build(FILES, sealed=False)], ids=["sealed", "plain"])


@IMAGES
def test_flipped_on_the_registry_is_eio_and_heals(tmp_path: Path, image: SyntheticImage) -> None:
    with Plane(tmp_path) as plane:
        plane.machine.start()
        target = plane.serve(1, image)
        plane.server.flip = lambda _repository, _digest, _offset, data: bytes(byte ^ 0x10 for byte in data)
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                read_at(target / "big", 3 * CHUNK, 4096)
        assert plane.machine.counters()["verify_failures"] >= 4
        plane.server.flip = None
        compare(target, image)


@IMAGES
def test_one_flipped_byte_in_every_answer_is_never_served(tmp_path: Path, image: SyntheticImage) -> None:
    rng = random.Random(5)

    def flip(_repository: str, _digest: str, _offset: int, data: bytes) -> bytes:
        place = rng.randrange(len(data))
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]

    with Plane(tmp_path) as plane:
        plane.machine.start()
        target = plane.serve(1, image)
        plane.server.flip = flip
        good = bad = 0
        for number in range(30):
            try:
                assert read_at(target / "big", number * CHUNK, 4096) == FILES["big"][number * CHUNK :][:4096]
                good += 1
            except OSError:
                bad += 1
        assert bad > 0
        plane.server.flip = None
        compare(target, image)


def zeroed(path: Path, rng: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def flipped(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def linked(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def piped(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def swapped(path: Path, rng: random.Random) -> None:
    other = rng.choice([p for p in path.parents[1].rglob("*") if p.is_file() and p != path])
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


@pytest.mark.parametrize("damage", [zeroed, cut, flipped, linked, piped, folder, swapped])
@IMAGES
def test_a_poisoned_cache_costs_a_fetch_and_nothing_else(
    tmp_path: Path, image: SyntheticImage, damage: Callable[[Path, random.Random], None]
) -> None:
    rng = random.Random(7)
    chunks = sum(len(device.chunks) for device in image.devices)
    with Plane(tmp_path, "fetch.decoded = 0") as plane:
        plane.machine.start()
        target = plane.serve(1, image)
        compare(target, image)
        wait_until(lambda: len(entries(plane)) == chunks, "everything is cached")
        good = {path: path.read_bytes() for path in entries(plane)}
        for path in good:
            damage(path, rng)
        for name in FILES:
            forget_pages(target / name)
        compare(target, image)
        assert plane.machine.counters()["eio"] == 0
        wait_until(lambda: all(intact(path, data) for path, data in good.items()), "the cache is good again")
        for name in FILES:
            forget_pages(target / name)
        requests = len(plane.server.requests)
        compare(target, image)
        assert len(plane.server.requests) == requests


def entries(plane: Plane) -> list[Path]:
    return [path for path in plane.machine.cache.rglob("*") if path.is_file() and not path.name.startswith(".new-")]


def intact(path: Path, data: bytes) -> bool:
    return path.is_file() and not path.is_symlink() and path.read_bytes() == data
