"""blobd on the real kernel: file-backed EROFS and loop devices over its FUSE session, and misbehaving registries."""

import asyncio
import errno
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapshotter import control
from snapshotter.crypto.chunk import CODEC_LZ4, CODEC_NONE
from snapshotter.errors import FailedPrecondition, IntegrityError, InvalidArgument, Unavailable
from snapshotter.ondemand.client import BlobdClient
from tests.dataplane import CHUNK, Machine, Plane, build, compare, content, forget_pages, read_at, wait_until

pytestmark = pytest.mark.root

LAYERS = (
    {"big": content(1, 40 * CHUNK + 4097), "etc/small": b"x", "etc/page": content(2, 4096), "empty": b""},
    {"lib/a": content(3, 3 * CHUNK), "lib/b": content(4, CHUNK - 1), "lib/c": content(5, CHUNK + 1)},
)
SEALED = build(*LAYERS)


@pytest.mark.parametrize("driver", ["file", "loop"])
def test_a_sealed_image_reads_back_whole(tmp_path: Path, driver: str) -> None:
    with Plane(tmp_path, driver=driver) as plane:
        plane.machine.start()
        target = plane.serve(1, SEALED)
        compare(target, SEALED)
        plane.machine.unmount(target)
        plane.machine.request({"op": "detach", "id": 1})
        assert plane.machine.request({"op": "status"})["images"] == []


@pytest.mark.parametrize("algorithm", [CODEC_NONE, CODEC_LZ4])
@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "plain"])
def test_other_codecs_and_plain_images(tmp_path: Path, algorithm: int, sealed: bool) -> None:
    image = build(*LAYERS, sealed=sealed, algorithm=algorithm, chunk_size=256 << 10)
    with Plane(tmp_path) as plane:
        plane.machine.start()
        compare(plane.serve(1, image), image)


def test_an_image_without_data(tmp_path: Path) -> None:
    bare = build()
    with Plane(tmp_path) as plane:
        plane.machine.start()
        compare(plane.serve(1, bare), bare)


def test_random_reads_of_many_threads(tmp_path: Path) -> None:
    data = SEALED.files["big"]
    with Plane(tmp_path) as plane:
        plane.machine.start()
        big = plane.serve(1, SEALED) / "big"

        def reads(seed: int) -> None:
            rng = random.Random(seed)
            fd = os.open(big, os.O_RDONLY)
            try:
                for _ in range(40):
                    offset, length = rng.randrange(len(data)), rng.randrange(1, 3 * CHUNK)
                    assert os.pread(fd, length, offset) == data[offset : offset + length]
                    if rng.random() < 0.3:
                        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)

        with ThreadPoolExecutor(64) as pool:
            list(pool.map(reads, range(64)))
        counters = plane.machine.counters()
        assert counters["eio"] == counters["verify_failures"] == 0
        assert counters["fetched_bytes"] <= sum(map(len, SEALED.blobs.values())), "nothing is fetched twice"


def test_two_images_share_ciphertext_but_read_by_their_own_tables(tmp_path: Path) -> None:
    """The same blob at other device offsets: a reader that looked chunks up by blob would serve the wrong ones."""
    one, two = build({"a": content(1, CHUNK), "b": content(2, CHUNK)}), build({"b": content(2, CHUNK)})
    with Plane(tmp_path) as plane:
        plane.machine.start()
        compare(plane.serve(1, one), one)
        fetched = plane.machine.counters()["fetched_bytes"]
        compare(plane.serve(2, two, "other"), two)
        assert plane.machine.counters()["fetched_bytes"] == fetched


def test_a_frozen_registry_blocks_only_its_own_image(tmp_path: Path) -> None:
    slow = build({"first": b"fetched when the image is attached"} | {f"f{n}": content(n, 5000) for n in range(200)})
    late = {name: data for name, data in slow.files.items() if name != "first"}
    with Plane(tmp_path, "fetch.window = 1") as plane:
        plane.machine.start()
        frozen, working = plane.serve(1, slow, "frozen"), plane.serve(2, SEALED, "working")
        plane.server.wait_for_requests("frozen", 1)
        plane.server.frozen.add("frozen")
        with ThreadPoolExecutor(200) as pool:
            blocked = [pool.submit((frozen / name).read_bytes) for name in late]
            try:
                wait_until(lambda: plane.machine.request({"op": "status"})["parked"] == 200, "all readers wait")
                compare(working, SEALED)
                assert not any(future.done() for future in blocked)
                in_flight = sum(request[0] == "frozen" for request in plane.server.requests) - 1
                assert in_flight <= 8, "fetches of one image are bounded"
            finally:
                plane.server.frozen.clear()
            assert [future.result() for future in blocked] == list(late.values())


def test_a_registry_that_stalls_past_the_deadline_is_an_error_and_heals(tmp_path: Path) -> None:
    settings = "[registry]\nprogress_timeout_seconds = 0.3\ntotal_timeout_seconds = 1.0\nretries = 1"
    with Plane(tmp_path, settings) as plane:
        plane.machine.start()
        target = plane.serve(1, SEALED)
        plane.server.frozen.add("app")
        with pytest.raises(OSError, match="Input/output error"):
            read_at(target / "big", 30 * CHUNK, 4096)
        assert plane.machine.counters()["eio"] >= 1
        plane.server.frozen.clear()
        compare(target, SEALED)


def test_a_registry_that_is_gone_is_an_error(tmp_path: Path) -> None:
    settings = "[registry]\ntotal_timeout_seconds = 1.0\nretries = 0"
    with Plane(tmp_path, settings) as plane:
        plane.machine.start()
        plane.machine.attach(1, SEALED, "127.0.0.1:9/app")
        target = plane.machine.mount(1, SEALED)
        with pytest.raises(OSError, match="Input/output error"):
            read_at(target / "lib" / "a", 0, 4096)


def test_a_quota_of_zero(tmp_path: Path) -> None:
    with Plane(tmp_path, "cache.quota = 0") as plane:
        plane.machine.start()
        compare(plane.serve(1, SEALED), SEALED)
        assert not [path for path in plane.machine.cache.rglob("*") if path.is_file()]
        assert plane.machine.request({"op": "status"})["cache"] == {"bytes": 0, "entries": 0}


def test_a_small_quota_is_kept_while_everything_is_read(tmp_path: Path) -> None:
    with Plane(tmp_path, 'cache.quota = "400KiB"') as plane:
        plane.machine.start()
        target = plane.serve(1, SEALED)
        for _ in range(2):
            compare(target, SEALED)
            forget_pages(target / "big")
        assert plane.machine.counters()["evictions"] > 0
        plane.machine.kill()  # it may still be keeping what was read last
        stored = sum(path.stat().st_size for path in plane.machine.cache.rglob("*") if path.is_file())
        assert 0 < stored <= 400 << 10


@contextmanager
def tmpfs(path: Path, size: int) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_a_full_cache_disk_is_no_error(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", 200 << 10) as disk, Plane(tmp_path, cache=disk) as plane:
        plane.machine.start()
        compare(plane.serve(1, SEALED), SEALED)
        stored = sum(path.stat().st_size for path in disk.rglob("*") if path.is_file())
        assert 0 < stored < 200 << 10 < sum(map(len, SEALED.blobs.values()))


def test_a_read_only_cache_disk_is_no_error(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", 1 << 20) as disk, Plane(tmp_path, cache=disk) as plane:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        plane.machine.start()
        compare(plane.serve(1, SEALED), SEALED)


# the process


def test_status_counts_open_devices_and_detach_waits_for_them(tmp_path: Path) -> None:
    with Plane(tmp_path) as plane:
        plane.machine.start()
        target = plane.serve(7, SEALED)
        [image] = plane.machine.request({"op": "status"})["images"]
        assert (image["id"], image["devices"], image["open"]) == (7, 3, 3)
        client = BlobdClient(plane.machine.root / "blobd.sock")
        with pytest.raises(FailedPrecondition):
            asyncio.run(client.detach(7))
        compare(target, SEALED)
        plane.machine.unmount(target)
        asyncio.run(client.detach(7))
        asyncio.run(client.detach(7))
        assert asyncio.run(client.attached(7)) is None


def test_what_is_attached_is_checked(tmp_path: Path) -> None:
    with Plane(tmp_path) as plane:
        plane.machine.start()
        client = BlobdClient(plane.machine.root / "blobd.sock", patience=1)
        memfd, other, loose = SEALED.pack(3, "host/app"), build({"a": b"b"}).pack(3, "host/app"), os.memfd_create("x")
        asyncio.run(client.attach(3, memfd))
        asyncio.run(client.attach(3, memfd))
        assert asyncio.run(client.attached(3)) == 3
        with pytest.raises(IntegrityError):
            asyncio.run(client.attach(3, other))
        with pytest.raises(InvalidArgument):
            asyncio.run(client.attach(4, memfd))
        with pytest.raises(IntegrityError):
            asyncio.run(client.attach(5, loose))
        assert len(plane.machine.request({"op": "status"})["images"]) == 1
        control.close_all([memfd, other, loose])


def test_dump_gives_back_everything_the_keeper_lost(tmp_path: Path) -> None:
    with Plane(tmp_path) as plane:
        plane.machine.start()
        plane.serve(1, SEALED)
        held, _ = control.fetch_all(plane.machine.root / "blobd.sock", {"op": "dump"})
        assert held.keys() == plane.machine.store.keys()
        for name, fd in held.items():
            assert os.fstat(fd).st_ino == os.fstat(plane.machine.store[name]).st_ino, name
        control.close_all(held.values())


def test_term_waits_for_images_in_use(tmp_path: Path) -> None:
    with Plane(tmp_path) as plane:
        machine = plane.machine
        machine.start()
        target = plane.serve(1, SEALED)
        assert machine.process
        machine.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "serving them until told again" in machine.errors.read_text(), "blobd says it stays")
        compare(target, SEALED)
        assert machine.kill(signal.SIGTERM) == 0


def test_term_without_images_and_interrupt_with_them_end_at_once(tmp_path: Path) -> None:
    with Plane(tmp_path) as plane:
        plane.machine.start()
        assert plane.machine.kill(signal.SIGTERM) == 0
        plane.machine.start()
        target = plane.serve(1, SEALED)
        assert plane.machine.kill(signal.SIGINT) == 0
        plane.machine.start()
        compare(target, SEALED)


def test_the_process_gives_nothing_away(tmp_path: Path) -> None:
    with Plane(tmp_path) as plane:
        plane.machine.start()
        compare(plane.serve(1, SEALED), SEALED)
        assert plane.machine.process
        process = Path(f"/proc/{plane.machine.process.pid}")
        assert (process / "environ").stat().st_uid == 0
        assert resident_bytes(plane.machine) < 90 << 20
        log = plane.machine.errors.read_text()
        for device in SEALED.devices:
            for number in range(len(device.chunks)):
                for secret in (device.digests, device.secrets):
                    assert secret[32 * number : 32 * number + 32].hex() not in log


def resident_bytes(machine: Machine) -> int:
    assert machine.process
    return int(Path(f"/proc/{machine.process.pid}/statm").read_text().split()[1]) * 4096


def test_idle_memory(tmp_path: Path) -> None:
    with Plane(tmp_path) as plane:
        plane.machine.start()
        assert resident_bytes(plane.machine) < 60 << 20


def test_a_second_blobd_on_the_same_root_is_refused(tmp_path: Path) -> None:
    with Plane(tmp_path) as plane:
        plane.machine.start()
        with pytest.raises(BlockingIOError) as refused:
            control.take_lock(plane.machine.root / "blobd.lock")
        assert refused.value.errno == errno.EAGAIN


def test_the_client_gives_up_after_its_patience(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        asyncio.run(BlobdClient(tmp_path / "nobody.sock", patience=0.1).status())


@pytest.mark.parametrize("wrong", [{"target": -1}, {"target": "1GiB"}, {"older": True}, {"older": 1.5}])
def test_a_cache_is_not_pruned_by_what_makes_no_sense(tmp_path: Path, wrong: dict[str, object]) -> None:
    with Plane(tmp_path) as plane:
        plane.machine.start()
        with pytest.raises(control.ControlError, match="are numbers") as caught:
            plane.machine.request({"op": "prune", **wrong})
        assert caught.value.reason == "invalid-argument"
